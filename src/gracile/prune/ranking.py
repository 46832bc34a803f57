"""Which coupled channels matter least: a score for every unit, and what is ranked with what."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import repeat

import torch
from torch import Tensor

from gracile.graph.dependency import ChannelGroup

Axis = tuple[str, int]
SCOPES = ("layer", "global", "isomorphic")
NORMS = ("none", "mean", "max")


def unit_scores(
    groups: Iterable[ChannelGroup], element_scores: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Importance of each unit: the sum over the slices of the weights that make it.

    Args:
        groups: whose units are scored.
        element_scores: address of a producer -> scores of its weight's shape; smaller goes first.

    Returns:
        Group id -> (units,) scores in float64, on the CPU.
    """
    sums: dict[Axis, Tensor] = {}
    out = {}
    for group in groups:
        total = torch.zeros(len(group.units), dtype=torch.float64)
        for axis, (owner, index) in _written(group).items():
            if axis not in sums:
                scores = element_scores(axis[0]).detach().movedim(axis[1], 0)
                sums[axis] = scores.flatten(1).sum(1, dtype=torch.float64).cpu()
            total.index_add_(0, torch.tensor(owner), sums[axis][index])
        out[group.id] = total
    return out


def normalized(scores: Tensor, norm: str) -> Tensor:
    """Scores of one group on a scale that other groups share.

    Args:
        scores: (units,), not negative.
        norm: none: as they are; mean: divided by their mean; max: by their largest.

    >>> normalized(torch.tensor([1.0, 3.0]), "mean")
    tensor([0.5000, 1.5000])
    """
    if norm == "none":
        return scores
    scale = float(scores.mean() if norm == "mean" else scores.max())
    return scores / scale if scale > 0 else scores


def pools(groups: Sequence[ChannelGroup], scope: str) -> dict[str, Hashable]:
    """Group id -> its pool; units of one pool are ranked together and lose the same share.

    Args:
        groups: as they are before anything is cut.
        scope: layer: each group by itself; global: all together; isomorphic: groups of one
            `pattern` together.
    """
    if scope == "layer":
        return {g.id: g.id for g in groups}
    if scope == "global":
        return dict.fromkeys((g.id for g in groups), "all")
    return {g.id: pattern(g) for g in groups}


def pattern(group: ChannelGroup) -> Hashable:
    """What two groups must have in common to be isomorphic.

    The kind, the number of units and the multiset of members by role, name in their layer, dim and
    size. Fang et al. 2024, arXiv:2407.04616, section 3.2, compare the graphs of operators instead
    and let widths differ; equal widths keep the sums of scores comparable.
    """
    members = Counter(
        (_role(group, at, dim), at.rpartition(".")[2], dim, size)
        for (at, dim), size in group.sizes.items()
    )
    return group.kind, len(group.units), tuple(sorted(members.items()))


def ranks(scores: Mapping[str, Tensor], pool_of: Mapping[str, Hashable]) -> list[tuple[str, int]]:
    """All units of one or more pools, the least important of each pool first.

    Equal scores go in the order of the groups and units.

    Args:
        scores: group id -> (units,) scores that are comparable within a pool.
        pool_of: group id -> pool.

    Returns:
        (group id, unit), pool after pool.
    """
    members: dict[Hashable, list[str]] = {}
    for id in scores:
        members.setdefault(pool_of[id], []).append(id)
    out: list[tuple[str, int]] = []
    for ids in members.values():
        units = [(id, u) for id in ids for u in range(len(scores[id]))]
        order = torch.argsort(torch.cat([scores[id] for id in ids]), stable=True)
        out += [units[i] for i in order.tolist()]
    return out


def _written(group: ChannelGroup) -> dict[Axis, tuple[list[int], list[int]]]:
    """Axis of a producer -> the unit of each index, and the index."""
    found: dict[Axis, tuple[list[int], list[int]]] = {}
    for u, unit in enumerate(group.units):
        for part in unit:
            if group.writes.get(part.at) == part.dim:
                owner, index = found.setdefault((part.at, part.dim), ([], []))
                owner.extend(repeat(u, len(part.index)))
                index.extend(part.index)
    return found


def _role(group: ChannelGroup, at: str, dim: int) -> str:
    if group.writes.get(at) == dim:
        return "producer"
    return "consumer" if at in group.consumers else "other"
