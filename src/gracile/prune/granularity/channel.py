"""Channels: the inputs of a layer, dim 1 of its weight. `prune: thin` can cut them out."""

import torch
from torch import Tensor

from gracile.core.kinds import granularity


@granularity("channel", source="He et al. 2017, arXiv:1707.06168")
def channel(shape: tuple[int, ...]) -> Tensor:
    """All entries with the same index along dim 1 form a group; (O, I, ...) -> I groups.

    >>> channel((2, 3))
    tensor([[0, 1, 2],
            [0, 1, 2]])
    """
    return torch.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)
