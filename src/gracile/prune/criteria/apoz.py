"""Average percentage of zeros: a filter whose activation is mostly zero does little."""

from torch import Tensor

from gracile.core.kinds import criterion
from gracile.prune.spread import over_filters


@criterion("apoz", source="Hu et al. 2016, arXiv:1607.03250", needs=("activation_zeros",))
def apoz(weight: Tensor, zeros: Tensor) -> Tensor:
    """Score a filter by the share of its activations that is not zero: most zeros go first.

    Args:
        weight: (outputs, ...).
        zeros: (outputs,) share of each channel's activations that is zero.

    >>> apoz(torch.zeros(2, 2), torch.tensor([0.9, 0.1])).sum(1)
    tensor([0.1000, 0.9000])
    """
    return over_filters(weight, 1 - zeros)
