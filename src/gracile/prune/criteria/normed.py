"""Magnitude relative to the layer, so that layers of different scale can be ranked together."""

from torch import Tensor

from gracile.core.kinds import criterion


@criterion("normed", source="NNCF, magnitude sparsity, weight importance 'normed_abs'")
def normed(weight: Tensor) -> Tensor:
    """Score each weight by |w| / ||W||_2 of its tensor.

    >>> normed(torch.tensor([3.0, -4.0]))
    tensor([0.6000, 0.8000])
    """
    norm = weight.norm()
    return weight.abs() / norm if norm > 0 else weight.abs()
