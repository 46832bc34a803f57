"""Gradient times weight with its sign, as Distiller ranked filters."""

from torch import Tensor

from gracile.core.kinds import criterion


@criterion("signed_taylor", source="Distiller, GradientRankedFilterPruner", needs=("gradient",))
def signed_taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """Score each weight by gradient * weight, and a group by the sum.

    To first order the loss changes by minus the score when a group becomes zero: the groups that
    help most go first, and not those that matter least. For replaying schedules of Distiller;
    `taylor` ranks by the magnitude.

    Args:
        weight: any shape.
        gradient: mean gradient of the loss, of that shape.

    >>> signed_taylor(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0]))
    tensor([ 1., -1.])
    """
    return weight * gradient
