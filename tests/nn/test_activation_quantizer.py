"""fake_quantize against integers worked out by hand, and what an ActivationQuantizer keeps."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile.errors import UserError
from gracile.nn.quantized import ActivationQuantizer
from gracile.nn.rounding import fake_quantize

ONE, ZERO = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)


def test_rounds_half_to_even_and_saturates():
    x = torch.tensor([-1.0, 0.5, 1.5, 2.5, 9.0])
    got = fake_quantize(x, ONE, ZERO, 0, 3)
    assert got.tolist() == [0, 0, 2, 2, 3]


def test_zero_point_shifts_the_range_not_the_value():
    x = torch.tensor([-1.0, -0.26, 0.24, 4.0])  # q = 0, 1, 2 (0.48 -> 0), 7 after the zero point
    got = fake_quantize(x, torch.tensor(0.5), torch.tensor(2, dtype=torch.int32), 0, 7)
    assert got.tolist() == [-1.0, -0.5, 0.0, 2.5]


def test_gradient_is_one_inside_the_range_and_zero_outside():
    x = torch.tensor([-0.1, 0.0, 1.2, 3.0, 3.1], requires_grad=True)
    fake_quantize(x, ONE, ZERO, 0, 3).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_divides_rather_than_multiplying_by_the_reciprocal():
    scale = torch.tensor(0.37)
    x = (torch.arange(-100, 100) + 0.5) * scale  # ties
    want = torch.clamp(torch.round(x / scale), -128, 127) * scale
    assert torch.equal(fake_quantize(x, scale, ZERO, -128, 127), want)
    assert not torch.equal(torch.round(x / scale), torch.round(x * (1 / scale)))


def test_per_channel_equals_channel_by_channel():
    x = torch.randn(2, 3, 4)
    scale, zero = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 3, -2], dtype=torch.int32)
    got = fake_quantize(x, scale, zero, -8, 7, axis=1)
    for c in range(3):
        assert torch.equal(got[:, c], fake_quantize(x[:, c], scale[c], zero[c], -8, 7))


def test_wrong_number_of_scales_is_named():
    with pytest.raises(ValueError, match="axis 1 of x has 3 indices, but there are 2 scales"):
        fake_quantize(torch.ones(2, 3), torch.ones(2), torch.zeros(2), 0, 1, axis=1)


@given(st.floats(1e-3, 10), st.integers(-128, 127))
def test_the_grid_is_a_fixed_point(scale, zero):
    s, z = torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)
    once = fake_quantize(torch.randn(64) * 20 * s, s, z, -128, 127)
    assert torch.equal(fake_quantize(once, s, z, -128, 127), once)


def test_half_precision_is_rounded_in_float32():
    x = torch.tensor([100.3, 0.7], dtype=torch.bfloat16)
    got = fake_quantize(x, torch.tensor(0.5), ZERO, 0, 255)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, fake_quantize(x.float(), torch.tensor(0.5), ZERO, 0, 255).bfloat16())


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({}, 0, 255),
        ({"signed": True}, -128, 127),
        ({"signed": True, "narrow": True}, -127, 127),
        ({"bits": 4}, 0, 15),
    ],
)
def test_range_of_the_integers(options, low, high):
    q = ActivationQuantizer(**options)
    assert (q.qmin, q.qmax) == (low, high)


def test_off_and_observe_pass_the_tensor_through():
    class Seen(list):
        observe = list.append

    q, x = ActivationQuantizer(), torch.randn(3)
    assert q(x) is x
    q.mode, q.observer = "observe", Seen()
    assert q(x) is x
    assert torch.equal(q.observer[0], x)


def test_observe_without_an_observer_is_an_error():
    q = ActivationQuantizer()
    q.mode = "observe"
    with pytest.raises(UserError, match="needs an observer"):
        q(torch.ones(1))


def test_quantize_applies_scale_and_zero_point():
    q = ActivationQuantizer(2)
    q.scale.fill_(0.5)
    q.zero_point.fill_(1)
    q.mode = "quantize"
    assert q(torch.tensor([-9.0, 0.3, 9.0])).tolist() == [-0.5, 0.5, 1.0]


def test_state_has_scale_and_zero_point_and_no_observer():
    q = ActivationQuantizer()
    q.observer = torch.nn.Linear(2, 2)  # even a module
    q.scale.fill_(0.25)
    assert set(q.state_dict()) == {"scale", "zero_point"}
    other = ActivationQuantizer()
    other.load_state_dict(q.state_dict())
    assert float(other.scale) == 0.25
    assert float(copy.deepcopy(q).scale) == 0.25


@pytest.mark.parametrize("options", [{"bits": 0}, {"bits": 17}, {"narrow": True}])
def test_impossible_grids_are_refused(options):
    with pytest.raises(ValueError, match=r"bits|narrow"):
        ActivationQuantizer(**options)
