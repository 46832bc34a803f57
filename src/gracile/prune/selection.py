"""From scores to masks: which groups go, exactly how many, by rank and never by threshold."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def finished(sums: Tensor, after: str) -> Tensor:
    """Scores of groups from their sums: as they are, or without their sign (see `criterion`)."""
    return sums.abs() if after == "abs" else sums


def noisy(scores: Tensor, chance: float, rng: torch.Generator) -> Tensor:
    """Each score, with some chance multiplied by a standard normal number (Distiller)."""
    hit = torch.rand(scores.shape, generator=rng) < chance
    return torch.where(hit, scores * torch.randn(scores.shape, generator=rng), scores)


def removed_count(
    level: float,
    n: int,
    *,
    done: int = 0,
    multiple_of: int = 1,
    min_keep: int = 1,
    strict: bool = False,
) -> int:
    """How many of n equal groups go at a sparsity level.

    floor(level * n), as in Distiller; never fewer than are gone already; what stays is rounded up
    to a multiple and is at least `min_keep`. If strict, what goes is rounded down to a multiple,
    as in Distiller.

    >>> removed_count(0.5, 10), removed_count(0.5, 33, multiple_of=16)
    (5, 1)
    >>> removed_count(0.5, 33, multiple_of=16, strict=True)
    16
    """
    keep = n - int(level * n + 1e-6)
    if strict:
        keep = n - (n - keep) // multiple_of * multiple_of
    else:
        keep = -(-keep // multiple_of) * multiple_of
    keep = max(keep, min(min_keep, n))
    return max(n - min(keep, n), done)


def lowest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k smallest scores; equal scores go in index order, so k is exact."""
    return torch.argsort(scores, stable=True)[:k]


def without_lowest(scores: Tensor, k: int) -> Tensor:
    """(n,) bool: all but the k smallest; equal scores go in index order. Any device, no sorting.

    >>> without_lowest(torch.tensor([1.0, 0.0, 1.0]), 2)
    tensor([False, False,  True])
    """
    if k <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if scores.device.type == "cpu":  # ten times as fast as kthvalue
        edge = float(np.partition(scores.detach().numpy(), k - 1)[k - 1])
    else:
        edge = float(scores.detach().kthvalue(k).values)
    keep = scores > edge
    surplus = k - int((~keep).sum())
    if surplus:  # more scores are at the edge than may go
        equal = scores == edge
        keep |= equal & (equal.cumsum(0) > int(equal.sum()) + surplus)
    return keep


def with_ties(scores: Tensor, gone: Tensor) -> Tensor:
    """What goes, and all that is not above it: the threshold of Distiller's level pruning.

    >>> with_ties(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0]))
    tensor([0, 2])
    """
    return (scores <= scores[gone].max()).nonzero().flatten() if len(gone) else gone


def lowest_overall(scores: Mapping[str, Tensor], k: int, *, min_keep: int = 1) -> dict[str, Tensor]:
    """The k smallest scores over several sets ranked together, leaving `min_keep` in each.

    Args:
        scores: set -> (n,) scores on one scale.
        k: how many go in all.
        min_keep: how many stay in every set.

    Returns:
        set -> indices to remove.
    """
    names = list(scores)
    flat = torch.cat([scores[n] for n in names])
    owner = torch.cat([torch.full((len(scores[n]),), i) for i, n in enumerate(names)])
    index = torch.cat([torch.arange(len(scores[n])) for n in names])
    for name, v in scores.items():  # the highest of each set are out of reach
        last = torch.argsort(v, stable=True)[max(0, len(v) - min_keep) :]
        flat[(owner == names.index(name)).nonzero().flatten()[last]] = torch.inf
    order = torch.argsort(flat, stable=True)[:k]
    order = order[flat[order] < torch.inf]
    return {n: index[order[owner[order] == i]].sort().values for i, n in enumerate(names)}


def mask_without(groups: Tensor, gone: Tensor | Sequence[int]) -> Tensor:
    """Boolean mask of `groups`' shape: True where the group stays.

    >>> mask_without(torch.tensor([0, 1, 2]), [1])
    tensor([ True, False,  True])
    """
    stays = torch.ones(int(groups.max()) + 1, dtype=torch.bool)
    stays[torch.as_tensor(gone, dtype=torch.long)] = False
    return stays[groups]
