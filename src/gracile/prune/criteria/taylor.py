"""First-order Taylor expansion: how much the loss would change without these weights."""

from torch import Tensor

from gracile.core.kinds import criterion


@criterion(
    "taylor",
    source="Molchanov et al. 2019, arXiv:1906.10771, eq. 8, without the square",
    needs=("gradient",),
    after="abs",
)
def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """Score each weight by gradient * weight; a group by the magnitude of the sum.

    Args:
        weight: any shape.
        gradient: mean gradient of the loss, of that shape.

    >>> taylor(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0]))
    tensor([ 1., -1.])
    """
    return weight * gradient
