"""Second-order importance with the diagonal of the empirical Fisher matrix as Hessian."""

from torch import Tensor

from gracile.core.kinds import criterion


@criterion(
    "fisher",
    source="LeCun et al. 1990 (optimal brain damage), Theis et al. 2018, arXiv:1801.05787",
    needs=("squared_gradient",),
)
def fisher(weight: Tensor, squared_gradient: Tensor) -> Tensor:
    """Score each weight by w^2 E[g^2] / 2, the rise of the loss where its gradient is zero.

    Args:
        weight: any shape.
        squared_gradient: mean of the squared gradient over mini-batches, of that shape.

    >>> fisher(torch.tensor([2.0]), torch.tensor([3.0]))
    tensor([6.])
    """
    return weight**2 * squared_gradient / 2
