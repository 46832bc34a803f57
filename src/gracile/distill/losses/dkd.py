"""Decoupled distillation: the answer and the rest of the distribution are taught apart."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gracile.core.kinds import kd_loss
from gracile.distill.pairs import check_labels, check_pair


@kd_loss("dkd", source="Zhao et al. 2022, arXiv:2203.08679, eq. 7", needs=("labels",))
def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    t2: bool = True,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """T^2 (alpha * TCKD + beta * NCKD), averaged over the batch.

    TCKD is the divergence of (p_y, 1 - p_y), NCKD that of the distributions over all classes but y.
    `soft` is TCKD + (1 - p_y) NCKD with the teacher's p_y: where the teacher is sure, what it says
    about the other classes hardly counts there.

    Args:
        student: (N, C) logits, C >= 2.
        teacher: (N, C) logits, no gradient needed.
        labels: (N,) the classes y, whole numbers.
        temperature: T > 0 of both distributions.
        t2: multiply by T^2, so that the gradient's size does not depend on T.
        alpha: weight of TCKD.
        beta: weight of NCKD.

    Returns:
        Scalar >= 0 in nats; 0 where both agree.

    Raises:
        ValueError: the shapes differ, the temperature is not positive, or the labels are no classes
            of these logits.

    >>> dkd(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([1])).item()
    0.0
    """
    check_pair(student, teacher, temperature)
    check_labels(labels, student)
    s, t = student / temperature, teacher / temperature
    answers = _divergence(_answer(s, labels), _answer(t, labels))
    rest = _divergence(
        F.log_softmax(_others(s, labels), dim=1), F.log_softmax(_others(t, labels), dim=1)
    )
    loss = alpha * answers + beta * rest
    return loss * temperature**2 if t2 else loss


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _answer(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, 2): log p_y and log (1 - p_y)."""
    whole = logits.logsumexp(1, keepdim=True)
    others = _others(logits, labels).logsumexp(1, keepdim=True)
    return torch.cat([logits.gather(1, labels[:, None]), others], dim=1) - whole


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, C - 1): the logits of all classes but y."""
    keep = torch.ones_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], False)
    return logits[keep].view(len(logits), -1)
