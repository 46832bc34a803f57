"""Hints: a middle layer of a thin student learns to tell what the teacher's wider one gives."""

from torch import Tensor

from gracile.core.kinds import feature_loss
from gracile.distill.pairs import check_features


@feature_loss("fitnets", source="Romero et al. 2015, arXiv:1412.6550, eq. 3", regressor=True)
def fitnets(student: Tensor, teacher: Tensor, *, mean: bool = True) -> Tensor:
    """1/2 ||h_t - r(h_s)||^2, where the regressor r was applied to the student's already.

    Args:
        student: (N, ...) what the regressor makes of the student's layer.
        teacher: of the same shape, no gradient needed.
        mean: average over all numbers, so that its weight does not depend on the layer's size;
            False sums over each image and averages over the batch, as the paper's equation.

    Returns:
        Scalar >= 0; 0 where both agree.

    Raises:
        ValueError: the shapes differ.

    >>> fitnets(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]), mean=False).item()
    2.0
    """
    check_features(student, teacher, "all")
    total = (student - teacher).square().sum() / 2
    return total / (student.numel() if mean else len(student))
