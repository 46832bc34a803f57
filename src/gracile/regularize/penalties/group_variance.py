"""Group variance: rewards groups of different norms, so that a few carry what the rest need not."""

from torch import Tensor

from gracile.core.groups import group_norms
from gracile.core.kinds import penalty


@penalty("group_variance", source="Torfi et al. 2018, arXiv:1802.09902 (GSS); Distiller")
def group_variance(weight: Tensor, groups: Tensor, *, eps: float = 1e-8) -> Tensor:
    """1 / (eps + variance of the norms of the groups); meant beside `group_lasso`, not alone.

    The variance is that of a sample (n - 1). It grows without bound as the norms become equal.

    Args:
        weight: any shape.
        groups: group id of each element, of the same shape.
        eps: > 0; bounds the value where all norms are equal, and the gradient is 0 there.

    Raises:
        ValueError: eps is not positive, or there is only one group.

    >>> group_variance(torch.tensor([3.0, 4.0, 1.0]), torch.tensor([0, 0, 1]))
    tensor(0.1250)
    """
    if eps <= 0:
        raise ValueError(f"eps must be > 0, got {eps:g}.")
    norms = group_norms(weight, groups)
    if len(norms) < 2:
        raise ValueError("a variance needs at least two groups, got one.")
    return 1.0 / (norms.var() + eps)
