"""Mean over the samples of each one's smallest and largest value: what a usual input spans."""

import torch
from torch import Tensor

from gracile.core.kinds import observer
from gracile.quantize.observers.samples import SampleMean


@observer("mean_extremes", source="Distiller's AVG clipping and NNCF's mean_min_max, in its words")
class MeanExtremes(SampleMean):
    """low = mean of the samples' minima, high = mean of their maxima.

    Clips what only some inputs reach. A logit or a gate whose extremes are the answer should not be
    clipped so: give the last layer `min_max`. For weights, which have no samples, it is `min_max`.

    >>> o = MeanExtremes()
    >>> o.observe(torch.tensor([[0.0, 2.0], [-1.0, 4.0]]))
    >>> o.range()
    (tensor(-0.5000), tensor(3.))
    """

    def ends_of(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each row."""
        low, high = torch.aminmax(values, dim=1)
        return low, high
