"""Energy importance: like magnitude, but a few large weights save a filter of small ones."""

from torch import Tensor

from gracile.core.kinds import criterion


@criterion(
    "l2", source="Distiller, L2RankedStructureParameterPruner; He et al. 2018, arXiv:1808.06866"
)
def l2(weight: Tensor) -> Tensor:
    """Score each weight by w^2; summed over a filter this is its squared L2 norm (same order).

    Args:
        weight: any shape; the effective weight.

    Returns:
        Scores >= 0 of the same shape. Smaller is pruned first.

    >>> l2(torch.tensor([-2.0, 0.5]))
    tensor([4.0000, 0.2500])
    """
    return weight.square()
