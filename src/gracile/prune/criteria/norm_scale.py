"""The scale of the BatchNorm behind a filter, as network slimming leaves it."""

from torch import Tensor

from gracile.core.kinds import criterion
from gracile.prune.spread import over_filters


@criterion("norm_scale", source="Liu et al. 2017, arXiv:1708.06519", needs=("norm_scale",))
def norm_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """Score a filter by |gamma| of the BatchNorm that follows.

    Args:
        weight: (outputs, ...).
        scale: (outputs,) the BatchNorm's weight.

    >>> norm_scale(torch.zeros(2, 2), torch.tensor([-0.5, 0.25])).sum(1)
    tensor([0.5000, 0.2500])
    """
    return over_filters(weight, scale.abs())
