"""Analytical clipping: from the spread of the values and the bits follows the best clip."""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from gracile.core.kinds import observer
from gracile.core.rules import one_of
from gracile.quantize.observers.counting import Counting, Histogram
from gracile.quantize.observers.rounding import grid_for, occupied, squared_error
from gracile.quantize.observers.three_sigma import moments

LAPLACE, GAUSS = "laplace", "gauss"
DISTRIBUTION = one_of("best", LAPLACE, GAUSS)


@observer("aciq", source="Banner et al. 2018, arXiv:1810.05723, section 4")
class Aciq(Counting):
    """[mean - a s, mean + a s]: s the spread of a Laplace or normal distribution, a by the bits.

    s is the mean absolute deviation (Laplace) or the standard deviation (normal); around zero where
    the grid is symmetric. Values that are all on one side of zero are taken for half of such a
    distribution, as behind a ReLU: s is that of the values that are not zero, and a is that of one
    bit more, since no level is spent on the other side. `best` takes that one of the two clips
    which has the smaller squared error on the values seen.

    Raises:
        ValueError: an unknown distribution.

    >>> round(clip_factor(4, "laplace"), 2), round(clip_factor(4, "gauss"), 2)
    (5.03, 2.56)
    """

    def __init__(self, *, distribution: str = "laplace"):
        if not DISTRIBUTION.fits(distribution):
            raise ValueError(f"distribution must be {DISTRIBUTION.text}, got {distribution!r}.")
        self.distribution = distribution

    def clipped(self, seen: Histogram, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The clip of the chosen distribution, or of the better one."""
        if self.distribution != "best":
            return self._of(self.distribution, seen, low, high)
        ways = [self._of(name, seen, low, high) for name in (LAPLACE, GAUSS)]
        errors = [
            squared_error(occupied(seen), grid_for(self, at.clamp(low, high), to.clamp(low, high)))
            for at, to in ways
        ]
        first = errors[0] <= errors[1]
        at_low, at_high = (torch.where(first, a, b) for a, b in zip(*ways, strict=True))
        return at_low, at_high

    def _of(self, name: str, seen: Histogram, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        mean, _ = moments(seen)
        half = (low >= 0) | (high <= 0)
        if self.signed and self.symmetric:
            half = torch.zeros_like(half)  # the levels below zero are there, used or not
        if self.symmetric:
            mean = torch.zeros_like(mean)
        mean = torch.where(half, 0.0, mean)
        count = seen.counts.sum(1)
        count = torch.where(half, count, count + seen.zeros).clamp(min=1)
        away = (seen.centers - mean[:, None]).abs()
        resting = torch.where(half, 0.0, seen.zeros)  # zeros that count, each |mean| away
        if name == LAPLACE:
            spread = ((seen.counts * away).sum(1) + resting * mean.abs()) / count
        else:
            spread = (((seen.counts * away**2).sum(1) + resting * mean**2) / count).sqrt()
        factor = torch.where(
            half, clip_factor(self.bits + 1, name), clip_factor(self.bits, name)
        ).to(spread)
        return mean - factor * spread, mean + factor * spread


@cache
def clip_factor(bits: int, distribution: str) -> float:
    """Clip over spread at which rounding and clipping together have the least squared error.

    With M bits between -a and a, rounding costs a^2 / (3 * 4^M). For a Laplace distribution of
    spread 1 clipping costs 2 e^-a, so the best a solves a e^a = 3 * 4^M (eq. 9 there, Lambert's W);
    for a normal one it solves 2 (phi(a) - a Q(a)) = a / (3 * 4^M), phi its density, Q its upper
    tail. Both sides cross once, and bisection finds where to the last digit.

    Args:
        bits: of a grid from -a to a.
        distribution: laplace or gauss.

    >>> [round(clip_factor(bits, "laplace"), 2) for bits in (2, 3, 4, 8)]
    [2.83, 3.9, 5.03, 9.9]
    """
    rounding = 3 * 4.0**bits
    slope: Callable[[float], float]  # falls; what a wider clip saves less what it costs
    if distribution == LAPLACE:
        slope = lambda a: rounding * math.exp(-a) - a  # noqa: E731
    else:
        slope = lambda a: 2 * (_density(a) - a * _tail(a)) - a / rounding  # noqa: E731
    low, high = 0.0, 64.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return low


def _density(a: float) -> float:
    return math.exp(-a * a / 2) / math.sqrt(2 * math.pi)


def _tail(a: float) -> float:
    return math.erfc(a / math.sqrt(2)) / 2
