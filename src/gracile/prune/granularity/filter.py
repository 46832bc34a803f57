"""Filters: the output channels of a layer, dim 0 of its weight. `prune: thin` can cut them out."""

import torch
from torch import Tensor

from gracile.core.kinds import granularity


@granularity("filter", source="Li et al. 2017, arXiv:1608.08710")
def filter_(shape: tuple[int, ...]) -> Tensor:
    """All entries with the same index along dim 0 form a group; (O, ...) -> O groups.

    >>> filter_((2, 3))
    tensor([[0, 0, 0],
            [1, 1, 1]])
    """
    return torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
