"""Functions, comparisons, choices and conversions of each element by itself."""

import pytest
import torch
from cut_case import Calls, around, cut, free_of, groups_of, indices, weight
from torch import nn
from torch.nn import functional as F

X = torch.randn(2, 5, 6)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: x.square() + x.erf() + torch.erfc(x) + x.sin() + torch.cos(x) + x.atan(),
        lambda s, x: x.sinh() + x.cosh() + x.abs().log1p() + x.expm1() + x.exp2() + x.sinc(),
        lambda s, x: x.sign() + x.floor() + torch.ceil(x) * x.round() + x.trunc() + x.frac(),
        lambda s, x: F.tanhshrink(x) + s.act(x) + x.nan_to_num() + (+x) + x.clamp_min(0.1),
        lambda s, x: x * (~(x > 0)) + x.clamp_max(1) * torch.logical_not(x),
        lambda s, x: x * x.isnan() + torch.isinf(x) + x.isfinite(),
        lambda s, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6),
        lambda s, x: x / x.pow(2).sum(-1, keepdim=True).add(1).log(),
        lambda s, x: x + (x == 0) + (x != 1) + (x < 2) + (x <= 3) + (x > 4) + (x >= 5),
        lambda s, x: x * ((x > 0) & (x < 1)) + ((x > 0) | (x < 1)) * x * ((x > 0) ^ (x > 1)),
        lambda s, x: x * torch.logical_and(x, x).logical_or(x).logical_xor(x > 0),
        lambda s, x: torch.lerp(x, x * 2, x.sigmoid()) + torch.addcmul(x, x, x) + x.atan2(x + 3),
        lambda s, x: x.detach() // 2 + x % 3 + x.fmod(2),
        lambda s, x: torch.where(x > 0, x, torch.zeros_like(x)).masked_fill(x < -1, 0.5),
        lambda s, x: x.where(x > 0, 0.0),
        lambda s, x: x.to(torch.float32).type_as(x).double().to(x.dtype) + x.half().to(x),
        lambda s, x: torch.ones_like(x) + torch.full_like(x, 0.5) * x,
        lambda s, x: x + x.new_zeros(2, 5, 4) + x.new_ones(2, 5, 1) * x.new_full((1,), 2.0),
    ],
)
def test_channels_pass(function):
    model = around(function, act=nn.Tanhshrink())
    assert free_of(model, X) == {"a.weight": 4}
    cut(model, X)


@pytest.mark.parametrize("name", ["log", "log2", "log10", "rsqrt", "reciprocal"])
def test_what_is_infinite_at_zero_keeps_its_channels(name):
    groups = groups_of(around(lambda s, x: getattr(x.abs(), name)()), X)
    assert f"'{name}' is infinite at zero" in groups["a.weight"].protected


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda s, x: s.p // x, "floor_divide"),
        (lambda s, x: 3 % x, "remainder"),
        (lambda s, x: torch.fmod(s.p, x), "fmod"),
    ],
)
def test_a_divisor_keeps_its_channels(function, name):
    groups = groups_of(around(function, p=weight(1)), X)
    assert f"'{name}' divides by channels" in groups["a.weight"].protected


def test_a_mask_of_one_value_a_channel_stays_or_goes_with_it():
    model = around(lambda s, x: x.masked_fill(s.on, 0.0))
    model.register_buffer("on", torch.tensor([True, False, False, True]))
    assert indices(groups_of(model, X)["a.weight"], 2)["on", 0] == (2,)
    assert cut(model, X).on.shape == (2,)


def test_ones_of_a_written_size_protect_what_they_meet():
    groups = groups_of(around(lambda s, x: x * x.new_ones(2, 5, 4)), X)
    assert "written in the forward" in groups["a.weight"].protected


def test_zeros_of_a_written_size_follow_in_any_batch():
    model = Calls(
        lambda s, x: s.b(torch.cat([x.new_zeros(x.size(0), 1, 4), s.a(x)], 1)), a=nn.Linear(6, 4),
        b=nn.Linear(4, 3),
    )  # fmt: skip
    model = cut(model, X)
    assert model(torch.randn(7, 5, 6)).shape == (7, 6, 3)
    assert [m.sizes for m in model.modules() if type(m).__name__ == "Zeros"] == [[None, 1, 2]]
