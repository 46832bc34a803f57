"""Denil's prediction of parameters: a few weights of each output say what the others are.

What an output reads has a structure known beforehand: neighbouring pixels have similar weights, or
inputs that vary together. A kernel over the inputs then predicts all weights of an output from
those at a few of them; the prediction is a fixed matrix, and only those few are learned.
"""

from math import isqrt, prod

import torch
from torch import Tensor

from gracile.core.kinds import factorizer
from gracile.errors import UserError
from gracile.lowrank.factorizers.svd import svd_chain, svd_matrices, two_factors
from gracile.lowrank.reconstruct import grams_of
from gracile.nn.chain import Layer

SOURCE = "Denil et al. 2013, arXiv:1306.0543"
FITS = ("entries", "least_squares")


def _full(layer: Layer) -> tuple[int]:
    return (layer.inputs // layer.groups * layer.area,)


@factorizer(
    "denil",
    source=SOURCE + " (squared exponential kernel)",
    ranks=("locations",),
    full=_full,
    chain=svd_chain,
    needs=("generator",),
    fixed=(0,),
)
def denil(
    weight: Tensor,
    groups: int,
    ranks: tuple[int, ...],
    generator: torch.Generator,
    *,
    width: float = 1.0,
    ridge: float = 1e-3,
    grid: tuple[int, ...] = (),
    fit: str = "entries",
) -> tuple[Tensor, ...]:
    """W = V U, U = (K_aa + ridge I)^-1 K_a from pixel coordinates, V the weights at places a.

    k(i, j) = exp(-||i - j||^2 / 2 width^2) for pixels of one channel, 0 between channels. U stays
    fixed in training; V, a share of all weights, is learned.

    Args:
        weight: (O, I / groups, *kernel).
        groups: of the layer.
        ranks: (n,), places of each group.
        generator: draws the places.
        width: of the kernel, in pixels.
        ridge: noise assumed in the weights at the places, relative to the kernel's 1.
        grid: sizes of the image a linear layer reads, channel by channel; by default the kernel's
            for a convolution, else a square if the inputs fill one, else a line.
        fit: entries (V is the weight at the places, as in the paper) or least_squares (V brings
            the product closest to a trained weight).

    Returns:
        U as (n x groups, I / groups, *kernel) and V as (O, n, 1...).

    Raises:
        UserError: the grid does not divide the inputs, or an unknown `fit`.
    """
    (matrix,) = svd_matrices(weight, groups)
    kernel = coordinate_kernel(matrix.shape[-1], _grid(weight, tuple(grid)), width)
    kernel = kernel.to(matrix.device).expand(groups, -1, -1)
    return _predict(weight, matrix, kernel, ranks[0], generator, ridge, fit)


@factorizer(
    "denil_data",
    source=SOURCE + " (empirical covariance as kernel)",
    ranks=("locations",),
    full=_full,
    chain=svd_chain,
    needs=("gram", "generator"),
    fixed=(0,),
)
def denil_data(
    weight: Tensor,
    groups: int,
    ranks: tuple[int, ...],
    gram: Tensor,
    generator: torch.Generator,
    *,
    ridge: float = 1e-3,
    fit: str = "entries",
) -> tuple[Tensor, ...]:
    """As `denil`, with the covariance of the inputs as kernel: for inputs that are no image.

    Args:
        weight, groups, ranks, generator, fit: see `denil`.
        gram: (groups, P, P) or (P, P), sum or mean of x x^T.
        ridge: relative to the mean of the kernel's diagonal.

    Returns:
        As `denil`.

    Raises:
        UserError: the Gram matrix has another shape, or an unknown `fit`.
    """
    (matrix,) = svd_matrices(weight, groups)
    kernel = grams_of(gram, groups, matrix.shape[-1])
    mean = kernel.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    kernel = kernel / torch.where(mean > 0, mean, 1.0)
    return _predict(weight, matrix, kernel, ranks[0], generator, ridge, fit)


def coordinate_kernel(inputs: int, grid: tuple[int, ...], width: float) -> Tensor:
    """(inputs, inputs) squared exponential of the pixels' distances, 0 between channels.

    >>> coordinate_kernel(2, (2,), 1.0)[0, 1].item()  # exp(-1/2)
    0.6065306597126334

    Raises:
        UserError: the grid does not divide the inputs, or the width is not positive.
    """
    pixels = prod(grid)
    if pixels < 1 or inputs % pixels:
        raise UserError(f"a grid {grid} has {pixels} pixels, which do not divide {inputs} inputs.")
    if width <= 0:
        raise UserError(f"width must be > 0, got {width}.")
    axes = [torch.arange(n, dtype=torch.float64) for n in grid]
    places = torch.cartesian_prod(*axes).reshape(pixels, -1)
    apart = (places.unsqueeze(0) - places.unsqueeze(1)).square().sum(-1)
    one = torch.exp(-apart / (2 * width**2))
    return torch.kron(torch.eye(inputs // pixels, dtype=torch.float64), one)


def _grid(weight: Tensor, grid: tuple[int, ...]) -> tuple[int, ...]:
    if grid:
        return grid
    if weight.ndim > 2:
        return tuple(weight.shape[2:])
    side = isqrt(weight.shape[1])
    return (side, side) if side * side == weight.shape[1] else (weight.shape[1],)


def _predict(
    weight: Tensor,
    matrix: Tensor,
    kernel: Tensor,
    places: int,
    generator: torch.Generator,
    ridge: float,
    fit: str,
) -> tuple[Tensor, Tensor]:
    if fit not in FITS:
        raise UserError(f"fit must be one of {', '.join(FITS)}, got '{fit}'.")
    chosen = torch.randperm(matrix.shape[-1], generator=generator)[:places].sort().values
    chosen = chosen.to(matrix.device)
    eye = torch.eye(places, dtype=matrix.dtype, device=matrix.device)
    rows = kernel[:, chosen]  # (G, n, P)
    fixed = torch.linalg.solve(rows[:, :, chosen] + ridge * eye, rows)
    if fit == "entries":
        learned = matrix[:, :, chosen]
    else:
        learned = torch.linalg.lstsq(fixed.mT, matrix.mT).solution.mT
    return two_factors(weight, learned, fixed)
