"""Columns of a matrix: the inputs of a linear layer."""

import torch
from torch import Tensor

from gracile.core.kinds import granularity
from gracile.errors import UserError


@granularity("column", source="Wen et al. 2016, arXiv:1608.03665 (rows and columns)")
def column(shape: tuple[int, ...]) -> Tensor:
    """All entries with the same index along dim 1 form a group; (O, I) -> I groups.

    Raises:
        UserError: not two dimensions.

    >>> column((2, 3))
    tensor([[0, 1, 2],
            [0, 1, 2]])
    """
    if len(shape) != 2:
        raise UserError(f"columns need a weight of 2 dimensions, got {shape}; use channel.")
    return torch.arange(shape[1]).expand(shape)
