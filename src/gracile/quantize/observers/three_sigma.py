"""The middle of the values and a number of spreads to both sides, robust or by the variance."""

import torch
from torch import Tensor

from gracile.core.kinds import observer
from gracile.core.rules import number, one_of
from gracile.quantize.observers.counting import HALF, Counting, Histogram, quantile

SIGMA_OF_MAD = 1.4826  # standard deviation of a normal distribution whose MAD is 1
SPREAD, N = one_of("mad", "std"), number(0, above=True)


@observer("three_sigma", source="NNCF's threesigma and Distiller's N_STD clipping, in their words")
class ThreeSigma(Counting):
    """[middle - n spreads, middle + n spreads], nothing beyond the values seen.

    With spread `mad` the median and 1.4826 times the median absolute deviation from it, neither of
    which an outlier moves; values that are exactly zero, of a ReLU or pruned, do not count. With
    `std` mean and standard deviation of all values.

    Raises:
        ValueError: n not above 0, or an unknown spread.

    >>> o = ThreeSigma(n=1, spread="std")
    >>> o.observe(torch.tensor([-3.0, -1.0, 1.0, 3.0]))
    >>> [round(float(v), 2) for v in o.range()]
    [-2.24, 2.24]
    """

    def __init__(self, *, n: float = 3.0, spread: str = "mad"):
        for key, value, rule in (("n", n, N), ("spread", spread, SPREAD)):
            if not rule.fits(value):
                raise ValueError(f"{key} must be {rule.text}, got {value!r}.")
        self.n, self.spread = n, spread

    def clipped(self, seen: Histogram, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Middle and spread of the histogram."""
        middle, spread = moments(seen) if self.spread == "std" else _robust(seen)
        return middle - self.n * spread, middle + self.n * spread


def moments(seen: Histogram) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of all values, (channels,)."""
    n = seen.counts.sum(1) + seen.zeros
    mean = (seen.counts @ seen.centers) / n
    return mean, ((seen.counts @ seen.centers**2) / n - mean**2).clamp(min=0).sqrt()


def _robust(seen: Histogram) -> tuple[Tensor, Tensor]:
    """Median and scaled median absolute deviation of what is not zero."""
    median = (quantile(seen.counts, 0.5) - HALF) * seen.width
    distance, order = (seen.centers - median[:, None]).abs().sort(1)
    half = seen.counts.sum(1, keepdim=True) / 2
    at = (seen.counts.gather(1, order).cumsum(1) < half).sum(1, keepdim=True)
    spread = distance.gather(1, at.clamp(max=distance.shape[1] - 1)).squeeze(1)
    nothing = half.squeeze(1) == 0
    return torch.where(nothing, 0.0, median), torch.where(nothing, 0.0, SIGMA_OF_MAD * spread)
