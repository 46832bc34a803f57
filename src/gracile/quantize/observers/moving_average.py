"""Exponential moving average of each batch's ends: the range that follows a training network."""

from torch import Tensor

from gracile.core.kinds import observer
from gracile.distribute.collective import all_reduce_mean_
from gracile.quantize.observers.base import Observer, ends


@observer("moving_average", source="Jacob et al. 2018, arXiv:1712.05877, section 3.1")
class MovingAverage(Observer):
    """low = momentum * low + (1 - momentum) * smallest of this batch; the same for high.

    The first batch is taken as it is. The paper says "close to 1" and uses thousands of steps; the
    default 0.9 remembers about ten batches, so that a few calibration batches are enough to begin
    with; raise it to 0.99 or more for long trainings.

    Raises:
        ValueError: momentum outside [0, 1).

    >>> o = MovingAverage(momentum=0.5)
    >>> o.observe(torch.tensor([0.0, 2.0]))
    >>> o.observe(torch.tensor([0.0, 4.0]))
    >>> o.range()
    (tensor(0.), tensor(3.))
    """

    def __init__(self, *, momentum: float = 0.9):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}; 0.9 is usual.")
        self.momentum = momentum

    def observe(self, x: Tensor) -> None:
        """Move both ends towards x's."""
        low, high = ends(x, self.axis)
        self.low = low if self.low is None else self.low.lerp(low, 1 - self.momentum)
        self.high = high if self.high is None else self.high.lerp(high, 1 - self.momentum)

    def sync(self) -> None:
        """The mean of all ranks: the average of the mean batch, since averaging is linear."""
        for end in self.range():
            all_reduce_mean_(end)
