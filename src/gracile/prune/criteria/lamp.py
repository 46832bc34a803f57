"""LAMP: magnitude against all weights of the layer that are at least as large."""

import torch
from torch import Tensor

from gracile.core.kinds import criterion


@criterion("lamp", source="Lee et al. 2021, arXiv:2010.07611, eq. 1")
def lamp(weight: Tensor) -> Tensor:
    """Score each weight by w^2 / sum of u^2 over the weights u that outrank it, itself included.

    For `scope: global`; within a layer the order is that of magnitudes.

    >>> lamp(torch.tensor([1.0, 2.0]))
    tensor([0.2000, 1.0000])
    """
    squares = weight.reshape(-1).double() ** 2
    order = torch.argsort(squares, stable=True)
    tails = squares[order].flip(0).cumsum(0).flip(0)
    scores = torch.zeros_like(squares)
    scores[order] = torch.where(tails > 0, squares[order] / tails.clamp(min=1e-300), 0.0)
    return scores.reshape(weight.shape).to(weight.dtype)
