"""Smallest and largest value ever seen: nothing of the calibration data is clipped."""

import torch
from torch import Tensor

from gracile.core.kinds import observer
from gracile.distribute.collective import all_reduce_max_, all_reduce_min_
from gracile.quantize.observers.base import Observer, ends


@observer("min_max", source="Krishnamoorthi 2018, arXiv:1806.08342, section 2.5 (weights)")
class MinMax(Observer):
    """The full range. Right for weights; one outlier costs resolution everywhere else.

    >>> o = MinMax()
    >>> o.observe(torch.tensor([0.0, 2.0]))
    >>> o.observe(torch.tensor([-1.0, 1.0]))
    >>> o.range()
    (tensor(-1.), tensor(2.))
    """

    def observe(self, x: Tensor) -> None:
        """Widen the range to x's ends."""
        low, high = ends(x, self.axis)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def sync(self) -> None:
        """The widest range of all ranks."""
        low, high = self.range()
        all_reduce_min_(low)
        all_reduce_max_(high)
