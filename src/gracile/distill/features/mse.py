"""Squared difference of features: a layer of the student learns to give what the teacher's does."""

import torch.nn.functional as F
from torch import Tensor

from gracile.core.kinds import feature_loss
from gracile.distill.pairs import check_features


@feature_loss("mse", source="Romero et al. 2015, arXiv:1412.6550, eq. 3 without its regressor")
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of (student - teacher)^2 over all numbers.

    Args:
        student: (N, ...) what a layer gives.
        teacher: of the same shape, no gradient needed.

    Returns:
        Scalar >= 0; 0 where both agree.

    Raises:
        ValueError: the shapes differ.

    >>> mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).item()
    2.0
    """
    check_features(student, teacher, "all")
    return F.mse_loss(student, teacher)
