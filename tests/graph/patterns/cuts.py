"""Cut a pattern at random, and what the cut must have done."""

import random
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gracile.graph.capture import capture
from gracile.graph.dependency import ChannelGroup, channel_groups
from gracile.graph.surgery import SurgeryReport, remove_edits, verified_apply

Inputs = tuple[Tensor, ...]
Gone = dict[str, list[int]]


def groups_of(model: nn.Module, inputs: Inputs) -> dict[str, ChannelGroup]:
    """Group id -> group."""
    return {g.id: g for g in channel_groups(model, capture(model, inputs))}


def half(group: ChannelGroup, rng: random.Random) -> list[int]:
    """About half of a group's units, chosen at random; at least one."""
    n = len(group.units)
    return group.removable(rng.sample(range(n), max(1, n // 2)))


def cut(
    model: nn.Module, inputs: Inputs, groups: Sequence[ChannelGroup], gone: Gone
) -> tuple[nn.Module, SurgeryReport]:
    """Cut with the proof."""
    return verified_apply(model, remove_edits(groups, gone, by="test"), examples=[inputs])


def lost_indices(
    groups: Sequence[ChannelGroup], gone: Gone
) -> dict[tuple[str, int], tuple[int, set[int]]]:
    """(address, dim) -> its size and the indices that go."""
    out: dict[tuple[str, int], tuple[int, set[int]]] = {}
    for group in groups:
        for u in gone.get(group.id, ()):
            for s in group.units[u]:
                axis = (s.at, s.dim)
                out.setdefault(axis, (group.sizes[axis], set()))[1].update(s.index)
    return out


def expected_params(model: nn.Module, groups: Sequence[ChannelGroup], gone: Gone) -> int:
    """Parameters that are left, counted from the indices that go."""
    lost = lost_indices(groups, gone)
    left = {name: list(p.shape) for name, p in model.named_parameters()}
    for (at, dim), (size, indices) in lost.items():
        if at in left:
            assert left[at][dim] == size
            left[at][dim] -= len(indices)
    return sum(prod(shape) for shape in left.values())


@torch.no_grad()
def zeroed(model: nn.Module, groups: Sequence[ChannelGroup], gone: Gone) -> None:
    """Set to zero, in place: every parameter's indices that go."""
    parameters = dict(model.named_parameters())
    for (at, dim), (_, indices) in lost_indices(groups, gone).items():
        if at in parameters:
            parameters[at].index_fill_(dim, torch.tensor(sorted(indices)), 0)


def in_double(inputs: Inputs) -> Inputs:
    """Numbers in float64; tokens as they are."""
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def leaves(output: object) -> list[Tensor]:
    """The tensors of an output."""
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor)]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """In eval mode and float64."""
    return leaves(model.double().eval()(*in_double(inputs)))


def trained_step(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Parameters' gradients after one backward in train mode."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = None
    out = leaves(model.float().train()(*inputs))
    sum(v.square().mean() for v in out if v.is_floating_point()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
