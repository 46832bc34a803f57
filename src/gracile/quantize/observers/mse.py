"""The clip with the least squared error, found by trying: range times 1, 0.99, ..., 0.01."""

import torch
from torch import Tensor

from gracile.core.kinds import observer
from gracile.quantize.observers.counting import Counting, Histogram
from gracile.quantize.observers.rounding import Occupied, grid_for, occupied, squared_error


@observer("mse", source="Choukroun et al. 2019, arXiv:1902.06822, section 4, by grid search")
class MeanSquaredError(Counting):
    """Both ends of the full range, shrunk by one factor: what rounding and clipping cost least at.

    Goes by the bits of the grid: at 8 it hardly clips, at 4 it clips much. Reads a histogram of
    bounded memory. The search costs about 0.1 s per tensor, so it is for calibration, and for
    weights that do not train.

    Raises:
        ValueError: steps less than 2.

    >>> o = MeanSquaredError()
    >>> o.bits = 2
    >>> o.observe(torch.cat([torch.linspace(0, 1, 10_000), torch.tensor([9.0])]))
    >>> bool(o.range()[1] < 2)
    True
    """

    def __init__(self, *, steps: int = 100):
        if steps < 2:
            raise ValueError(f"steps must be 2 or more, got {steps}; 100 is usual.")
        self.steps = steps

    def clipped(self, seen: Histogram, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The best factor of each channel."""
        return self.best(occupied(seen), low, high, move=(True, True))

    def best(
        self, seen: Occupied, low: Tensor, high: Tensor, move: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """Of the ranges with these ends shrunk, those that cost least; of equal ones the widest.

        Args:
            seen: all values.
            low, high: (channels,), factor 1.
            move: which of the ends is shrunk.
        """
        out, least = (low, high), squared_error(seen, grid_for(self, low, high))
        for k in range(self.steps - 1, 0, -1):
            factor = k / self.steps
            tried = (low * factor if move[0] else low, high * factor if move[1] else high)
            error = squared_error(seen, grid_for(self, *tried))
            better = error < least
            least = torch.where(better, error, least)
            out = (torch.where(better, tried[0], out[0]), torch.where(better, tried[1], out[1]))
        return out
