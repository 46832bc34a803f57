"""Attention transfer: the student looks at the places of an image that its teacher looks at."""

import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm

from gracile.core.kinds import feature_loss
from gracile.distill.pairs import check_features


@feature_loss(
    "at",
    source="Zagoruyko & Komodakis 2017, arXiv:1612.03928, eq. 2, p = 2",
    compares="positions",
)
def at(student: Tensor, teacher: Tensor, *, beta: float = 1e3, squared: bool = False) -> Tensor:
    """beta/2 || Q_s/||Q_s|| - Q_t/||Q_t|| ||_2 with Q = vec(sum over channels of A^2).

    As in the paper's section 4.1, beta is divided by the number of positions and of images.

    Args:
        student: (N, C, H, W) or (N, C, L) what a layer gives.
        teacher: the same but for C, no gradient needed.
        beta: weight of the term.
        squared: the square of the norm, as the authors' program has it.

    Returns:
        Scalar >= 0; 0 where both attend to the same places.

    Raises:
        ValueError: the shapes cannot be compared.

    >>> a = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    >>> round(at(*a, beta=2.0).item(), 4)  # sqrt(2) / 2 positions
    0.7071
    """
    check_features(student, teacher, "positions")
    difference = attention(student) - attention(teacher)
    distance = difference.square().sum(1) if squared else vector_norm(difference, dim=1)
    return beta / 2 * distance.mean() / difference.shape[1]


def attention(x: Tensor) -> Tensor:
    """(N, C, ...) -> (N, positions): energy over the channels, each image's of norm 1."""
    return F.normalize(x.float().square().sum(1).flatten(1), dim=1)
