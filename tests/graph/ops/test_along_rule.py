"""What works along a dim keeps its indices together; other dims pass."""

import pytest
import torch
from cut_case import around, cut, free_of, groups_of
from torch.nn import functional as F

X = torch.randn(2, 5, 6)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: x.cumsum(1) + torch.cumprod(x, 1) + x.cummax(1)[0],
        lambda s, x: x.sort(dim=1)[0] + x.topk(5, 1).values,
        lambda s, x: x.max(1)[0] + x.min(1).values + x.median(1)[0] + x.prod(1),
        lambda s, x: torch.max(x, x * 2) + x.min(x + 1),
        lambda s, x: x * x.argmax(1, keepdim=True) + x.logsumexp(1, keepdim=True),
        lambda s, x: x.prod(1) * x.argmin(1) + x.any(1) + x.all(1),
        lambda s, x: x.transpose(1, 2).unsqueeze(-1).tril().squeeze(-1).transpose(1, 2),
        lambda s, x: x * x.norm(dim=1, keepdim=True),
    ],
)
def test_other_dims_pass(function):
    model = around(function)
    assert free_of(model, X) == {"a.weight": 4}
    cut(model, X)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda s, x: x.cumsum(-1), "cumsum"),
        (lambda s, x: x.sort()[0], "sort"),
        (lambda s, x: x.topk(4)[0], "topk"),
        (lambda s, x: x * x.max(2, keepdim=True)[0], "max"),
        (lambda s, x: x * x.max(), "max"),
        (lambda s, x: x * x.logsumexp(2, keepdim=True), "logsumexp"),
        (lambda s, x: x * x.argmax(2, keepdim=True), "argmax"),
        (lambda s, x: x.tril(), "tril"),
        (lambda s, x: x * x.norm(p=-1, dim=-1, keepdim=True), "norm"),
    ],
)
def test_channels_along_it_stay(function, name):
    group = groups_of(around(function), X)["a.weight"]
    assert f"'{name}' works along the channels" in group.protected


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: x / (x.norm(dim=-1, keepdim=True) + 1),
        lambda s, x: x * torch.linalg.vector_norm(x, ord=3, dim=-1, keepdim=True),
        lambda s, x: x * torch.linalg.norm(x, dim=(1, 2), keepdim=True),
        lambda s, x: x * F.cosine_similarity(x, x * 2, dim=-1).unsqueeze(-1),
    ],
)
def test_a_channel_of_zeros_adds_nothing_to_a_length(function):
    model = around(function)
    assert free_of(model, X) == {"a.weight": 4}
    cut(model, X)


def test_an_attribute_that_is_not_known():
    groups = groups_of(around(lambda s, x: x.real), X)
    assert "not known" in groups["a.weight"].protected
