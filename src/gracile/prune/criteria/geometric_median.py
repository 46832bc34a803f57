"""Geometric median: a filter near the middle of all filters is replaced by the others."""

import torch
from torch import Tensor

from gracile.core.kinds import criterion
from gracile.prune.spread import over_filters


@criterion("geometric_median", source="He et al. 2019, arXiv:1811.00250, eq. 7")
def geometric_median(weight: Tensor, *, sign_aware: bool = False) -> Tensor:
    """Score a filter by the sum of its Euclidean distances to all filters of its layer.

    Args:
        weight: (outputs, ...).
        sign_aware: a filter counts as near to another also if it is near its negative, which the
            next layer can undo by a sign.

    >>> geometric_median(torch.tensor([[0.0], [1.0], [5.0]])).sum(1)
    tensor([6., 5., 9.])
    """
    filters = weight.reshape(weight.shape[0], -1).double()
    distances = torch.cdist(filters, filters)
    if sign_aware:
        distances = torch.minimum(distances, torch.cdist(filters, -filters))
        distances.fill_diagonal_(0.0)
    return over_filters(weight, distances.sum(1)).to(weight.dtype)
