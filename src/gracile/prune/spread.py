"""A score of a whole filter, laid on its weights so that their sum is that score."""

from torch import Tensor


def over_filters(weight: Tensor, scores: Tensor) -> Tensor:
    """Spread one score for each output evenly over its weights.

    Args:
        weight: (outputs, ...).
        scores: (outputs,).

    Returns:
        Scores of weight's shape.
    """
    share = scores.to(weight) * (weight.shape[0] / weight.numel())
    return share.reshape(-1, *[1] * (weight.dim() - 1)).expand_as(weight)
