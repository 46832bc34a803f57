"""Squared difference: the student's outputs are pulled to the teacher's, number by number."""

import torch.nn.functional as F
from torch import Tensor

from gracile.core.kinds import kd_loss
from gracile.distill.pairs import check_pair


@kd_loss(
    "mse",
    source="NNCF, knowledge distillation of type mse; Ba & Caruana 2014, 1312.6184",
    mean="logits",
)
def mse(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, t2: bool = True) -> Tensor:
    """Mean squared difference of the outputs, both divided by the temperature.

    Args:
        student: outputs of any shape.
        teacher: of the same shape, no gradient needed.
        temperature: T > 0.
        t2: multiply by T^2, which takes the temperature out again.

    Returns:
        Scalar >= 0; 0 where both agree.

    Raises:
        ValueError: the shapes differ or the temperature is not positive.

    >>> mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).item()
    2.0
    """
    check_pair(student, teacher, temperature)
    scale = 1.0 if t2 else 1 / temperature**2
    return F.mse_loss(student, teacher) * scale
