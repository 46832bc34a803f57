"""A tiny model around one operator, its groups, and a check that a cut equals zeros."""

import copy
import random

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gracile.graph.capture import capture
from gracile.graph.dependency import channel_groups, removable_together
from gracile.graph.surgery import remove_edits, verified_apply


class Calls(nn.Module):
    """Calls a function with itself and its input; modules and parameters by name."""

    def __init__(self, function, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


class CallsTwo(Calls):
    """The same with two inputs."""

    def forward(self, x, y):
        return self.function(self, x, y)


def around(function, **parts):
    """`function(self, 4 channels)` between a linear layer of 4 channels and one that reads 4."""
    return Calls(
        lambda s, x: s.b(function(s, s.a(x))), a=nn.Linear(6, 4), b=nn.Linear(4, 3), **parts
    )


def weight(*shape):
    return nn.Parameter(torch.randn(shape))


def groups_of(model, *inputs):
    return {g.id: g for g in channel_groups(model, capture(model, inputs))}


def free_of(model, *inputs):
    """Group id -> units, of those that can be cut."""
    groups = groups_of(model, *inputs)
    return {id: len(g.units) for id, g in groups.items() if g.protected is None}


def indices(group, unit):
    """(address, dim) -> indices of one unit."""
    return {(s.at, s.dim): s.index for s in group.units[unit]}


def some_of_each(groups, seed=0):
    """About half of the units of every group that can be cut."""
    rng = random.Random(seed)
    wanted = {
        g.id: rng.sample(range(len(g.units)), max(1, len(g.units) // 2))
        for g in groups.values()
        if g.protected is None
    }
    return removable_together(list(groups.values()), wanted)


def tensors(output):
    return [v for v in pytree.tree_leaves(output) if isinstance(v, torch.Tensor)]


def outputs(model, inputs):
    with torch.no_grad():
        double = [x.double() if x.is_floating_point() else x for x in inputs]
        return tensors(copy.deepcopy(model).double().eval()(*double))


def cut(model, *inputs, gone=None):
    """Cut with the proof; check against zeros in a model of its own, and train a step."""
    groups = groups_of(model, *inputs)
    gone = some_of_each(groups) if gone is None else gone
    assert any(gone.values())
    zeroed = copy.deepcopy(model)
    parameters = dict(zeroed.named_parameters())
    lost = [s for id, units in gone.items() for u in units for s in groups[id].units[u]]
    for s in lost:
        if s.at in parameters:
            with torch.no_grad():
                parameters[s.at].index_fill_(s.dim, torch.tensor(s.index), 0)
    names = [name for name, _ in model.named_parameters()]
    smaller, report = verified_apply(
        model, remove_edits(list(groups.values()), gone, "t"), examples=[inputs]
    )
    assert report.removed > 0
    assert sorted(name for name, _ in smaller.named_parameters()) == sorted(names)
    for a, b in zip(outputs(zeroed, inputs), outputs(smaller, inputs), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    sum(t.square().mean() for t in tensors(smaller.train()(*inputs))).backward()
    for p in smaller.parameters():
        assert p.grad is None or (p.grad.shape == p.shape and p.grad.isfinite().all())
    assert any(p.grad is not None for p in smaller.parameters())
    return smaller
