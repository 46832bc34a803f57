"""No importance at all: the referee that every ranking must beat."""

import torch
from torch import Tensor

from gracile.core.kinds import criterion


@criterion("random", source="Mittal et al. 2018, arXiv:1801.10447", needs=("generator",))
def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A uniform random score for each weight; for a group, the sum of its weights'.

    Args:
        weight: any shape.
        generator: where the numbers come from.
    """
    return torch.rand(weight.shape, generator=generator).to(weight.device)
