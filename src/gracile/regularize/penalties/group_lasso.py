"""Group lasso: pulls on the norm of a group, so that all of its weights reach 0 together."""

from torch import Tensor

from gracile.core.groups import group_norms, group_sizes
from gracile.core.kinds import penalty


@penalty("group_lasso", source="Yuan & Lin 2006, eq. 2.1; Wen et al. 2016, arXiv:1608.03665, eq. 2")
def group_lasso(
    weight: Tensor, groups: Tensor, *, size_weighted: bool = False, eps: float = 0.0
) -> Tensor:
    """Sum over the groups of ||w_g||_2; the gradient is w_g / ||w_g||, 0 where the group is 0.

    Args:
        weight: any shape.
        groups: group id of each element, of the same shape.
        size_weighted: multiply by the root of the group's size, as Yuan & Lin do (Wen et al. do
            not), so that large groups are pulled as hard for each weight as small ones.
        eps: added under the root; smooth at 0, but a small group is then pulled less.

    Raises:
        ValueError: eps is negative.

    >>> group_lasso(torch.tensor([3.0, 4.0, 2.0]), torch.tensor([0, 0, 1]))
    tensor(7.)
    """
    if eps < 0:
        raise ValueError(f"eps must be >= 0, got {eps:g}.")
    norms = group_norms(weight, groups, eps)
    if size_weighted:
        norms = norms * group_sizes(groups).to(norms).sqrt()
    return norms.sum()
