"""Relational distillation: how images lie to each other, whatever the space they lie in."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gracile.core.kinds import feature_loss
from gracile.distill.pairs import check_features


@feature_loss("rkd", source="Park et al. 2019, arXiv:1904.05068, eq. 5-10", compares="images")
def rkd(student: Tensor, teacher: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Huber's loss of the distances of two images and of the angles at one between two others.

    Distances are in units of their mean in the batch. Averages go over pairs and triples of
    different images; the authors' program also counts an image with itself, where both terms are
    0, so ours are larger by N / (N - 1) and about (N / (N - 1))^2.

    Args:
        student: (N, ...) what a layer gives.
        teacher: (N, ...) of any other size, no gradient needed.
        distance: weight of the distances; a batch of one image has none.
        angle: weight of the angles; a batch of two images has none.

    Returns:
        Scalar >= 0; 0 where one is the other moved, turned, mirrored or scaled.

    Raises:
        ValueError: the shapes cannot be compared, or a weight is negative.

    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(rkd(x, 3 * x + 1).item(), 5)
    0.0
    """
    check_features(student, teacher, "images")
    if distance < 0 or angle < 0:
        raise ValueError(f"distance and angle must be >= 0, got {distance} and {angle}.")
    (ds, s), (dt, t) = _distances(student), _distances(teacher)
    n = len(student)
    apart = ~torch.eye(n, dtype=torch.bool, device=student.device)
    total = (student * 0).sum().float()
    if distance and n > 1:
        means = [d[apart].mean().clamp_min(_TINY) for d in (ds, dt)]
        total = total + distance * F.smooth_l1_loss((ds / means[0])[apart], (dt / means[1])[apart])
    if angle and n > 2:
        different = apart[:, :, None] & apart[:, None, :] & apart[None, :, :]
        wanted, got = _cosines(dt, t)[different], _cosines(ds, s)[different]
        total = total + angle * F.smooth_l1_loss(got, wanted)
    return total


_TINY = 1e-12


def _distances(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, N) distances, and (N, N) products of the images seen from their middle."""
    flat = x.flatten(1).float()
    flat = flat - flat.mean(0)
    products = flat @ flat.T
    squares = products.diagonal()
    between = (squares[:, None] + squares[None, :] - 2 * products).clamp_min(0)
    some = between > _TINY
    return torch.where(some, between.where(some, between.new_ones(())).sqrt(), 0.0), products


def _cosines(distances: Tensor, products: Tensor) -> Tensor:
    """(N, N, N): cosine of the angle at image j between i and k, as [j, i, k].

    <x_i - x_j, x_k - x_j> from products alone: (N, N, width) differences need not be made.
    """
    n = len(products)
    inner = (
        products[None, :, :]
        - products[:, :, None]
        - products[:, None, :]
        + products.diagonal().view(n, 1, 1)
    )
    lengths = distances[:, :, None] * distances[:, None, :]
    there = lengths > _TINY
    return torch.where(there, inner / lengths.where(there, lengths.new_ones(())), 0.0)
