"""Ranks for a share of a layer's multiply-adds."""

from torch import Tensor

from gracile.core.kinds import rank_rule
from gracile.errors import UserError
from gracile.lowrank.affordable import check_ratio, largest_ranks
from gracile.nn.chain import Layer, Size


@rank_rule("macs", source="Gusak et al. 2019 (MUSCO), arXiv:1903.09973")
def macs(
    weight: Tensor, layer: Layer, scheme: str, size: Size, *, ratio: float = 0.5
) -> tuple[int, ...]:
    """The largest ranks whose chain needs at most this share of the layer's multiply-adds.

    Unlike parameters, they know strides: what comes before a stride costs more.

    Args:
        weight: not looked at.
        layer, scheme: what is factorized, and how.
        size: pixels along each axis of the layer's input; () for a linear layer.
        ratio: in (0, 1].

    Raises:
        UserError: the ratio or the size is wrong, even ranks of 1 need more, or an embedding,
            which needs none.
    """
    check_ratio(ratio)
    if layer.lookup:
        raise UserError(
            "an embedding multiplies nothing; choose its ranks by params, energy, evbmf or fixed"
        )
    budget = ratio * layer.macs(size)
    return largest_ranks(scheme, layer, lambda c: c.macs(size), budget, "multiply-adds")
