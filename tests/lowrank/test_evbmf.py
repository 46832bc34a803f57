"""Variational Bayes: planted ranks, thresholds from theory, another minimizer."""

from math import log

import pytest
import torch

from gracile.errors import UserError
from gracile.lowrank.ranks.evbmf import evbmf, evbmf_rank, free_energy, noise_variance
from gracile.nn.chain import Layer


def noisy(seed, rows, columns, rank, noise):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return draw(rows, rank) @ draw(rank, columns) + noise * draw(rows, columns)


@pytest.mark.parametrize("shape", [(60, 60), (40, 120), (120, 40), (16, 300)])
@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_a_planted_rank_is_found_and_so_is_the_noise(shape, rank, noise):
    matrix = noisy(rank, *shape, rank, noise)
    assert evbmf_rank(matrix) == rank
    found = noise_variance(torch.linalg.svdvals(matrix), *sorted(shape))
    assert found == pytest.approx(noise**2, rel=0.3)


def test_noise_alone_has_no_rank():
    assert evbmf_rank(noisy(0, 50, 80, 1, 1e3)) == 0
    assert evbmf_rank(torch.zeros(4, 5)) == 0


def test_without_noise_the_rank_is_the_matrix_own():
    assert evbmf_rank(noisy(0, 20, 30, 5, 0.0)) == 5


def test_the_threshold_of_a_square_matrix_is_the_zero_of_the_evidence():
    """For L = M it is x = (1 + t)(1 + 1 / t) with log(1 + t) = t / 2: 4.911 (Nakajima 2013)."""
    low, high = 1.0, 5.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if log(1 + middle) > middle / 2 else (low, middle)
    edge = (1 + low) * (1 + 1 / low)
    assert edge == pytest.approx(4.9109, abs=1e-4)
    size, variance = 10, 0.5
    for factor, kept in ((1.001, 1), (0.999, 0)):
        matrix = torch.zeros(size, size, dtype=torch.float64)
        matrix[0, 0] = (factor * edge * size * variance) ** 0.5
        assert evbmf_rank(matrix, variance) == kept


def test_free_energy_by_hand():
    """One value of noise and one of signal, L = M = 2: x - ln x, and the signal's four terms."""
    values, variance = torch.tensor([20.0**0.5, 2.0**0.5], dtype=torch.float64), 1.0
    x, tau = 10.0, (8 + (64 - 4) ** 0.5) / 2
    signal = x - tau + log((tau + 1) / x) + log(tau + 1)
    assert free_energy(variance, values, 2, 2) == pytest.approx(signal + 1 - log(1.0))


@pytest.mark.parametrize("seed", range(6))
def test_the_noise_is_where_scipy_finds_it_or_better(seed):
    optimize = pytest.importorskip("scipy.optimize")
    rows, columns = 30, 50
    values = torch.linalg.svdvals(noisy(seed, rows, columns, 3 + seed, 0.5))
    found = noise_variance(values, rows, columns)
    other = optimize.minimize_scalar(
        lambda v: free_energy(v, values, rows, columns), bounds=(0.01, 5.0), method="bounded"
    )
    assert free_energy(found, values, rows, columns) <= other.fun + 1e-6


def test_weakening_goes_half_way_and_small_ranks_have_a_floor():
    layer, weight = Layer(40, 30), noisy(1, 30, 40, 10, 0.1)
    assert evbmf(weight, layer, "svd", ()) == (10,)
    assert evbmf(weight, layer, "svd", (), weakening=0.5) == (20,)
    assert evbmf(weight, layer, "svd", (), weakening=0.0) == (30,)
    assert evbmf(weight, layer, "svd", (), least=16) == (16,)
    assert evbmf(weight, layer, "svd", (), least=99) == (30,)
    with pytest.raises(UserError, match=r"weakening must be in \[0, 1\].*got 1.5"):
        evbmf(weight, layer, "svd", (), weakening=1.5)


def test_both_modes_of_tucker_get_their_planted_ranks():
    rng = torch.Generator().manual_seed(0)
    draws = [torch.randn(s, generator=rng) for s in ((32, 9), (24, 6), (9, 6, 3, 3))]
    weight = torch.einsum("tp,sr,prij->tsij", *draws)
    weight = weight + 0.3 * torch.randn(weight.shape, generator=rng)
    assert evbmf(weight, Layer(24, 32, (3, 3)), "tucker2", (), least=1) == (6, 9)


def test_the_largest_rank_of_the_groups_counts():
    weight = torch.cat([noisy(0, 12, 40, 2, 0.1), noisy(1, 12, 40, 5, 0.1)])
    layer = Layer(80, 24, (1,), groups=2)
    assert evbmf(weight.unsqueeze(2), layer, "svd", (), least=1) == (5,)
