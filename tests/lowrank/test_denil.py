"""Weights predicted from a few of their own."""

import pytest
import torch

from gracile.errors import UserError
from gracile.lowrank.factorizers.denil import coordinate_kernel, denil, denil_data
from gracile.lowrank.scheme import fixed_of


def smooth(rows=30, side=28, width=4.0):
    """Rows that are smooth images, as the first layer of a trained network's are."""
    rng = torch.Generator().manual_seed(0)
    values, vectors = torch.linalg.eigh(coordinate_kernel(side * side, (side, side), width))
    noise = torch.randn(rows, side * side, generator=rng, dtype=torch.float64)
    return noise @ (vectors * values.clamp(min=0).sqrt()).T


def rng():
    return torch.Generator().manual_seed(1)


def lost(weight, factors):
    return float((factors[1] @ factors[0] - weight).norm() / weight.norm())


def test_five_percent_of_a_smooth_matrix_predict_the_rest():
    weight = smooth()
    places = round(0.05 * weight.shape[1])
    mean = float((weight - weight.mean(1, keepdim=True)).norm() / weight.norm())
    predicted = lost(weight, denil(weight, 1, (places,), rng(), width=4.0))
    assert mean > 0.8  # zeros lose 1
    assert predicted < 0.5 * mean
    nearest = lost(weight, denil(weight, 1, (places,), rng(), width=4.0, fit="least_squares"))
    assert nearest < predicted


def test_all_places_give_the_weight_back():
    weight = torch.randn(5, 9, generator=rng(), dtype=torch.float64)
    assert lost(weight, denil(weight, 1, (9,), rng(), ridge=1e-12)) < 1e-5
    gram = torch.diag(torch.arange(1.0, 10.0))
    assert lost(weight, denil_data(weight, 1, (9,), gram, rng(), ridge=1e-12)) < 1e-5


def test_entries_at_the_places_are_learned_and_nothing_else():
    """By hand on a line of two: w_1 = exp(-1/2) / (1 + ridge) w_0."""
    weight = torch.tensor([[2.0, 5.0]], dtype=torch.float64)
    fixed, learned = denil(weight, 1, (1,), torch.Generator().manual_seed(0), ridge=0.25, grid=(2,))
    place = int(learned[0, 0] == 5.0)
    expected = [1 / 1.25, 0.6065306597126334 / 1.25]
    assert fixed[0].tolist() == pytest.approx(expected[::-1] if place else expected)


def test_inputs_that_vary_together_are_predicted_from_each_other():
    """A covariance of low rank knows weights in its span from as many places."""
    basis = torch.randn(3, 12, generator=rng(), dtype=torch.float64)
    weight = torch.randn(6, 3, generator=rng(), dtype=torch.float64) @ basis
    factors = denil_data(weight, 1, (4,), basis.T @ basis, rng(), ridge=1e-9)
    assert lost(weight, factors) < 1e-3
    assert lost(weight, denil(weight, 1, (4,), rng(), grid=(12,))) > 0.3


def test_the_dictionary_is_known_beforehand():
    first, second = denil(torch.zeros(2, 9), 1, (3,), rng())
    other, learned = denil(torch.ones(2, 9), 1, (3,), rng())
    assert torch.equal(first, other)
    assert not torch.equal(second, learned)
    assert fixed_of("denil") == fixed_of("denil_data") == (0,)
    assert fixed_of("svd") == ()


def test_channels_do_not_predict_each_other_and_kernels_have_their_grid():
    kernel = coordinate_kernel(8, (2, 2), 1.0)
    assert kernel[:4, 4:].abs().max() == 0
    assert kernel[0, 3].item() == pytest.approx(torch.tensor(-1.0).exp().item())
    first, second = denil(torch.randn(6, 2, 3, 3), 2, (5,), rng())
    assert first.shape == (10, 2, 3, 3)
    assert second.shape == (6, 5, 1, 1)


def test_wrong_options_are_named():
    weight = torch.randn(2, 9)
    with pytest.raises(UserError, match=r"do not divide 9 inputs"):
        denil(weight, 1, (2,), rng(), grid=(2, 2))
    with pytest.raises(UserError, match=r"width must be > 0"):
        denil(weight, 1, (2,), rng(), width=0.0)
    with pytest.raises(UserError, match=r"entries, least_squares, got 'exact'"):
        denil(weight, 1, (2,), rng(), fit="exact")
