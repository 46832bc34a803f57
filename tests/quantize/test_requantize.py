"""Integer requantization: gemmlowp's roundings by hand, against exact fractions, and widths."""

from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile.quantize.requantize import (
    accumulator_bits,
    doubling_high_mul,
    multiplier_of,
    requantize,
    rounding_divide_by_pot,
)

int32 = st.integers(-(2**31), 2**31 - 1)


def of(*values):
    return torch.tensor(values, dtype=torch.int64)


# --- reference


@pytest.mark.parametrize(
    ("real", "mantissa", "shift"),
    [
        (0.5, 2**30, 0),
        (0.75, 3 * 2**29, 0),
        (0.25, 2**30, 1),
        (1.0, 2**30, -1),
        (6.0, 3 * 2**29, -3),
        (1 - 2**-40, 2**30, -1),  # rounds up to 2^31, which 32 bits do not hold
        (0.0003, round(0.6144 * 2**31), 11),
    ],
)
def test_multipliers_by_hand(real, mantissa, shift):
    assert multiplier_of(real) == (mantissa, shift)


def test_the_high_product_by_hand():
    # (a b + 2^30) / 2^31 cut towards zero; for negative products (a b + 1 - 2^30) / 2^31
    a, b = of(1, -1, 3, -3, 2**31 - 1), 2**30
    assert doubling_high_mul(a, b).tolist() == [1, 0, 2, -1, 2**30]
    assert doubling_high_mul(of(-(2**31)), -(2**31)).tolist() == [2**31 - 1]
    assert doubling_high_mul(of(-(2**31)), 2**31 - 1).tolist() == [-(2**31) + 1]


def test_division_by_a_power_of_two_rounds_halves_away_from_zero():
    x = of(*range(-6, 7))
    assert rounding_divide_by_pot(x, 2).tolist() == [-2, -1, -1, -1, -1, 0, 0, 0, 1, 1, 1, 1, 2]
    assert rounding_divide_by_pot(x, 0).tolist() == x.tolist()
    assert rounding_divide_by_pot(of(2**31 - 1, -(2**31)), 31).tolist() == [1, -1]


def test_a_layers_sums_by_hand():
    # 1000 * 0.0072 = 7.2, -1000 -> -7.2, 20000 -> 144, cut at 127; zero point 3
    got = requantize(of(1000, -1000, 20_000), 0.0072, zero_point=3)
    assert got.tolist() == [10, -4, 127]
    assert got.dtype == torch.int32
    assert requantize(of(3, 2**31 - 1), 4.0, qmin=0, qmax=255).tolist() == [12, 255]


# --- properties and equivalences


@given(int32, int32)
def test_the_high_product_is_the_exact_one_rounded_half_up(a, b):
    exact = Fraction(a) * Fraction(b) / 2**31
    expected = min(floor(exact + Fraction(1, 2)), 2**31 - 1)
    assert doubling_high_mul(of(a), b).item() == expected


@given(int32, st.integers(0, 31))
def test_division_is_the_exact_one_rounded_half_away(x, exponent):
    exact = Fraction(abs(x), 2**exponent)
    expected = floor(exact + Fraction(1, 2)) * (1 if x >= 0 else -1)
    assert rounding_divide_by_pot(of(x), exponent).item() == expected


@given(st.floats(2.0**-31, 2.0**30))
def test_a_multiplier_is_exact_to_31_bits(real):
    mantissa, shift = multiplier_of(real)
    assert 2**30 <= mantissa < 2**31
    assert mantissa * 2.0 ** (-31 - shift) == pytest.approx(real, rel=2.0**-31)


@given(st.integers(-(2**24), 2**24), st.floats(1e-5, 0.9))
def test_two_roundings_are_within_one_step_of_the_real_product(total, real):
    got = requantize(of(total), real, qmin=-(2**31), qmax=2**31 - 1).item()
    assert abs(got - total * real) <= 0.5 + 0.51


@given(st.integers(0, 10_000), st.integers(-200, 0), st.integers(0, 200))
def test_no_input_outgrows_the_accumulator_and_one_needs_all_of_it(seed, low, high):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (2, 3, 2), generator=g)
    bits = accumulator_bits(weight, low, high)
    flat = weight.flatten(1).double()
    worst = torch.where(flat > 0, high, low), torch.where(flat > 0, low, high)
    sums = torch.stack([(flat * x).sum(1) for x in worst])
    assert -(2 ** (bits - 1)) <= sums.min()
    assert sums.max() < 2 ** (bits - 1)
    if bits > 1:
        assert sums.min() < -(2 ** (bits - 2)) or sums.max() >= 2 ** (bits - 2)


def test_sums_run_over_all_axes_but_the_kept_one():
    weight = torch.tensor([[1, 100], [1, 100]])
    assert accumulator_bits(weight, 0, 1, axis=0) == 8  # 101
    assert accumulator_bits(weight, 0, 1, axis=1) == 9  # 200


# --- errors


def test_what_cannot_be_is_refused():
    for real in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive finite"):
            multiplier_of(real)
    with pytest.raises(ValueError, match=r"must be in \[2\^-32, 2\^31\)"):
        multiplier_of(2.0**40)
    with pytest.raises(ValueError, match=r"exponent must be in 0\.\.31"):
        rounding_divide_by_pot(of(1), 32)
    with pytest.raises(ValueError, match="zero must be in the input's range"):
        accumulator_bits(torch.ones(1, 1), 1, 2)
