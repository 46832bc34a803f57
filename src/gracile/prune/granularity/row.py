"""Rows of a matrix: the outputs of a linear layer."""

import torch
from torch import Tensor

from gracile.core.kinds import granularity
from gracile.errors import UserError


@granularity("row", source="Wen et al. 2016, arXiv:1608.03665 (rows and columns)")
def row(shape: tuple[int, ...]) -> Tensor:
    """All entries with the same index along dim 0 form a group; (O, I) -> O groups.

    Distiller's ranked pruners call dim 1 rows, its regularizers dim 0 as here.

    Raises:
        UserError: not two dimensions.

    >>> row((2, 3))
    tensor([[0, 0, 0],
            [1, 1, 1]])
    """
    if len(shape) != 2:
        raise UserError(f"rows need a weight of 2 dimensions, got {shape}; use filter.")
    return torch.arange(shape[0]).reshape(-1, 1).expand(shape)
