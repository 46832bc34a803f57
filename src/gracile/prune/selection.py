"""From scores to masks: which groups go, exactly how many, by rank and never by threshold."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def group_scores(scores: Tensor, groups: Tensor) -> Tensor:
    """Sum element scores over each group.

    Args:
        scores: any shape.
        groups: group id of each element, same shape, 0..G-1.

    Returns:
        (G,) sums.

    >>> group_scores(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]))
    tensor([3., 4.])
    """
    flat = groups.reshape(-1).to(scores.device)
    out = torch.zeros(int(flat.max()) + 1, dtype=scores.dtype, device=scores.device)
    return out.index_add_(0, flat, scores.reshape(-1))


def removed_count(
    level: float, n: int, *, done: int = 0, multiple_of: int = 1, min_keep: int = 1
) -> int:
    """How many of n equal groups go at a sparsity level.

    floor(level * n), as in Distiller; never fewer than are gone already; what stays is rounded up
    to a multiple and is at least `min_keep`.

    >>> removed_count(0.5, 10), removed_count(0.5, 33, multiple_of=16)
    (5, 1)
    """
    keep = n - int(level * n + 1e-6)
    keep = -(-keep // multiple_of) * multiple_of
    keep = max(keep, min(min_keep, n))
    return max(n - min(keep, n), done)


def lowest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k smallest scores; equal scores go in index order, so k is exact."""
    return torch.argsort(scores, stable=True)[:k]


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
    left = [len(scores[n]) for n in names]
    gone: dict[str, list[int]] = {n: [] for n in names}
    for j in torch.argsort(flat, stable=True).tolist():
        if k == 0:
            break
        i = int(owner[j])
        if left[i] > min_keep:
            left[i] -= 1
            k -= 1
            gone[names[i]].append(int(index[j]))
    return {n: torch.tensor(sorted(g), dtype=torch.long) for n, g in gone.items()}


def mask_without(groups: Tensor, gone: Tensor | Sequence[int]) -> Tensor:
    """Boolean mask of `groups`' shape: True where the group stays.

    >>> mask_without(torch.tensor([0, 1, 2]), [1])
    tensor([ True, False,  True])
    """
    stays = torch.ones(int(groups.max()) + 1, dtype=torch.bool)
    stays[torch.as_tensor(gone, dtype=torch.long)] = False
    return stays[groups]
