"""Ranks for a share of a layer's parameters."""

from torch import Tensor

from gracile.core.kinds import rank_rule
from gracile.lowrank.affordable import check_ratio, largest_ranks
from gracile.nn.chain import Layer, Size


@rank_rule("params", source="Gusak et al. 2019 (MUSCO), arXiv:1903.09973")
def params(
    weight: Tensor, layer: Layer, scheme: str, size: Size, *, ratio: float = 0.5
) -> tuple[int, ...]:
    """The largest ranks whose chain has at most this share of the layer's parameters.

    For Tucker-2 along R4 = beta R3, beta = max(0.8 T / S, 1), the root of
    beta k^2 R3^2 + (S + beta T) R3 = ratio S T k^2.

    Args:
        weight: not looked at.
        layer, scheme: what is factorized, and how.
        size: not looked at.
        ratio: in (0, 1], of weights and biases.

    Raises:
        UserError: the ratio is out of range, or even ranks of 1 have more.
    """
    check_ratio(ratio)
    return largest_ranks(scheme, layer, lambda c: c.params, ratio * layer.params, "parameters")
