"""Mean curvature of weights: known Hessians, by hand, and what cannot be differentiated twice."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gracile.quantize.sensitivity import fisher_traces, hessian_traces, perturbation


def generator():
    return torch.Generator().manual_seed(0)


def quadratic(matrix):
    """({"a": (2, 3), "b": (4,)}, losses) of w' A w / 2 with w = [a, b]."""
    a, b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))

    def losses():
        w = torch.cat([a.flatten(), b])
        yield w @ matrix @ w / 2, 8

    return {"a": a, "b": b}, losses


def test_a_diagonal_hessian_is_found_exactly():
    diagonal = torch.tensor([1.0, 2, 3, 4, 5, 6, -1, 0, 2, 3])
    weights, losses = quadratic(diagonal.diag())
    got = hessian_traces(losses, weights, generator=generator(), rounds=1)
    assert got == pytest.approx({"a": 21 / 6, "b": 1.0})


def test_the_estimate_of_a_full_hessian_comes_close():
    m = torch.randn(10, 10, generator=generator())
    weights, losses = quadratic(m @ m.T)
    got = hessian_traces(losses, weights, generator=generator(), rounds=3000, tolerance=0)
    diagonal = (m @ m.T).diagonal()
    want = {"a": diagonal[:6].mean().item(), "b": diagonal[6:].mean().item()}
    assert got == pytest.approx(want, rel=0.05)


def test_it_stops_where_the_mean_stands_still():
    rounds = []
    weights, once = quadratic(torch.eye(10))

    def losses():
        rounds.append(1)
        yield from once()

    hessian_traces(losses, weights, generator=generator(), rounds=50)
    assert len(rounds) == 3


def test_batches_count_by_their_images():
    w = nn.Parameter(torch.zeros(2))

    def losses():
        yield w.pow(2).sum(), 3  # Hessian 2
        yield 3 * w.pow(2).sum(), 1  # Hessian 6

    assert hessian_traces(losses, {"w": w}, generator=generator(), rounds=1)["w"] == 3.0


def test_fisher_is_the_mean_squared_gradient_by_hand():
    w, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3), requires_grad=False)

    def losses():
        yield w @ torch.tensor([1.0, 2.0]), 1
        yield w @ torch.tensor([3.0, 0.0]), 1

    got = fisher_traces(losses, {"w": w, "unused": unused})
    assert got == {"w": ((1 + 4) / 2 + 9 / 2) / 2, "unused": 0.0}
    assert w.grad is None
    assert not unused.requires_grad


def test_it_is_the_diagonal_of_the_hessian_of_a_network():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2

    def loss(weight):
        return F.cross_entropy(F.linear(x, weight, layer.bias), y)

    def losses():
        yield loss(layer.weight), 6

    exact = torch.autograd.functional.hessian(loss, layer.weight.detach()).reshape(6, 6)
    got = hessian_traces(
        losses, {"w": layer.weight}, generator=generator(), rounds=2000, tolerance=0
    )
    assert got["w"] == pytest.approx(exact.diagonal().mean().item(), rel=0.05)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * 2


def test_an_operator_without_second_derivative_raises():
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def losses():
        yield (Once.apply(w) * v).pow(2).sum(), 1  # only some paths have a second derivative

    with pytest.raises(RuntimeError, match="once_differentiable"):
        hessian_traces(losses, {"w": w, "v": v}, generator=generator())
    assert fisher_traces(losses, {"w": w, "v": v}) == {"w": 64.0, "v": 64.0}


def test_perturbation_is_the_squared_distance():
    assert perturbation(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 1.0]])) == 1.25
