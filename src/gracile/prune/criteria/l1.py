"""Magnitude importance: a weight near zero does little."""

from torch import Tensor

from gracile.core.kinds import criterion


@criterion(
    "l1",
    source="Han et al. 2015, arXiv:1506.02626; filters: Li et al. 2017, arXiv:1608.08710",
)
def l1(weight: Tensor) -> Tensor:
    """Score each weight by |w|; a filter's score, the sum over it, is its L1 norm.

    Args:
        weight: any shape; the effective weight, so already pruned entries are 0.

    Returns:
        Scores >= 0 of the same shape. Smaller is pruned first.

    >>> l1(torch.tensor([-2.0, 0.5]))
    tensor([2.0000, 0.5000])
    """
    return weight.abs()
