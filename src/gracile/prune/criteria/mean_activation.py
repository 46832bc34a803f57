"""Mean activation: a filter that hardly fires does little."""

from torch import Tensor

from gracile.core.kinds import criterion
from gracile.prune.spread import over_filters


@criterion(
    "mean_activation",
    source="Molchanov et al. 2017, arXiv:1611.06440, section 2.2",
    needs=("activation_mean",),
)
def mean_activation(weight: Tensor, mean: Tensor, *, highest_first: bool = False) -> Tensor:
    """Score a filter by the mean of its activations: the lowest goes first.

    Args:
        weight: (outputs, ...).
        mean: (outputs,) mean activation of each channel.
        highest_first: the filters that fire most go instead, as in Distiller.

    >>> mean_activation(torch.zeros(2, 2), torch.tensor([0.5, 0.25])).sum(1)
    tensor([0.5000, 0.2500])
    """
    return over_filters(weight, -mean if highest_first else mean)
