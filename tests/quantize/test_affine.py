"""The affine map: hand-worked numbers, properties, and torch's kernels as an oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gracile.quantize.affine import (
    asymmetric_params,
    dequantize,
    qrange,
    quantize,
    range_of,
    symmetric_params,
)
from gracile.quantize.fake_quant.affine import affine

numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
ends = st.tuples(numbers, numbers).map(lambda t: (min(t), max(t)))
tiny_ends = ends.map(lambda t: (t[0] * 1e-42, t[1] * 1e-42))
widths = st.integers(2, 12)


def grid_of(low, high, bits, signed, symmetric):
    low, high = torch.tensor(low), torch.tensor(high)
    if symmetric:
        return symmetric_params(low, high, bits, True), qrange(bits, True)
    return asymmetric_params(low, high, bits, signed), qrange(bits, signed)


# --- reference


@pytest.mark.parametrize(
    ("bits", "signed", "narrow", "expected"),
    [
        (8, True, False, (-128, 127)),
        (8, True, True, (-127, 127)),
        (8, False, False, (0, 255)),
        (4, True, True, (-7, 7)),
        (1, False, False, (0, 1)),
        (32, True, False, (-(2**31), 2**31 - 1)),
    ],
)
def test_integer_ranges(bits, signed, narrow, expected):
    assert qrange(bits, signed, narrow) == expected


def test_symmetric_scale_by_hand():
    scale, zero_point = symmetric_params(torch.tensor(-2.54), torch.tensor(1.0), 8, True, True)
    torch.testing.assert_close(scale, torch.tensor(0.02))  # 2.54 / 127
    assert zero_point == 0
    assert zero_point.dtype == torch.int32


def test_the_extra_negative_integer_is_used_where_the_grid_is_not_narrow():
    scale, _ = symmetric_params(torch.tensor(-1.28), torch.tensor(0.1), 8, True)
    torch.testing.assert_close(scale, torch.tensor(0.01))  # 1.28 / 128


def test_asymmetric_by_hand():
    scale, zero_point = asymmetric_params(torch.tensor(-0.5), torch.tensor(2.05), 8, False)
    torch.testing.assert_close(scale, torch.tensor(0.01))  # 2.55 / 255
    assert zero_point == 50
    low, high = range_of(scale, zero_point, 8, False)
    torch.testing.assert_close(torch.stack([low, high]), torch.tensor([-0.5, 2.05]))


def test_nudging_moves_the_range_by_less_than_half_a_step():
    # scale 1, zero falls at 1.4 -> zero point 1, range [-1, 2] instead of [-1.4, 1.6]
    scale, zero_point = asymmetric_params(torch.tensor(-1.4), torch.tensor(1.6), 2, False)
    assert (scale.item(), zero_point.item()) == pytest.approx((1.0, 1))
    assert [v.item() for v in range_of(scale, zero_point, 2, False)] == pytest.approx([-1, 2])


def test_a_range_without_zero_is_extended_to_it():
    scale, zero_point = asymmetric_params(torch.tensor(3.0), torch.tensor(5.1), 8, False)
    torch.testing.assert_close(scale, torch.tensor(0.02))
    assert zero_point == 0
    assert asymmetric_params(torch.tensor(-5.1), torch.tensor(-3.0), 8, True)[1] == 127


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (-1.28e-7, 0.9e-7, 1e-9, 128),  # both ends are zero to OpenVINO: it assumes the middle
        (-1e-7, 1.27e-7, 1e-9, 128),
        (0.0, 2.55e-7, 1e-9, 0),  # a true zero stays one
        (-1e-8, 0.51e-3, 2e-6, 1),  # one end: moved out, so that it counts
        (-0.51e-3, 1e-8, 2e-6, 254),
        (-8e-7, 8e-7, 4e-6 / 255, 128),
    ],
)
def test_an_end_close_to_zero_is_not_taken_for_zero(low, high, scale, zero_point):
    found = asymmetric_params(torch.tensor(low), torch.tensor(high), 8, False)
    torch.testing.assert_close(found[0], torch.tensor(scale), rtol=0.01, atol=0)
    assert found[1] == zero_point


def test_ties_round_to_even_and_ends_saturate():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9])
    q = quantize(x, torch.tensor(1.0), torch.tensor(0), -128, 127)
    assert q.tolist() == [0, 2, 2, 0, -2, 127, -128]


def test_each_channel_gets_its_own_scale():
    low, high = torch.tensor([-1.27, -0.1]), torch.tensor([0.5, 2.54])
    scale, _ = symmetric_params(low, high, 8, True, True)
    torch.testing.assert_close(scale, torch.tensor([0.01, 0.02]))
    x = torch.tensor([[1.27, 0.5], [1.2, 2.54]])
    by_row = quantize(x, scale, torch.zeros(2, dtype=torch.int32), -127, 127, axis=0)
    by_column = quantize(x, scale, torch.zeros(2, dtype=torch.int32), -127, 127, axis=1)
    assert by_row.tolist() == [[127, 50], [60, 127]]
    assert by_column.tolist() == [[127, 25], [120, 127]]


def test_an_all_zero_channel_takes_the_widest_scale():
    scale, _ = symmetric_params(torch.tensor([0.0, -1.27]), torch.tensor([0.0, 0.3]), 8, True, True)
    assert scale[0] == scale[1]
    assert symmetric_params(torch.zeros(3), torch.zeros(3), 8, True)[0].tolist() == [1, 1, 1]
    assert asymmetric_params(torch.tensor(0.0), torch.tensor(0.0), 8, False)[0] == 1


# --- properties


@given(ends, widths, st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_zero_is_exact_and_the_error_is_at_most_half_a_step(range_, bits, signed, symmetric):
    (scale, zero_point), (qmin, qmax) = grid_of(*range_, bits, signed, symmetric)
    x = torch.cat([torch.linspace(range_[0], range_[1], 97), torch.tensor([*range_, 0.0])])
    back = dequantize(quantize(x, scale, zero_point, qmin, qmax), scale, zero_point)
    assert back[-1] == 0
    assert (x - back).abs().max() <= scale / 2 * (1 + 1e-3)
    assert qmin <= zero_point <= qmax


@given(st.one_of(ends, tiny_ends), widths, st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_rounding_twice_is_rounding_once(range_, bits, signed, symmetric):
    (scale, zero_point), (qmin, qmax) = grid_of(*range_, bits, signed, symmetric)
    assert torch.isfinite(scale)
    assert torch.isfinite(1 / scale)
    x = torch.linspace(range_[0] - 1, range_[1] + 1, 101)
    once = affine(x, scale, zero_point, qmin, qmax)
    assert torch.equal(affine(once, scale, zero_point, qmin, qmax), once)
    q = quantize(x, scale, zero_point, qmin, qmax)
    assert torch.equal(dequantize(q, scale, zero_point), once)
    assert torch.equal(quantize(once, scale, zero_point, qmin, qmax), q)


@given(st.integers(0, 10_000), st.integers(2, 16))
@settings(max_examples=50, deadline=None)
def test_no_weight_lies_outside_its_own_grid(seed, bits):
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    low, high = w.detach().aminmax(dim=1)
    scale, zero_point = symmetric_params(low, high, bits, True, True)
    qmin, qmax = qrange(bits, True, True)
    affine(w, scale, zero_point, qmin, qmax, 0).sum().backward()
    assert (w.grad == 1).all()  # a clipped extreme would get no gradient


@given(ends, st.booleans(), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_equals_torch_away_from_ties(range_, signed, seed):
    (scale, zero_point), (qmin, qmax) = grid_of(*range_, 8, signed, False)
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    x = x * max(abs(range_[0]), abs(range_[1]), 1e-3)
    from_tie = ((x / scale) - torch.floor(x / scale) - 0.5).abs()
    x = x[from_tie > 1e-3]  # torch multiplies by 1 / scale, which breaks ties differently
    oracle = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, qmin, qmax)
    torch.testing.assert_close(affine(x, scale, zero_point, qmin, qmax), oracle)


def test_equals_torch_per_channel():
    w = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    low, high = w.flatten(1).aminmax(dim=1)
    scale, zero_point = asymmetric_params(low, high, 8, False)
    oracle = torch.fake_quantize_per_channel_affine(w, scale, zero_point, 0, 0, 255)
    torch.testing.assert_close(affine(w, scale, zero_point, 0, 255, 0), oracle)


def test_gradient_is_one_inside_and_zero_where_clipped():
    x = torch.tensor([-9.0, -1.0, 0.3, 2.0, 9.0], requires_grad=True)
    affine(x, torch.tensor(1.0), torch.tensor(0), -2, 3).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


# --- errors


@pytest.mark.parametrize(("bits", "signed"), [(0, False), (1, True), (33, True)])
def test_impossible_widths_are_refused(bits, signed):
    with pytest.raises(ValueError, match=f"bits, got {bits}"):
        qrange(bits, signed)


def test_bad_ranges_are_refused():
    one, inf = torch.tensor(1.0), torch.tensor(float("inf"))
    with pytest.raises(ValueError, match="finite"):
        asymmetric_params(-one, inf, 8, False)
    with pytest.raises(ValueError, match="low <= high"):
        symmetric_params(one, -one, 8, True)
    with pytest.raises(ValueError, match="unsigned grid with zero point 0 cannot hold -1"):
        symmetric_params(-one, one, 8, False)
    with pytest.raises(ValueError, match=r"needs 3 values, got shape \(2,\)"):
        quantize(torch.ones(3, 2), torch.ones(2), torch.zeros(2), 0, 255, axis=0)


# --- power-of-two scales and tuned zero points


def test_scales_round_up_to_a_power_of_two():
    low, high = torch.tensor([-1.0, -0.1, 0.0]), torch.tensor([1.27, 0.5, 0.0])
    scale, _ = symmetric_params(low, high, 8, True, True, scale="power_of_two")
    assert scale.tolist() == [2.0**-6, 2.0**-7, 2.0**-6]  # 0.01, 0.0039..; zero takes the widest
    exact, _ = symmetric_params(torch.tensor(0.0), torch.tensor(127 / 64), 8, True, True,
                                scale="power_of_two")  # fmt: skip
    assert exact == 2.0**-6  # is one already
    scale, zero_point = asymmetric_params(torch.tensor(-1.0), torch.tensor(1.55), 8, False,
                                          scale="power_of_two")  # fmt: skip
    assert (scale.item(), zero_point.item()) == (2.0**-6, 64)


def test_tuning_is_the_published_formula_by_hand():
    # [-1.4, 1.6] in 3 steps: z' = round(1.4) = 1, t = (1 - 3) / 1 = -2, h2 = 2.8, l2 = -0.8;
    # h2 - l1 = 4.2 is wider than h1 - l2 = 2.4, so [-1.4, 2.8]
    scale, zero_point = asymmetric_params(torch.tensor(-1.4), torch.tensor(1.6), 2, False,
                                          zero="tune")  # fmt: skip
    assert (scale.item(), zero_point.item()) == (pytest.approx(1.4), 1)
    # [-1.6, 1.4]: z' = 2, t = -1/2, h2 = 0.8, l2 = -2.8, so [-2.8, 1.4]
    scale, zero_point = asymmetric_params(torch.tensor(-1.6), torch.tensor(1.4), 2, False,
                                          zero="tune")  # fmt: skip
    assert (scale.item(), zero_point.item()) == (pytest.approx(1.4), 2)


def test_an_end_next_to_zero_gets_an_integer_when_tuned():
    # published: z' = 0, the range stays, and 0.0 is off the grid; here z = 1
    low, high = torch.tensor(-0.1), torch.tensor(2.55)
    scale, zero_point = asymmetric_params(low, high, 2, False, zero="tune")
    assert (scale.item(), zero_point.item()) == (pytest.approx(2.55 / 2), 1)
    assert asymmetric_params(low, high, 2, False)[1] == 0  # nudged: -0.1 is lost


@given(ends, widths, st.booleans(), st.sampled_from(["float", "power_of_two"]))
@settings(deadline=None)
def test_tuning_never_shrinks_and_keeps_zero_on_the_grid(ends, bits, signed, scale):
    low, high = torch.tensor(ends[0]), torch.tensor(ends[1])
    step, zero_point = asymmetric_params(low, high, bits, signed, scale, "tune")
    at_low, at_high = range_of(step, zero_point, bits, signed)
    qmin, qmax = qrange(bits, signed)
    assert qmin <= zero_point <= qmax
    slack = 1e-6 * max(abs(ends[0]), abs(ends[1]))
    assert at_low <= min(ends[0], 0) + slack
    assert at_high >= max(ends[1], 0) - slack
    if scale == "power_of_two":
        assert torch.frexp(step).mantissa == 0.5


@given(ends, widths, st.booleans())
@settings(deadline=None)
def test_a_power_of_two_is_at_most_twice_the_scale(ends, bits, symmetric):
    low, high = torch.tensor(ends[0]), torch.tensor(ends[1])
    make = symmetric_params if symmetric else asymmetric_params
    plain, rounded = (make(low, high, bits, True, scale=s)[0] for s in ("float", "power_of_two"))
    assert torch.frexp(rounded).mantissa == 0.5 or rounded == plain
    assert plain * (1 - 1e-6) <= rounded <= 2 * plain
