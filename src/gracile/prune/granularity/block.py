"""Blocks: some consecutive filters times consecutive channels, for vector units."""

import torch
from torch import Tensor

from gracile.core.kinds import granularity
from gracile.errors import UserError


@granularity("block", source="Narang et al. 2017, arXiv:1711.02782; Distiller, Blocks")
def block(shape: tuple[int, ...], *, filters: int = 1, channels: int = 8) -> Tensor:
    """Entries of `filters` x `channels` at one kernel position form a group.

    (O, I, kH, kW) -> O / filters * I / channels * kH * kW groups; Distiller's
    `block_shape: [filters, channels, 1, 1]`.

    Args:
        shape: of a weight with at least two dimensions.
        filters: consecutive filters of a block; must divide O.
        channels: consecutive channels of a block; must divide I.

    Raises:
        UserError: a size that is not positive or does not divide.

    >>> block((2, 4), filters=2, channels=2)
    tensor([[0, 0, 1, 1],
            [0, 0, 1, 1]])
    """
    if len(shape) < 2:
        raise UserError(f"blocks need a weight of at least 2 dimensions, got {shape}.")
    if filters < 1 or channels < 1 or shape[0] % filters or shape[1] % channels:
        raise UserError(
            f"a block of {filters} filters x {channels} channels does not divide a weight of "
            f"{shape[0]} filters x {shape[1]} channels."
        )
    grid = (shape[0] // filters, shape[1] // channels, *shape[2:])
    ids = torch.arange(torch.Size(grid).numel()).reshape(grid)
    return ids.repeat_interleave(filters, 0).repeat_interleave(channels, 1)
