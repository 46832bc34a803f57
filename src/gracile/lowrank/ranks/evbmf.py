"""Ranks by empirical variational Bayes: as many components as stand out of the noise."""

from math import ceil, exp, log, sqrt

import torch
from torch import Tensor

from gracile.core.kinds import rank_rule
from gracile.errors import UserError
from gracile.lowrank.scheme import matrices
from gracile.nn.chain import Layer, Size

GRID = 64  # points the bracket of the noise is looked at before it is narrowed


@rank_rule(
    "evbmf",
    source="Nakajima et al. 2013, JMLR 14:1-37; weakening of Gusak et al. 2019 "
    "(MUSCO), arXiv:1903.09973",
)
def evbmf(
    weight: Tensor,
    layer: Layer,
    scheme: str,
    size: Size,
    *,
    weakening: float = 1.0,
    least: int = 8,
) -> tuple[int, ...]:
    """Ranks R = R_full - w (R_full - R_vb), R_vb by the analytic solution of variational Bayes.

    Of several matrices with one rank, those of groups or channels, the largest counts.

    Args:
        weight: (O, I / groups, *kernel).
        layer, scheme: what is factorized, and how.
        size: not looked at.
        weakening: w in [0, 1]; 1 takes the Bayesian rank, less keeps more.
        least: ranks are not below this, as far as the full ones go; variational Bayes may say 0.

    Raises:
        UserError: an option is out of range, or the scheme's ranks are not those of matrices.
    """
    if not 0 <= weakening <= 1 or least < 1:
        raise UserError(f"weakening must be in [0, 1] and least >= 1, got {weakening} and {least}.")
    found = []
    for batch in matrices(scheme, weight, layer):
        full = min(batch.shape[1:])
        bayes = max(evbmf_rank(matrix) for matrix in batch)
        wanted = ceil(full - weakening * (full - bayes) - 1e-9)
        found.append(min(max(wanted, least), full))
    return tuple(found)


def evbmf_rank(matrix: Tensor, variance: float | None = None) -> int:
    """Components that variational Bayes keeps of a low-rank matrix with white noise.

    With L <= M, a = L / M and tau = 2.5129 sqrt(a), a singular value is kept if it is above
    sqrt(M variance (1 + tau)(1 + a / tau)).

    Args:
        matrix: (m, n), either way round.
        variance: of the noise of each element; None minimizes the free energy over it.

    Returns:
        The rank; 0 if nothing stands out.
    """
    rows, columns = sorted(matrix.shape)
    values = torch.linalg.svdvals(matrix.detach().double())
    if float(values[0]) == 0.0:
        return 0
    if variance is None:
        variance = noise_variance(values, rows, columns)
    return int((values.square() > columns * variance * _threshold(rows / columns)).sum())


def noise_variance(values: Tensor, rows: int, columns: int) -> float:
    """The variance of the noise that minimizes the free energy, within its known bracket.

    Args:
        values: (rows,) all singular values, descending.
        rows, columns: of the matrix, rows <= columns.
    """
    power = values.square()
    a = rows / columns
    first = min(ceil(rows / (1 + a)) - 1, rows) - 1  # the last index that may be signal
    tail = power[first + 1 :]
    upper = float(power.sum()) / (rows * columns)
    lower = max(float(tail[0]) / (columns * _threshold(a)), float(tail.mean()) / columns)
    lower = max(lower, 1e-12 * upper)  # an exactly low-rank matrix has no noise at all
    if lower >= upper:
        return upper

    def energy(log_variance: float) -> float:
        return free_energy(exp(log_variance), values, rows, columns)

    # The energy has kinks where a value joins the signal, so look everywhere before narrowing.
    begin, end = log(lower), log(upper)
    grid = [begin + (end - begin) * i / GRID for i in range(GRID + 1)]
    best = min(range(GRID + 1), key=lambda i: energy(grid[i]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, GRID)]
    golden = (sqrt(5) - 1) / 2
    while high - low > 1e-9:
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if energy(left) <= energy(right) else (left, high)
    return exp((low + high) / 2)


def free_energy(variance: float, values: Tensor, rows: int, columns: int) -> float:
    """What variational Bayes minimizes over the noise, up to a factor and a constant.

    Args:
        variance: of the noise, > 0.
        values: (rows,) all singular values.
        rows, columns: of the matrix, rows <= columns.
    """
    a = rows / columns
    x = (values.square() / (columns * variance)).clamp(min=1e-300)
    signal = x > _threshold(a)
    noise, strong = x[~signal], x[signal]
    part = strong - (1 + a)
    tau = (part + (part.square() - 4 * a).sqrt()) / 2
    terms = strong - tau + ((tau + 1) / strong).log() + a * (tau / a + 1).log()
    return float((noise - noise.log()).sum() + terms.sum())


def _threshold(a: float) -> float:
    """Of values^2 / (M variance), for a matrix with L / M = a."""
    tau = 2.5129 * sqrt(a)
    return (1 + tau) * (1 + a / tau)
