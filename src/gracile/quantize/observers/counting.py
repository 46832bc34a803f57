"""What observers share that look at the distribution of all values: counts in bins, merged exactly.

The idea of bins that double is ours: any order of batches, and any number of ranks, gives the same
counts, as histograms whose range is stretched and interpolated do not.
"""

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from gracile.distribute.collective import all_reduce_max_, all_reduce_min_, all_reduce_sum_
from gracile.quantize.observers.base import Observer, ends, rows

BINS = 8192  # half of them below zero: a bin is at most 1/2048 of the largest magnitude
HALF = BINS // 2  # the first bin that is not below zero


class Histogram(NamedTuple):
    """Counts of all ranks.

    Attributes:
        counts: values that are not exactly zero, (channels, BINS) float64.
        zeros: values that are, (channels,) float64: of ReLU, of pruning. They are on every grid.
        width: of a bin; bin k covers [(k - HALF) * width, (k + 1 - HALF) * width).
    """

    counts: Tensor
    zeros: Tensor
    width: float

    @property
    def centers(self) -> Tensor:
        """Middle of each bin, (BINS,) float64."""
        bins = torch.arange(BINS, dtype=torch.float64, device=self.counts.device)
        return (bins - HALF + 0.5) * self.width


class Counting(Observer):
    """Base of observers whose range follows from a histogram.

    Memory is bounded: values are counted in 8192 bins whose width is a power of two and doubles,
    merging neighbours exactly, when a larger magnitude comes. Within a bin values count as evenly
    spread, so an end is off by at most one bin (1/2048 of the largest magnitude), and no end lies
    beyond the values seen. Channels share the width of the bins.

    Subclasses say in `clipped` which range they want.
    """

    saved = ("low", "high", "exponent", "counts", "zeros")

    exponent: Tensor | None = None  # bin width is 2^exponent, int32, shape ()
    counts: Tensor | None = None  # (2, channels, BINS) int64: shared by all ranks, and of this rank
    zeros: Tensor | None = None  # (2, channels) int64: how many of the counts are exactly zero

    @abstractmethod
    def clipped(self, seen: Histogram, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The wanted range; it is cut to what was seen.

        Args:
            seen: all values.
            low, high: smallest and largest of them, (channels,) float64.
        """

    def observe(self, x: Tensor) -> None:
        """Count x's values."""
        low, high = ends(x, self.axis)
        values = rows(x, self.axis)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        largest = torch.maximum(self.low.abs().max(), self.high.abs().max()).item()
        if not math.isfinite(largest):
            return  # range() says so
        n = len(values)
        if self.counts is None or self.zeros is None:
            self.counts = torch.zeros(2, n, BINS, dtype=torch.int64, device=x.device)
            self.zeros = torch.zeros(2, n, dtype=torch.int64, device=x.device)
        self._widen(_exponent_for(largest))
        assert self.exponent is not None
        bins = torch.floor(torch.ldexp(values, -self.exponent)).long() + HALF
        bins = bins.clamp_(0, BINS - 1) + BINS * torch.arange(n, device=x.device)[:, None]
        self.counts[1] += torch.bincount(bins.reshape(-1), minlength=BINS * n).reshape(n, BINS)
        self.zeros[1] += (values == 0).sum(1)

    def sync(self) -> None:
        """Add up the counts of all ranks; each value counts once however often this is called."""
        low, high = super().range()
        assert self.counts is not None
        assert self.zeros is not None
        assert self.exponent is not None
        all_reduce_min_(low)
        all_reduce_max_(high)
        self._widen(int(all_reduce_max_(self.exponent.clone())))
        for counted in (self.counts, self.zeros):
            counted[0] += all_reduce_sum_(counted[1].clone())
            counted[1] = 0

    def range(self) -> tuple[Tensor, Tensor]:
        """What the subclass wants of the values seen; see `Observer.range`."""
        low, high = super().range()
        found = self.clipped(self.histogram(), low.reshape(-1).double(), high.reshape(-1).double())
        at_low, at_high = (end.float().reshape(low.shape) for end in found)
        return at_low.clamp(low, high), at_high.clamp(low, high)

    def histogram(self) -> Histogram:
        """All values so far; something must have been observed."""
        assert self.counts is not None
        assert self.zeros is not None
        assert self.exponent is not None
        zeros = self.zeros.sum(0).double()
        counts = self.counts.sum(0).double()
        counts[:, HALF] -= zeros
        return Histogram(counts, zeros, 2.0 ** int(self.exponent))

    def _widen(self, exponent: int) -> None:
        assert self.counts is not None
        if self.exponent is None:
            self.exponent = torch.tensor(exponent, dtype=torch.int32, device=self.counts.device)
        for _ in range(exponent - int(self.exponent)):
            merged = self.counts.unflatten(-1, (HALF, 2)).sum(-1)  # (2, channels, BINS / 2)
            self.counts = torch.zeros_like(self.counts)
            self.counts[..., HALF // 2 : HALF // 2 + HALF] = merged
        self.exponent.fill_(max(exponent, int(self.exponent)))


def quantile(counts: Tensor, share: float) -> Tensor:
    """Position (in bins, from the left edge) below which `share` of each row's counts lie.

    Args:
        counts: (channels, bins), >= 0.
        share: in [0, 1].

    >>> quantile(torch.tensor([[1.0, 1.0, 2.0]]), 0.75)
    tensor([2.5000], dtype=torch.float64)
    """
    counts = counts.double()
    target = counts.sum(1, keepdim=True) * share
    upto = counts.cumsum(1)
    at = (upto < target).sum(1, keepdim=True).clamp(max=counts.shape[1] - 1)  # first to reach it
    inside = counts.gather(1, at)
    before = upto.gather(1, at) - inside
    return (at + (target - before) / inside.clamp(min=1)).squeeze(1)


def _exponent_for(largest: float) -> int:
    """Smallest width 2^e for which [-largest, largest] fits the bins."""
    if largest < 2.0**-110:
        return -122
    return math.frexp(largest)[1] - int(math.log2(HALF))
