"""Percentiles of all values seen: rare outliers are clipped so that the rest gets finer steps."""

import math

import torch
from torch import Tensor

from gracile.core.kinds import observer
from gracile.distribute.collective import all_reduce_max_, all_reduce_min_, all_reduce_sum_
from gracile.quantize.observers.base import Observer, ends

BINS = 8192  # half of them below zero: a bin is at most 1/2048 of the largest magnitude


@observer("percentile", source="Wu et al. 2020, arXiv:2004.09602, section 3.3; each tail alone")
class Percentile(Observer):
    """[the (100 - q)-th, the q-th percentile]: at most (100 - q) % of the values beyond each end.

    Memory is bounded: values are counted in 8192 bins whose width is a power of two and doubles,
    merging neighbours exactly, when a larger magnitude comes. Within a bin values count as evenly
    spread, so an end is off by at most one bin (1/2048 of the largest magnitude), and no end lies
    beyond the values seen; q = 100 is `min_max` exactly.

    Raises:
        ValueError: q outside (50, 100].

    >>> o = Percentile(q=90)
    >>> o.observe(torch.arange(101.0))
    >>> [round(float(v)) for v in o.range()]
    [10, 90]
    """

    saved = ("low", "high", "exponent", "counts")

    exponent: Tensor | None = None  # bin width is 2^exponent, int32, shape ()
    counts: Tensor | None = None  # (2, channels, BINS) int64: shared by all ranks, and of this rank

    def __init__(self, *, q: float = 99.99):
        if not 50 < q <= 100:
            raise ValueError(f"q must be in (50, 100] percent, got {q}; 99.99 is usual.")
        self.q = q

    def observe(self, x: Tensor) -> None:
        """Count x's values."""
        low, high = ends(x, self.axis)
        rows = _rows(x, self.axis)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        largest = torch.maximum(self.low.abs().max(), self.high.abs().max()).item()
        if not math.isfinite(largest):
            return  # range() says so
        if self.counts is None:
            self.counts = torch.zeros(2, len(rows), BINS, dtype=torch.int64, device=x.device)
        self._widen(_exponent_for(largest))
        assert self.exponent is not None
        bins = torch.floor(torch.ldexp(rows, -self.exponent)).long() + BINS // 2
        bins = bins.clamp_(0, BINS - 1) + BINS * torch.arange(len(rows), device=x.device)[:, None]
        found = torch.bincount(bins.reshape(-1), minlength=BINS * len(rows))
        self.counts[1] += found.reshape(len(rows), BINS)

    def sync(self) -> None:
        """Add up the counts of all ranks; each value counts once however often this is called."""
        low, high = super().range()
        assert self.counts is not None
        assert self.exponent is not None
        all_reduce_min_(low)
        all_reduce_max_(high)
        self._widen(int(all_reduce_max_(self.exponent.clone())))
        self.counts[0] += all_reduce_sum_(self.counts[1].clone())
        self.counts[1] = 0

    def range(self) -> tuple[Tensor, Tensor]:
        """The two percentiles; see `Observer.range`."""
        low, high = super().range()
        if self.q == 100:
            return low, high
        assert self.counts is not None
        assert self.exponent is not None
        share = 1 - self.q / 100
        counts = self.counts.sum(0)
        width = 2.0 ** int(self.exponent)
        below = _quantile(counts, share) - BINS // 2
        above = BINS // 2 - _quantile(counts.flip(1), share)
        at_low = (below * width).float().reshape(low.shape)
        at_high = (above * width).float().reshape(low.shape)
        return at_low.clamp(low, high), at_high.clamp(low, high)

    def _widen(self, exponent: int) -> None:
        assert self.counts is not None
        if self.exponent is None:
            self.exponent = torch.tensor(exponent, dtype=torch.int32, device=self.counts.device)
        half = BINS // 2
        for _ in range(exponent - int(self.exponent)):
            merged = self.counts.unflatten(-1, (half, 2)).sum(-1)  # (2, channels, BINS / 2)
            self.counts = torch.zeros_like(self.counts)
            self.counts[..., half // 2 : half // 2 + half] = merged
        self.exponent.fill_(max(exponent, int(self.exponent)))


def _rows(x: Tensor, axis: int | None) -> Tensor:
    x = x.detach().float()
    return x.reshape(1, -1) if axis is None else x.transpose(0, axis).flatten(1)


def _exponent_for(largest: float) -> int:
    """Smallest width 2^e for which [-largest, largest] fits the bins."""
    if largest < 2.0**-110:
        return -122
    return math.frexp(largest)[1] - int(math.log2(BINS // 2))


def _quantile(counts: Tensor, share: float) -> Tensor:
    """Position (in bins, from the left edge) below which `share` of each row's counts lie."""
    target = counts.sum(1, keepdim=True).double() * share
    upto = counts.cumsum(1).double()
    at = (upto < target).sum(1, keepdim=True).clamp(max=BINS - 1)  # first bin that reaches it
    inside = counts.gather(1, at).double().clamp(min=1)
    before = upto.gather(1, at) - counts.gather(1, at)
    return (at + (target - before) / inside).squeeze(1)
