"""Gradient magnitude times weight magnitude, weight by weight."""

from torch import Tensor

from gracile.core.kinds import criterion


@criterion("snip", source="Lee et al. 2019, arXiv:1810.02340, eq. 5", needs=("gradient",))
def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """Score each weight by |gradient * weight| (connection sensitivity).

    Args:
        weight: any shape.
        gradient: mean gradient of the loss, of that shape.

    >>> snip(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0]))
    tensor([1., 1.])
    """
    return (weight * gradient).abs()
