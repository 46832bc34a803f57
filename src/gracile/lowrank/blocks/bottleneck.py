"""Bottleneck: 1x1 into fewer channels, the kernel among these, 1x1 out of them."""

from torch import Tensor

from gracile.core.kinds import block
from gracile.errors import UserError
from gracile.lowrank.blocks.dense import check_dense, check_spatial
from gracile.lowrank.scheme import factorize
from gracile.lowrank.spectral import by_group, leading
from gracile.nn.blocks import Block
from gracile.nn.chain import Chain, Layer

PERIOD = 8  # channels of a vector


def _start(weight: Tensor, layer: Layer, block: Block) -> tuple[Tensor, ...]:
    """The leading singular vectors of the weight along its channels (Tucker-2)."""
    width = block.chain.layers[0].outputs
    if len(block.chain.layers) == 3:
        return factorize("tucker2", weight, layer, (width, width))
    (each,) = by_group(weight, 1)  # (O, I, *kernel)
    kept = leading(each.transpose(0, 1).flatten(1), width)  # (I, r)
    first = kept.mT.reshape(block.chain.layers[0].weight_shape)
    last = (each.transpose(1, -1) @ kept).transpose(1, -1)
    return first.to(weight.dtype), last.contiguous().to(weight.dtype)


@block(
    "bottleneck",
    source="He et al. 2015, arXiv:1512.03385; without the last 1x1: Szegedy et al. 2014, "
    "arXiv:1409.4842; start: Kim et al. 2016, arXiv:1511.06530",
    start=_start,
)
def bottleneck(
    layer: Layer,
    *,
    ratio: float = 0.25,
    width: int = 0,
    expand: bool = True,
    norm: bool = False,
    activation: str = "none",
) -> Block:
    """1x1 into r channels, k x k with the layer's stride, 1x1 out: I r + r^2 k^2 + r O.

    Args:
        layer: a convolution that is not grouped and not of 1x1.
        ratio: r as a share of the inputs or outputs, whichever are fewer, rounded up to a multiple
            of 8.
        width: r itself; 0 takes the ratio.
        expand: whether the last 1x1 follows; else k x k gives all outputs, as in Inception.
        norm, activation: behind each layer but the last.

    Raises:
        UserError: it is not for such a layer, or r is out of range.
    """
    check_dense(layer)
    check_spatial(layer)
    most = min(layer.inputs, layer.outputs) if expand else layer.inputs
    if not 0 < ratio <= 1:
        raise UserError(f"ratio must be in (0, 1], got {ratio}.")
    r = width or min(most, -(-max(1, round(ratio * most)) // PERIOD) * PERIOD)
    if not 1 <= r <= most:
        raise UserError(f"width must be in 1..{most} for this layer, got {width}.")
    inner = not norm and activation != "none"
    first = layer.like(layer.inputs, r, bias=inner)
    if not expand:
        last = layer.like(r, layer.outputs, axes=layer.axes, bias=layer.bias)
        return Block(Chain((first, last)), norm, activation)
    middle = layer.like(r, r, axes=layer.axes, bias=inner)
    last = layer.like(r, layer.outputs, bias=layer.bias)
    return Block(Chain((first, middle, last)), norm, activation)
