"""The range with the least squared error where each end is moved on its own."""

import torch
from torch import Tensor

from gracile.core.kinds import observer
from gracile.quantize.observers.counting import Histogram
from gracile.quantize.observers.mse import MeanSquaredError
from gracile.quantize.observers.rounding import grid_for, occupied, squared_error

ROUNDS = 3  # of moving the one end and then the other


@observer("histogram", source="the idea of PyTorch's HistogramObserver: L2 error over a histogram")
class HistogramError(MeanSquaredError):
    """As `mse`, then low alone and high alone, in turns, while the error falls.

    Differs from `mse` where a grid has two ends to choose: values of both signs, asymmetric, with
    tails of different weight. Costs up to seven times as much.

    Raises:
        ValueError: steps less than 2.
    """

    def clipped(self, seen: Histogram, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The best range of each channel."""
        out = super().clipped(seen, low, high)
        if self.symmetric or bool((low >= 0).all() or (high <= 0).all()):
            return out
        held = occupied(seen)
        least = squared_error(held, grid_for(self, *out))
        for _ in range(ROUNDS):
            before = out
            for move in ((True, False), (False, True)):
                begin = (low if move[0] else out[0], high if move[1] else out[1])
                tried = self.best(held, *begin, move=move)
                error = squared_error(held, grid_for(self, *tried))
                better = error < least
                least = torch.where(better, error, least)
                out = (
                    torch.where(better, tried[0], out[0]),
                    torch.where(better, tried[1], out[1]),
                )
            if torch.equal(out[0], before[0]) and torch.equal(out[1], before[1]):
                break
        return out
