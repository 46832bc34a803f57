"""L1: the sum of absolute values; pulls every weight with the same force, so that some reach 0."""

from torch import Tensor

from gracile.core.kinds import penalty


@penalty("l1", source="Tibshirani 1996, J. R. Stat. Soc. B 58(1); Han et al. 2015, 1506.02626")
def l1(weight: Tensor, groups: Tensor) -> Tensor:
    """Sum of |w|; the gradient is sign(w), 0 at 0.

    Args:
        weight: any shape.
        groups: not used.

    >>> l1(torch.tensor([3.0, -4.0]), torch.tensor([0, 1]))
    tensor(7.)
    """
    return weight.abs().sum()
