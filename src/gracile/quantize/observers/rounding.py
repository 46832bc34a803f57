"""What a grid costs: the squared error of putting the values of a histogram on it."""

from typing import NamedTuple

import torch
from torch import Tensor

from gracile.quantize.affine import qrange
from gracile.quantize.observers.base import Observer
from gracile.quantize.observers.counting import Histogram


class Grid(NamedTuple):
    """Multiples of a step from `first` to `last`, each (channels, 1) float64."""

    step: Tensor
    first: Tensor
    last: Tensor


def grid_for(o: Observer, low: Tensor, high: Tensor) -> Grid:
    """The grid that a range leads to, as `affine` makes it.

    Args:
        o: its bits, signed, symmetric and narrow are read.
        low, high: (channels,), the range; zero is put into it.
    """
    low, high = low.clamp(max=0)[:, None], high.clamp(min=0)[:, None]
    if o.symmetric:
        qmin, qmax = qrange(o.bits, o.signed, o.narrow)
        step = torch.maximum(high / qmax, low / qmin) if qmin else high / qmax
        first = torch.full_like(step, qmin)
    else:
        qmin, qmax = qrange(o.bits, False)
        step = (high - low) / qmax
        first = torch.round(low / torch.where(step > 0, step, 1))
    return Grid(torch.where(step > 0, step, 1.0), first, first + qmax - qmin)


class Occupied(NamedTuple):
    """The bins that hold something; the others cost time and nothing else.

    Attributes:
        counts: (channels, bins) float64.
        left: lower edge of each bin, (bins,) float64.
        width: of a bin.
    """

    counts: Tensor
    left: Tensor
    width: float


def occupied(seen: Histogram) -> Occupied:
    """The bins in which any channel has values that are not zero."""
    some = (seen.counts > 0).any(0)
    return Occupied(seen.counts[:, some], (seen.centers - seen.width / 2)[some], seen.width)


def squared_error(seen: Occupied, grid: Grid) -> Tensor:
    """Sum over all values of (value - its nearest grid point)^2, (channels,) float64.

    Values count as evenly spread within their bin, and the integral over it is exact: with
    k = round(x / step) cut to the grid, an antiderivative is k step^3 / 12 + (x - k step)^3 / 3.
    Zeros are on the grid and cost nothing.
    """
    to_left = _antiderivative(seen.left, grid)
    to_right = _antiderivative(seen.left + seen.width, grid)
    return (seen.counts * (to_right - to_left)).sum(1) / seen.width


def _antiderivative(x: Tensor, grid: Grid) -> Tensor:
    k = torch.clamp(torch.round(x / grid.step), grid.first, grid.last)
    off = x - k * grid.step
    return k * (grid.step**3 / 12) + off * off * off / 3
