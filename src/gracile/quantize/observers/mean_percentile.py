"""Mean over the samples of each one's percentiles."""

import torch
from torch import Tensor

from gracile.core.kinds import observer
from gracile.quantize.observers.percentile import checked_percent
from gracile.quantize.observers.samples import SampleMean


@observer("mean_percentile", source="NNCF's mean_percentile, in its words")
class MeanPercentile(SampleMean):
    """low = mean of the samples' (100 - q)-th percentiles, high = mean of their q-th.

    Within a sample the percentile is interpolated between the two nearest values. Of weights it is
    the percentile of each channel.

    Raises:
        ValueError: q outside (50, 100].

    >>> o = MeanPercentile(q=75)
    >>> o.observe(torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0, 0.0]]))
    >>> o.range()
    (tensor(0.5000), tensor(1.5000))
    """

    def __init__(self, *, q: float = 99.9):
        self.q = checked_percent(q)

    def ends_of(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The two percentiles of each row; NaN if a value of it is not finite."""
        wrong = (values - values).sum(1)  # 0, or NaN: it may lie in the part that is cut off
        at = (1 - self.q / 100) * (values.shape[1] - 1)
        first, part = int(at), at - int(at)
        second = min(first + 1, values.shape[1] - 1)
        low, high = (
            torch.lerp(tail[:, first], tail[:, second], part) + wrong
            for tail in (
                values.topk(second + 1, dim=1, largest=largest).values for largest in (False, True)
            )
        )
        return low, high
