"""Sums of rank-one tensors: alternating, one by one, and all at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gracile.errors import UserError
from gracile.lowrank.canonical import (
    alternating,
    balanced,
    fit,
    gauss_newton,
    random_factors,
    rebuilt,
    squared_error,
)

SIZES = (6, 5, 3, 3)


def planted(seed, rank, sizes=SIZES, batch=1, noise=0.0):
    rng = torch.Generator().manual_seed(seed)
    shape = (batch, *sizes)
    tensor = rebuilt(random_factors(torch.empty(shape), rank, rng))
    spread = tensor.std() * noise
    return tensor + spread * torch.randn(shape, generator=rng, dtype=torch.float64)


def relative(tensor, factors):
    return float((squared_error(tensor, factors) / tensor.flatten(1).square().sum(1)).max() ** 0.5)


def test_rebuilt_by_hand():
    a, b = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [4.0]]])
    assert rebuilt([a, b]).tolist() == [[[3.0, 4.0], [6.0, 8.0]]]


@settings(max_examples=10)
@given(st.integers(0, 30), st.integers(1, 8), st.integers(1, 3))
def test_no_sweep_makes_the_error_larger(seed, rank, batch):
    rng = torch.Generator().manual_seed(seed)
    tensor = torch.randn(batch, 5, 4, 3, generator=rng, dtype=torch.float64)
    _, errors = alternating(tensor, random_factors(tensor, rank, rng), sweeps=30, tolerance=0.0)
    energy = tensor.flatten(1).square().sum(1)
    falls = torch.stack(errors).diff(dim=0) / energy
    assert float(falls.max()) < 1e-12


def test_its_error_is_that_of_its_factors():
    tensor, rng = planted(0, 4, noise=0.5, batch=2), torch.Generator().manual_seed(1)
    factors, errors = alternating(tensor, random_factors(tensor, 3, rng), sweeps=5)
    torch.testing.assert_close(errors[-1], squared_error(tensor, factors))


@pytest.mark.parametrize("seed", range(4))
def test_a_tensor_of_known_rank_is_recovered_by_gauss_newton(seed):
    tensor, rng = planted(seed, 4), torch.Generator().manual_seed(seed + 10)
    assert relative(tensor, fit(tensor, 4, rng, how="nls")) < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_gauss_newton_is_the_best_of_the_three(seed):
    tensor = planted(seed, 6, noise=0.3)
    found = {
        how: relative(tensor, fit(tensor, 5, torch.Generator().manual_seed(7), how=how, sweeps=30))
        for how in ("random", "greedy", "nls")
    }
    assert found["nls"] <= min(found["random"], found["greedy"]) + 1e-12
    assert found["nls"] < 0.98 * found["greedy"]


def test_gauss_newton_ends_where_the_gradient_is_zero():
    tensor, rng = planted(3, 5, noise=0.4), torch.Generator().manual_seed(0)
    begin, _ = alternating(tensor, random_factors(tensor, 3, rng), sweeps=3)
    factors = gauss_newton(tensor, begin, steps=200, tolerance=1e-16)
    at = [f.clone().requires_grad_() for f in factors]
    slopes = torch.autograd.grad(squared_error(tensor, at).sum(), at)
    assert max(float(s.norm()) for s in slopes) < 1e-4 * float(tensor.square().sum())
    assert relative(tensor, factors) < relative(tensor, begin)


def test_rank_one_in_one_step_is_the_largest_singular_value():
    rng = torch.Generator().manual_seed(0)
    matrix = torch.randn(1, 6, 4, generator=rng, dtype=torch.float64)
    for how in ("random", "greedy", "nls"):
        factors = fit(matrix, 1, rng, how=how, sweeps=500)
        tail = torch.linalg.svdvals(matrix)[0, 1:].square().sum()
        torch.testing.assert_close(squared_error(matrix, factors)[0], tail, rtol=1e-3, atol=0)


@given(st.integers(0, 20))
def test_balancing_changes_no_tensor_and_gives_one_norm_to_all_modes(seed):
    rng = torch.Generator().manual_seed(seed)
    factors = random_factors(torch.empty(2, *SIZES), 3, rng)
    factors[1] = factors[1] * torch.tensor([100.0, 0.01, 0.0]).double()  # the last term is nothing
    done = balanced(factors)
    torch.testing.assert_close(rebuilt(done), rebuilt(factors))
    norms = torch.stack([f.norm(dim=1) for f in done])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))
    assert (norms[0].diff() <= 0).all()
    for f in done[1:]:
        assert (f.amax(1) >= -f.amin(1)).all()


def test_more_terms_than_a_mode_has_are_no_trouble():
    tensor, rng = planted(2, 12), torch.Generator().manual_seed(0)
    assert relative(tensor, fit(tensor, 12, rng, sweeps=100)) < 0.1


def test_an_unknown_way_is_refused():
    with pytest.raises(UserError, match=r"random, greedy, nls, got 'als'"):
        fit(torch.zeros(1, 2, 2), 1, torch.Generator(), how="als")
