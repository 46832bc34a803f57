"""L2: the sum of squares; pulls large weights harder and brings none to 0 exactly."""

from torch import Tensor

from gracile.core.kinds import penalty


@penalty("l2", source="Krogh & Hertz 1991, NeurIPS 4; Han et al. 2015, arXiv:1506.02626")
def l2(weight: Tensor, groups: Tensor) -> Tensor:
    """Sum of w^2, without the factor 1/2; the gradient is 2 w.

    With strength d / 2 it is the `weight_decay: d` of SGD.

    Args:
        weight: any shape.
        groups: not used.

    >>> l2(torch.tensor([3.0, -4.0]), torch.tensor([0, 1]))
    tensor(25.)
    """
    return weight.square().sum()
