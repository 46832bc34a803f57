"""Operators that put indices elsewhere."""

import pytest
import torch
from cut_case import Calls, around, cut, free_of, groups_of, indices, weight
from torch import nn
from torch.nn import functional as F

X = torch.randn(2, 5, 6)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: x.roll(1, 1) + torch.roll(x, (1, 2), (0, 1)),
        lambda s, x: x.flip(1) + torch.flip(x, [0, -2]),
        lambda s, x: x.mT.mT,
        lambda s, x: x.index_select(1, torch.tensor([0, 2])),
        lambda s, x: x.gather(1, torch.argsort(x, 1)),
        lambda s, x: x.flatten(1).view_as(x),
        lambda s, x: x * s.p.expand_as(x) + s.q.expand_as(x),
        lambda s, x: x.unfold(1, 2, 1).sum(-1),
        lambda s, x: x.repeat(2, 1, 1),
        lambda s, x: x.repeat_interleave(2, dim=1),
    ],
)
def test_channels_pass(function):
    model = around(function, p=weight(1, 1, 4), q=weight(1))
    assert free_of(model, X) == {"a.weight": 4}
    cut(model, X)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda s, x: x.roll(1, -1), "shifts the channels"),
        (lambda s, x: x.roll(1), "shifts the channels"),
        (lambda s, x: x.index_select(2, torch.tensor([3, 2, 1, 0])), "picks indices"),
        (lambda s, x: x.gather(2, torch.argsort(x, 2)), "picks indices|works along"),
        (lambda s, x: x.unfold(2, 1, 1).squeeze(-1), "takes windows"),
        (lambda s, x: x.repeat_interleave(torch.tensor([1, 1, 1, 1]), dim=2), "a count or dim"),
    ],
)
def test_channels_that_are_moved_by_number_stay(function, reason):
    group = groups_of(around(function), X)["a.weight"]
    assert any(part in group.protected for part in reason.split("|"))


def test_reversed_channels():
    model = around(lambda s, x: x.flip(-1))
    assert indices(groups_of(model, X)["a.weight"], 0)["b.weight", 1] == (3,)
    cut(model, X)


@pytest.mark.parametrize(
    ("function", "columns"),
    [
        (lambda s, x: x.repeat(1, 1, 2), (1, 5)),
        (lambda s, x: torch.tile(x, (2,)), (1, 5)),
        (lambda s, x: torch.repeat_interleave(x, 2, -1), (2, 3)),
    ],
)
def test_a_channel_goes_with_its_copies(function, columns):
    model = Calls(lambda s, x: s.b(function(s, s.a(x))), a=nn.Linear(6, 4), b=nn.Linear(8, 3))
    assert indices(groups_of(model, X)["a.weight"], 1)["b.weight", 1] == columns
    cut(model, X)


def test_a_transposed_weight():
    model = Calls(
        lambda s, x: s.b(torch.relu(s.a(x) @ s.w.T)), a=nn.Linear(6, 4), w=weight(5, 4),
        b=nn.Linear(5, 3),
    )  # fmt: skip
    assert free_of(model, X) == {"a.weight": 4, "w": 5}
    cut(model, X)


def test_sampled_pixels():
    def call(s, x):
        return s.b(F.grid_sample(s.a(x), x[:, :2].permute(0, 2, 3, 1), align_corners=False))

    model = Calls(call, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 3, 1))
    image = torch.rand(2, 3, 6, 6)
    assert free_of(model, image) == {"a.weight": 4}
    cut(model, image)
