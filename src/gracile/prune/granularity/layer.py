"""Layers: a whole tensor as one group, for networks that have a shortcut around it."""

import torch
from torch import Tensor

from gracile.core.kinds import granularity


@granularity("layer", source="Wen et al. 2016, arXiv:1608.03665, eq. 4 (depth)")
def layer(shape: tuple[int, ...]) -> Tensor:
    """All entries form one group.

    >>> layer((1, 2))
    tensor([[0, 0]])
    """
    return torch.zeros((), dtype=torch.long).expand(shape)
