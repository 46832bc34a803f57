"""What observers share that average over samples: ends of each sample, sums that ranks can add."""

from abc import abstractmethod

import torch
from torch import Tensor

from gracile.distribute.collective import all_reduce_sum_
from gracile.quantize.observers.base import Observer, rows


class SampleMean(Observer):
    """Base of observers whose range is the mean over samples of each sample's own range.

    Per tensor a sample is one index of dim 0, the batch. A tensor of less than two dims is one
    sample, and so is, per channel, all of what one `observe` shows.
    """

    saved = ("low", "high", "totals", "samples")

    totals: Tensor | None = None  # (2, 2, channels) float64: shared and of this rank; low and high
    samples: Tensor | None = None  # (2,) int64: shared and of this rank

    @abstractmethod
    def ends_of(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(low, high) of each row of (rows, values) float32, shape (rows,)."""

    def observe(self, x: Tensor) -> None:
        """Add the ends of x's samples."""
        split = self.axis is None and x.ndim > 1
        low, high = self.ends_of(rows(x, 0 if split else self.axis))
        n = len(low) if split else 1
        if self.totals is None or self.samples is None:
            channels = 1 if split else len(low)
            self.totals = torch.zeros(2, 2, channels, dtype=torch.float64, device=x.device)
            self.samples = torch.zeros(2, dtype=torch.int64, device=x.device)
        both = torch.stack([low, high]).double()
        self.totals[1] += both.sum(1, keepdim=True) if split else both
        self.samples[1] += n
        self._settle()

    def sync(self) -> None:
        """The mean over the samples of all ranks; each counts once, however often this is called.

        Raises:
            GracileError: as `range`.
        """
        self.range()
        assert self.totals is not None
        assert self.samples is not None
        for summed in (self.totals, self.samples):
            summed[0] += all_reduce_sum_(summed[1].clone())
            summed[1] = 0
        self._settle()

    def _settle(self) -> None:
        assert self.totals is not None
        assert self.samples is not None
        low, high = (self.totals.sum(0) / self.samples.sum()).float()
        self.low, self.high = (low, high) if self.axis is not None else (low[0], high[0])
