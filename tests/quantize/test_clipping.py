"""Observers that clip: against NumPy and worked numbers, and what must hold for any values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gracile.quantize.affine import asymmetric_params, dequantize, qrange, symmetric_params
from gracile.quantize.affine import quantize as to_grid
from gracile.quantize.observers.aciq import Aciq, clip_factor
from gracile.quantize.observers.counting import Counting
from gracile.quantize.observers.histogram import HistogramError
from gracile.quantize.observers.kl import Entropy
from gracile.quantize.observers.mean_extremes import MeanExtremes
from gracile.quantize.observers.mean_percentile import MeanPercentile
from gracile.quantize.observers.min_max import MinMax
from gracile.quantize.observers.mse import MeanSquaredError
from gracile.quantize.observers.rounding import grid_for, occupied, squared_error
from gracile.quantize.observers.three_sigma import ThreeSigma


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laplace(n, seed=0):
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return (-u.sign() * torch.log1p(-2 * u.abs())).float()


def looked(o, *batches, bits=8, signed=False, symmetric=False, axis=None):
    o.bits, o.signed, o.symmetric, o.axis = bits, signed, symmetric, axis
    for x in batches:
        o.observe(x)
    return o


def pair(o):
    return [v.tolist() for v in o.range()]


def cost(x, low, high, bits, signed=False, symmetric=False):
    """Squared error of the grid that a range leads to, by the functions that make it."""
    if symmetric:
        params = symmetric_params(low, high, bits, signed)
    else:
        params = asymmetric_params(low, high, bits, signed)
    q = to_grid(x, *params, *qrange(bits, signed))
    return float((dequantize(q, *params) - x).double().pow(2).sum())


class Counter(Counting):
    """Shows the histogram itself."""

    def clipped(self, seen, low, high):
        self.seen_values = seen
        return low, high


# --- means over samples


def test_mean_extremes_is_the_mean_of_the_samples_ends():
    x, y = noise(5, 3, 4), 2 * noise(2, 3, 4, seed=1)
    flat = [sample.reshape(-1).numpy() for part in (x, y) for sample in part]
    low, high = pair(looked(MeanExtremes(), x, y))
    assert low == pytest.approx(np.mean([v.min() for v in flat]), rel=1e-6)
    assert high == pytest.approx(np.mean([v.max() for v in flat]), rel=1e-6)


def test_mean_percentile_is_the_mean_of_the_samples_percentiles():
    x = noise(6, 50)
    low, high = pair(looked(MeanPercentile(q=90), x[:4], x[4:]))
    expected = np.percentile(x.double().numpy(), [10, 90], axis=1).mean(1)
    assert [low, high] == pytest.approx(expected.tolist(), rel=1e-5)


def test_how_samples_are_put_into_batches_does_not_matter():
    x = noise(12, 7)
    for make in (MeanExtremes, MeanPercentile):
        whole, parts = looked(make(), x), looked(make(), *x.split(5))
        assert pair(whole) == pytest.approx(pair(parts))


def test_of_weights_the_mean_extremes_are_the_extremes():
    w = noise(4, 3, 3)
    for axis in (0, 1):
        expected = pair(looked(MinMax(), w, axis=axis))
        assert pair(looked(MeanExtremes(), w, axis=axis)) == expected
    got = looked(MeanPercentile(q=75), w, axis=0).range()[1]
    expected = np.percentile(w.flatten(1).numpy(), 75, axis=1)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)


def test_what_percentiles_cut_off_must_be_finite_as_well():
    x = noise(1, 10_000)
    x[0, 5] = math.inf
    with pytest.raises(Exception, match="NaN or infinity"):
        looked(MeanPercentile(q=90), x).range()


# --- spreads


def test_three_sigma_of_mean_and_standard_deviation():
    x = noise(20_000)
    low, high = pair(looked(ThreeSigma(n=1.5, spread="std"), x))
    mean, std = x.double().mean().item(), x.double().std(correction=0).item()
    assert [low, high] == pytest.approx([mean - 1.5 * std, mean + 1.5 * std], abs=4 / 2048)


def test_three_sigma_of_median_and_mad_leaves_zeros_out():
    x = torch.cat([noise(9_999).abs() + 1, torch.zeros(30_000)])
    low, high = pair(looked(ThreeSigma(n=1.0), x))
    values = x[x != 0].double().numpy()
    median = np.median(values)
    mad = 1.4826 * np.median(np.abs(values - median))
    assert [low, high] == pytest.approx([median - mad, median + mad], abs=8 / 2048)


def test_three_sigma_is_not_moved_by_an_outlier_and_never_beyond_the_values():
    x = noise(10_000)
    plain, hit = looked(ThreeSigma(), x), looked(ThreeSigma(), torch.cat([x, torch.tensor([1e3])]))
    assert pair(hit) == pytest.approx(pair(plain), abs=2 * 1000 / 2048)
    assert pair(looked(ThreeSigma(n=100.0), x)) == pair(looked(MinMax(), x))


# --- the error of a grid


@given(st.integers(0, 500), st.integers(2, 6), st.sampled_from([None, False, True]))
@settings(max_examples=40, deadline=None)
def test_the_counted_error_is_that_of_the_grid(seed, bits, symmetric):
    x = noise(3_000, seed=seed) + (0.0 if symmetric else 0.7)
    kind = {"signed": bool(symmetric), "symmetric": bool(symmetric)}
    o = looked(Counter(), x, bits=bits, **kind)
    low, high = o.range()
    grid = grid_for(o, low[None].double() / 2, high[None].double() / 2)
    counted = squared_error(occupied(o.seen_values), grid).item()
    assert counted == pytest.approx(cost(x, low / 2, high / 2, bits, **kind), rel=0.02)


def test_zeros_cost_nothing_and_a_fine_grid_a_twelfth_of_its_step():
    x = torch.cat([torch.rand(40_000, generator=torch.Generator().manual_seed(0)), torch.zeros(10)])
    o = looked(Counter(), x, bits=12)
    o.range()
    ends = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    error = squared_error(occupied(o.seen_values), grid_for(o, *ends)).item()
    assert error == pytest.approx(40_000 / (12 * 4095**2), rel=1e-3)
    assert o.seen_values.zeros.item() == 10


@given(st.integers(0, 200), st.integers(2, 8), st.booleans())
@settings(max_examples=10, deadline=None)
def test_each_search_finds_what_costs_less_than_the_one_before(seed, bits, heavy):
    x = laplace(1_000, seed) if heavy else noise(1_000, seed=seed) + 0.5
    x = torch.where(x > 0, 3 * x, x)  # tails of different weight
    errors = [
        cost(x, *looked(o, x, bits=bits).range(), bits)
        for o in (MinMax(), MeanSquaredError(), HistogramError())
    ]
    assert errors[1] <= errors[0] * 1.02
    assert errors[2] <= errors[1] * 1.02


def test_mse_finds_what_trying_all_clips_finds():
    x = laplace(20_000)
    low, high = x.min(), x.max()
    tried = [cost(x, low * k / 100, high * k / 100, 4, True, True) for k in range(1, 101)]
    found = looked(MeanSquaredError(), x, bits=4, signed=True, symmetric=True).range()
    assert cost(x, *found, 4, True, True) <= min(tried) * 1.01


def test_fewer_bits_are_clipped_more():
    x = laplace(50_000)
    for make in (MeanSquaredError, HistogramError, Aciq, Entropy):
        ends = [pair(looked(make(), x, bits=b, signed=True, symmetric=True))[1] for b in (3, 5, 8)]
        assert ends == sorted(ends), make
        assert ends[0] < 0.7 * x.max(), make


def test_channels_are_clipped_each_for_itself():
    x = torch.stack([laplace(3_000), noise(3_000), torch.linspace(-1, 1, 3_000)])
    for make in (MeanSquaredError, HistogramError, Aciq):
        whole = looked(make(), x, bits=4, signed=True, symmetric=True, axis=0).range()
        for k in range(3):
            one = looked(make(), x[k], bits=4, signed=True, symmetric=True).range()
            for got, expected in zip(whole, one, strict=True):
                assert got[k] == pytest.approx(expected.item(), rel=0.05), make


# --- entropy


def test_kl_of_a_small_histogram_by_hand():
    from gracile.quantize.observers.kl import _divergence

    counts = torch.tensor([[4.0, 0.0, 2.0, 1.0, 1.0]]).double()
    # clip after 4 bins, 2 levels: P = 4 0 2 2, Q = 4 0 | 1.5 1.5, both made to sum to 1
    p, q = np.array([4, 2, 2]) / 8, np.array([4, 1.5, 1.5]) / 7
    expected = float((p * np.log(p / q)).sum())
    assert _divergence(counts, 4, 2).item() == pytest.approx(expected)
    # clip after 2 bins: the outliers fall on an empty bin, which no Q can tell
    assert _divergence(counts, 2, 1).item() == math.inf


def test_kl_keeps_a_flat_distribution_and_cuts_a_lone_outlier():
    flat = torch.linspace(-1, 1, 100_000)
    assert pair(looked(Entropy(), flat))[1] > 0.95
    hit = torch.cat([noise(100_000), torch.tensor([60.0])])
    assert 2 < pair(looked(Entropy(), hit, signed=True, symmetric=True))[1] < 10


def test_kl_does_not_count_zeros():
    x = noise(20_000).relu()
    more = torch.cat([x, torch.zeros(500_000)])
    assert pair(looked(Entropy(), x)) == pair(looked(Entropy(), more))


# --- analytical


@pytest.mark.parametrize(
    ("distribution", "published"),
    [
        ("laplace", {2: 2.83, 3: 3.89, 4: 5.03, 8: 9.89}),
        ("gauss", {2: 1.71, 3: 2.15, 4: 2.55, 8: 3.92}),
    ],
)
def test_clip_factors_are_the_published_constants(distribution, published):
    for bits, value in published.items():
        assert clip_factor(bits, distribution) == pytest.approx(value, abs=0.01)  # given cut off


def test_the_clip_factor_of_laplace_solves_its_equation():
    for bits in range(1, 17):
        a = clip_factor(bits, "laplace")
        assert a * math.exp(a) == pytest.approx(3 * 4**bits, rel=1e-12)


@pytest.mark.parametrize("distribution", ["laplace", "gauss"])
def test_the_clip_factor_is_where_the_expected_error_is_least(distribution):
    values = np.linspace(-40, 40, 800_001)
    density = np.exp(-np.abs(values)) if distribution == "laplace" else np.exp(-(values**2) / 2)
    density /= density.sum()

    def error(a, bits):
        beyond = np.clip(np.abs(values) - a, 0, None)
        return (density * beyond**2).sum() + a**2 / (3 * 4**bits)

    for bits in (2, 4, 6):
        a = clip_factor(bits, distribution)
        assert error(a, bits) <= min(error(a * k, bits) for k in (0.98, 0.995, 1.005, 1.02))


def test_aciq_by_hand():
    x = 2 * laplace(100_000) + 1
    mean = x.double().mean().item()
    deviation = (x.double() - mean).abs().mean().item()
    low, high = pair(looked(Aciq(distribution="laplace"), x, bits=4))
    a = clip_factor(4, "laplace")
    assert [low, high] == pytest.approx([mean - a * deviation, mean + a * deviation], abs=0.03)


def test_aciq_behind_a_relu_has_one_bit_more():
    x = noise(100_000)
    both = pair(looked(Aciq(distribution="gauss"), x, bits=5, signed=True, symmetric=True))
    half = pair(looked(Aciq(distribution="gauss"), x.relu(), bits=4))
    assert half[0] == 0
    assert half[1] == pytest.approx(both[1], rel=0.01)
    wasted = pair(looked(Aciq(distribution="gauss"), x.relu(), bits=4, signed=True, symmetric=True))
    assert wasted[1] < half[1]  # of a grid with a sign half of the levels are lost


def test_the_better_distribution_is_taken():
    def ends(x, distribution):
        return pair(looked(Aciq(distribution=distribution), x, bits=4, signed=True, symmetric=True))

    for x, name in ((laplace(50_000), "laplace"), (noise(50_000), "gauss")):
        assert ends(x, "best") == ends(x, name)


def test_impossible_options_are_refused():
    for make, message in (
        (lambda: MeanSquaredError(steps=1), "steps must be 2 or more"),
        (lambda: HistogramError(steps=0), "steps must be 2 or more"),
        (lambda: ThreeSigma(n=0.0), "n must be a number > 0"),
        (lambda: ThreeSigma(spread="iqr"), "spread must be 'mad' or 'std', got 'iqr'"),
        (lambda: Aciq(distribution="normal"), "distribution must be 'best' or"),
        (lambda: MeanPercentile(q=20), "q must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
