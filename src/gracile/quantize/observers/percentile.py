"""Percentiles of all values seen: rare outliers are clipped so that the rest gets finer steps."""

from torch import Tensor

from gracile.core.kinds import observer
from gracile.quantize.observers.counting import HALF, Counting, Histogram, quantile


@observer("percentile", source="Wu et al. 2020, arXiv:2004.09602, section 3.3; each tail alone")
class Percentile(Counting):
    """[the (100 - q)-th, the q-th percentile]: at most (100 - q) % of the values beyond each end.

    The percentiles are read from a histogram of bounded memory, off by at most 1/2048 of the
    largest magnitude; q = 100 is `min_max` exactly.

    Raises:
        ValueError: q outside (50, 100].

    >>> o = Percentile(q=90)
    >>> o.observe(torch.arange(101.0))
    >>> [round(float(v)) for v in o.range()]
    [10, 90]
    """

    def __init__(self, *, q: float = 99.99):
        self.q = checked_percent(q)

    def clipped(self, seen: Histogram, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The two percentiles."""
        if self.q == 100:
            return low, high
        counts = seen.counts.clone()
        counts[:, HALF] += seen.zeros
        share = 1 - self.q / 100
        below = quantile(counts, share) - HALF
        above = HALF - quantile(counts.flip(1), share)
        return below * seen.width, above * seen.width


def checked_percent(q: float) -> float:
    """q if it is a percentile of the upper tail.

    Raises:
        ValueError: q outside (50, 100].
    """
    if not 50 < q <= 100:
        raise ValueError(f"q must be in (50, 100] percent, got {q}; 99.99 is usual.")
    return q
