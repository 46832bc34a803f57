"""Kernels: the patch of a convolution that carries one channel into one filter."""

import torch
from torch import Tensor

from gracile.core.kinds import granularity
from gracile.errors import UserError


@granularity("kernel", source="Mao et al. 2017, arXiv:1705.08922 (2-D)")
def kernel(shape: tuple[int, ...]) -> Tensor:
    """All entries of one (filter, channel) pair form a group; (O, I, kH, kW) -> O * I groups.

    Raises:
        UserError: fewer than three dimensions.

    >>> kernel((2, 2, 1, 2)).flatten(1)
    tensor([[0, 0, 1, 1],
            [2, 2, 3, 3]])
    """
    if len(shape) < 3:
        raise UserError(f"kernels need the weight of a convolution, got shape {shape}.")
    pairs = torch.arange(shape[0] * shape[1])
    return pairs.reshape(*shape[:2], *[1] * (len(shape) - 2)).expand(shape)
