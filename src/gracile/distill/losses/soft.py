"""Soft targets: the student learns the teacher's whole distribution, not only its answer."""

import torch.nn.functional as F
from torch import Tensor

from gracile.core.kinds import kd_loss
from gracile.distill.pairs import check_pair


@kd_loss("soft", source="Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2")
def soft(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, t2: bool = True) -> Tensor:
    """T^2 * KL(softmax(teacher/T) || softmax(student/T)), averaged over the batch.

    Args:
        student: (N, C) logits.
        teacher: (N, C) logits, no gradient needed.
        temperature: T > 0; higher shows more of the small probabilities.
        t2: multiply by T^2, so that the gradient's size does not depend on T.

    Returns:
        Scalar >= 0 in nats; 0 where both agree.

    Raises:
        ValueError: the shapes differ or the temperature is not positive.

    >>> soft(torch.zeros(1, 2), torch.zeros(1, 2)).item()
    0.0
    """
    check_pair(student, teacher, temperature)
    p = F.log_softmax(student / temperature, dim=1)
    q = F.log_softmax(teacher / temperature, dim=1)
    kl = F.kl_div(p, q, reduction="batchmean", log_target=True)
    return kl * temperature**2 if t2 else kl
