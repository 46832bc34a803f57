"""Truncated singular value decomposition where inputs are: errors weigh as much as data show them.

What a layer gives matters, not its weight. With the Gram matrix of what it reads, the best matrix
of a rank is known in closed form, both for its own responses and for given ones.
"""

import torch
from torch import Tensor

from gracile.core.kinds import factorizer
from gracile.lowrank.factorizers.svd import svd_chain, svd_full, svd_matrices, two_factors
from gracile.lowrank.reconstruct import grams_of
from gracile.lowrank.spectral import square_root, strongest


@factorizer(
    "svd_data",
    source="Denton et al. 2014, arXiv:1404.0736 (data covariance metric)",
    ranks=("rank",),
    full=svd_full,
    chain=svd_chain,
    matrices=svd_matrices,
    needs=("gram",),
)
def svd_data(
    weight: Tensor, groups: int, ranks: tuple[int, ...], gram: Tensor, *, ridge: float = 1e-6
) -> tuple[Tensor, ...]:
    """The matrix of rank r with the least sum of ||(W - W_r) x||^2 over the inputs.

    W_r = U U^T W with U the leading left singular vectors of W C^1/2; C needs no inverse.

    Args:
        weight: (O, I / groups, *kernel).
        groups: of the layer.
        ranks: (r,), of each group.
        gram: (groups, P, P) or (P, P), sum or mean of x x^T, P = I / groups x kernel in the order
            of the weight (that of `torch.nn.functional.unfold`).
        ridge: share of the mean eigenvalue added to all, as if inputs had that much white noise.

    Returns:
        The factors of `svd`'s chain.

    Raises:
        UserError: the Gram matrix has another shape.
    """
    (matrix,) = svd_matrices(weight, groups)
    return _cut(weight, matrix, _with_ridge(gram, matrix, ridge), ranks[0])


@factorizer(
    "svd_response",
    source="Zhang et al. 2015, arXiv:1411.4229 (asymmetric, linear case)",
    ranks=("rank",),
    full=svd_full,
    chain=svd_chain,
    matrices=svd_matrices,
    needs=("gram", "cross"),
)
def svd_response(
    weight: Tensor,
    groups: int,
    ranks: tuple[int, ...],
    gram: Tensor,
    cross: Tensor,
    *,
    ridge: float = 1e-6,
) -> tuple[Tensor, ...]:
    """The matrix of rank r with the least sum of ||y - W_r x||^2, whatever y should be.

    With x from the network factorized so far and y from the original one, a layer makes up for
    those before it: least squares first, then as `svd_data`.

    Args:
        weight, groups, ranks, gram: see `svd_data`.
        cross: (groups, P, O / groups) or (P, O), sum (or mean, like gram) of x y^T.
        ridge: share of the mean eigenvalue, on the change of the weight and in the cut.

    Returns:
        The factors of `svd`'s chain.

    Raises:
        UserError: the Gram matrix has another shape.
    """
    (matrix,) = svd_matrices(weight, groups)
    plain = grams_of(gram, groups, matrix.shape[-1])
    ridged = _with_ridge(plain, matrix, ridge)
    wanted = cross.detach().double().reshape(matrix.mT.shape)
    change = torch.linalg.solve(ridged, wanted - plain @ matrix.mT).mT
    return _cut(weight, matrix + change, ridged, ranks[0])


def whitened(weight: Tensor, groups: int, gram: Tensor, *, ridge: float = 1e-6) -> Tensor:
    """W C^1/2 in the weight's shape: its singular values are those of responses.

    For rank rules that look at singular values, in place of the weight.

    Args:
        weight, groups, gram, ridge: see `svd_data`.
    """
    (matrix,) = svd_matrices(weight, groups)
    root, _ = square_root(_with_ridge(gram, matrix, ridge))
    return (matrix @ root).reshape(weight.shape)


def _with_ridge(gram: Tensor, matrix: Tensor, ridge: float) -> Tensor:
    size = matrix.shape[-1]
    found = grams_of(gram, len(matrix), size)
    mean = found.diagonal(dim1=1, dim2=2).mean(1)
    mean = torch.where(mean > 0, mean, 1.0)  # inputs that are always 0: any metric will do
    eye = torch.eye(size, dtype=found.dtype, device=found.device)
    return found + (ridge * mean)[:, None, None] * eye


def _cut(weight: Tensor, matrix: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    responses: Tensor = matrix @ gram @ matrix.mT  # (G, O / G, O / G), far smaller than the Gram's
    left = strongest(responses, rank)
    right = left.mT @ matrix
    size = right.norm(dim=-1).sqrt()
    size = torch.where(size > 0, size, 1.0)
    return two_factors(weight, left * size.unsqueeze(-2), right / size.unsqueeze(-1))
