"""Sums, norms and maxima over groups of weights, as a granularity numbers them."""

from collections.abc import Callable

import torch
from torch import Tensor


def group_sums(values: Tensor, groups: Tensor) -> Tensor:
    """Sum over each group; differentiable.

    Args:
        values: any shape.
        groups: group id of each element, 0..G-1, of that shape or a broadcast view of it.

    Returns:
        (G,) sums.

    >>> group_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]))
    tensor([3., 4.])
    """
    same = _broadcast_dims(groups)
    if same:  # one sum a dim is ten times as fast as adding element by element
        values, groups = values.sum(same, keepdim=True), _first(groups, same)
    ids = groups.reshape(-1).to(values.device)
    return values.new_zeros(int(groups.max()) + 1).index_add(0, ids, values.reshape(-1))


def group_sizes(groups: Tensor) -> Tensor:
    """(G,) elements of each group, as floats on the CPU."""
    return group_sums(torch.ones((), device=groups.device).expand(groups.shape), groups).cpu()


def group_norms(weight: Tensor, groups: Tensor, eps: float = 0.0) -> Tensor:
    """(G,) square roots of eps plus the sum of squares; the gradient of a zero group is 0.

    >>> group_norms(torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0, 0, 1]))
    tensor([5., 0.])
    """
    squares = group_sums(weight.square(), groups) + eps
    positive = squares > 0
    return torch.where(positive, squares, 1.0).sqrt() * positive  # sqrt has no derivative at 0


def group_max(values: Tensor, groups: Tensor) -> Tensor:
    """(G,) largest value of each group; values >= 0.

    >>> group_max(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]))
    tensor([2., 4.])
    """
    same = _broadcast_dims(groups)
    if same:
        values, groups = values.amax(same, keepdim=True), _first(groups, same)
    ids = groups.reshape(-1).to(values.device)
    out = values.new_zeros(int(groups.max()) + 1)
    return out.scatter_reduce(0, ids, values.reshape(-1), "amax")


# What is told of a group of weights (weight, groups) -> (G,).
MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean_abs": lambda w, g: group_sums(w.abs(), g) / group_sizes(g).to(w),
    "max": lambda w, g: group_max(w.abs(), g),
    "l1": lambda w, g: group_sums(w.abs(), g),
    "l2": group_norms,
}


def _broadcast_dims(groups: Tensor) -> list[int]:
    """Dims along which the ids are one value seen many times."""
    return [d for d, step in enumerate(groups.stride()) if step == 0]


def _first(groups: Tensor, dims: list[int]) -> Tensor:
    return groups[tuple(slice(0, 1) if d in dims else slice(None) for d in range(groups.dim()))]
