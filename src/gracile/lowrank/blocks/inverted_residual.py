"""Inverted residual: 1x1 into more channels, a filter for each, 1x1 back; the input added."""

import torch
from torch import Tensor

from gracile.core.kinds import block
from gracile.errors import UserError
from gracile.lowrank.blocks.dense import check_dense, check_spatial
from gracile.lowrank.scheme import factorize
from gracile.nn.blocks import Block, same_size
from gracile.nn.chain import Chain, Layer


def _start(weight: Tensor, layer: Layer, block: Block) -> tuple[Tensor, ...]:
    """Copies of each channel, the best filters of each, and how they are mixed (scheme 1).

    Filters beyond those that the layer has use for are not mixed in yet.
    """
    wanted = weight.detach()
    if block.residual and (centre := _centre(layer)) is not None:  # the input is added behind
        wanted = wanted.clone()
        wanted.flatten(2)[:, :, centre] -= torch.eye(layer.outputs).to(wanted)
    times = block.chain.layers[0].outputs // layer.inputs
    most = min(times, layer.outputs, layer.area)
    filters, mixing = factorize("scheme1", wanted, layer, (most,))
    ones = (1,) * len(layer.kernel)
    copies = (
        torch.eye(layer.inputs)
        .to(weight)
        .repeat_interleave(times, 0)
        .reshape(-1, layer.inputs, *ones)
    )
    each = filters.unflatten(0, (layer.inputs, most))
    spare = [each[:, k % most] for k in range(times)]
    depthwise = torch.stack(spare, 1).flatten(0, 1)
    amounts = mixing.reshape(layer.outputs, layer.inputs, most)
    wide = amounts.new_zeros(layer.outputs, layer.inputs, times)
    wide[..., :most] = amounts
    copies = copies.reshape(-1, layer.inputs, *ones)
    return copies, depthwise, wide.reshape(layer.outputs, -1, *ones)


@block(
    "inverted_residual",
    source="Sandler et al. 2018, arXiv:1801.04381 (MobileNetV2); start: ours",
    start=_start,
)
def inverted_residual(
    layer: Layer,
    *,
    expand: int = 6,
    residual: bool = True,
    norm: bool = True,
    activation: str = "relu6",
) -> Block:
    """1x1 from I to t I channels, depthwise k x k with the stride, 1x1 to O: t I (I + k^2 + O).

    What the block reads is added where it has the shape of what it gives.

    Args:
        layer: a convolution that is not grouped and not of 1x1.
        expand: t.
        residual: whether to add it, where shapes allow.
        norm, activation: behind the first and the second layer; the last has none.

    Raises:
        UserError: it is not for such a layer.
    """
    check_dense(layer)
    check_spatial(layer)
    if expand < 1:
        raise UserError(f"expand must be >= 1, got {expand}.")
    wide, inner = expand * layer.inputs, not norm and activation != "none"
    first = layer.like(layer.inputs, wide, bias=inner)
    middle = layer.like(wide, wide, axes=layer.axes, groups=wide, bias=inner)
    last = layer.like(wide, layer.outputs, bias=layer.bias)
    return Block(
        Chain((first, middle, last)), norm, activation, residual=residual and same_size(layer)
    )


def _centre(layer: Layer) -> int | None:
    """Which element of the kernel reads the pixel itself, counted through; None if none does."""
    place = 0
    for size, padding, dilation in zip(layer.kernel, layer.padding, layer.dilation, strict=True):
        if padding % dilation:
            return None
        place = place * size + padding // dilation
    return place
