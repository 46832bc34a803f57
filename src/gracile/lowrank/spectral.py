"""Truncated singular value decompositions, in float64, with their signs fixed."""

import torch
from torch import Tensor


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best matrix of a rank: (..., m, r), the singular values (..., r), and (..., r, n).

    The largest element of each right vector is positive, so that equal weights give equal factors.

    Args:
        matrix: (..., m, n).
        rank: r, at most min(m, n).
    """
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    u, s, v = u[..., :rank], s[..., :rank], v[..., :rank, :]
    sign = signs(v, -1)
    return u * sign.unsqueeze(-2), s, v * sign.unsqueeze(-1)


def halves(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(..., m, r) and (..., r, n) whose product is the best one of this rank, of equal norms.

    >>> left, right = halves(torch.diag(torch.tensor([4.0, 1.0])), 1)
    >>> left.flatten().tolist(), right.flatten().tolist()
    ([2.0, 0.0], [2.0, 0.0])
    """
    u, s, v = truncated(matrix, rank)
    root = s.sqrt()
    return u * root.unsqueeze(-2), root.unsqueeze(-1) * v


def leading(matrix: Tensor, rank: int) -> Tensor:
    """(..., m, r): orthonormal left singular vectors, strongest first, also where r > n."""
    values = matrix.double()
    return strongest(values @ values.mT, rank)


def strongest(gram: Tensor, rank: int) -> Tensor:
    """(..., m, r): eigenvectors of the largest eigenvalues of a symmetric matrix, largest first."""
    _, vectors = torch.linalg.eigh(gram)  # ascending
    u: Tensor = vectors.flip(-1)[..., :rank]
    return u * signs(u, -2).unsqueeze(-2)


def signs(vectors: Tensor, dim: int) -> Tensor:
    """1 or -1 for each vector along `dim`: what makes its largest element positive."""
    largest = vectors.abs().argmax(dim, keepdim=True)
    sign: Tensor = torch.where(vectors.gather(dim, largest).squeeze(dim) < 0, -1.0, 1.0)
    return sign.to(vectors)


def square_root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R and its pseudo-inverse with R R^T = gram, of positive semidefinite matrices.

    Args:
        gram: (..., p, p); eigenvalues below 1e-12 of the largest count as zero.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    kept = values > 1e-12 * values[..., -1:]
    root = torch.where(kept, values, 0).sqrt()
    inverse = torch.where(kept, 1 / torch.where(kept, root, 1), 0)
    return vectors * root.unsqueeze(-2), inverse.unsqueeze(-1) * vectors.mT


def by_group(weight: Tensor, groups: int) -> Tensor:
    """(O, I, *k) -> (groups, O / groups, I, *k), in float64, without gradients."""
    weight = weight.detach().double()
    return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
