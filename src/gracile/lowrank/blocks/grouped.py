"""Grouped convolutions whose channels are shuffled, so that groups hear of each other."""

import torch
from torch import Tensor

from gracile.core.kinds import block
from gracile.errors import UserError
from gracile.lowrank.blocks.dense import check_dense
from gracile.lowrank.blocks.nearest import fitted
from gracile.nn.blocks import Block
from gracile.nn.chain import Chain, Layer, Shuffle


def _start(weight: Tensor, layer: Layer, block: Block) -> tuple[Tensor, ...]:
    """What each group may read of the weight; with 1x1 behind, the least squares from there."""
    first, *rest = block.chain.layers
    order = _dealt(layer.outputs, first.groups)
    rows = weight.detach()[order].unflatten(0, (first.groups, -1))  # (g, O / g, I, *kernel)
    parts = [r.chunk(first.groups, 1)[k] for k, r in enumerate(rows)]
    grouped = torch.cat(parts)
    if not rest:
        return (grouped,)
    passed = torch.eye(layer.outputs, dtype=weight.dtype, device=weight.device)
    parts = [r.chunk(first.groups, 1)[k] for k, r in enumerate(passed.chunk(first.groups))]
    pointwise = torch.cat(parts).reshape(rest[0].weight_shape)
    return fitted(weight, layer, block.chain, (grouped, pointwise))


@block(
    "grouped",
    source="Zhang et al. 2018, arXiv:1707.01083 (ShuffleNet); start: ours",
    start=_start,
)
def grouped(
    layer: Layer,
    *,
    groups: int = 4,
    pointwise: bool = False,
    norm: bool = False,
    activation: str = "none",
) -> Block:
    """The kernel in groups, then a shuffle of the channels: 1/g of the layer.

    Channels are dealt out in turn, so that the next grouped layer's groups each read of all of
    these. With `pointwise` a 1x1 in as many groups follows the shuffle.

    Args:
        layer: a convolution that is not grouped.
        groups: must divide its inputs and outputs.
        pointwise: whether 1x1 follows.
        norm, activation: between the two, if it does.

    Raises:
        UserError: it is not for such a layer, or the groups do not divide its channels.
    """
    check_dense(layer)
    if groups < 2 or layer.inputs % groups or layer.outputs % groups:
        raise UserError(
            f"groups must be >= 2 and divide {layer.inputs} inputs and {layer.outputs} outputs, "
            f"got {groups}."
        )
    shuffle = Shuffle(layer.outputs, groups)
    inner = layer.bias if not pointwise else not norm and activation != "none"
    first = layer.like(layer.inputs, layer.outputs, axes=layer.axes, groups=groups, bias=inner)
    if not pointwise:
        return Block(Chain((first, shuffle)))
    last = layer.like(layer.outputs, layer.outputs, groups=groups, bias=layer.bias)
    return Block(Chain((first, shuffle, last)), norm, activation)


def _dealt(channels: int, groups: int) -> Tensor:
    """For each channel before the shuffle its place behind it."""
    order: Tensor = torch.arange(channels).unflatten(0, (-1, groups)).T.flatten()
    return order
