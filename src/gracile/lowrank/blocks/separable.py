"""Depthwise separable: one spatial filter for each input channel, then 1x1."""

from torch import Tensor

from gracile.core.kinds import block
from gracile.errors import UserError
from gracile.lowrank.blocks.dense import check_spatial
from gracile.lowrank.scheme import factorize
from gracile.nn.blocks import Block
from gracile.nn.chain import Chain, Layer


def _start(weight: Tensor, layer: Layer, block: Block) -> tuple[Tensor, ...]:
    """The best one filter of each channel: W[n, c] ~ a[n, c] s[c], of rank 1 each."""
    return factorize("scheme1", weight, layer, (1,))


@block(
    "separable",
    source="Howard et al. 2017, arXiv:1704.04861; start: Jaderberg et al. 2014, scheme 1",
    start=_start,
)
def separable(layer: Layer, *, norm: bool = False, activation: str = "none") -> Block:
    """A depthwise k x k with the layer's stride, then 1x1: I (k^2 + O) for I O k^2.

    Costs 1/O + 1/k^2 of the layer: 7 times less for 3x3 and 32 outputs.

    Args:
        layer: a convolution, not of 1x1 and not depthwise.
        norm: a batch norm between the two, as MobileNet has it.
        activation: between the two.

    Raises:
        UserError: it is not for such a layer.
    """
    check_spatial(layer)
    if not layer.kernel:
        raise UserError("it is no convolution; for linear layers there is lowrank: factorize.")
    if layer.groups == layer.inputs > 1:
        raise UserError("it is depthwise already.")
    inner = not norm and activation != "none"
    pointwise = layer.like(layer.inputs, layer.outputs, groups=layer.groups, bias=layer.bias)
    depthwise = layer.like(
        layer.inputs, layer.inputs, axes=layer.axes, groups=layer.inputs, bias=inner
    )
    return Block(Chain((depthwise, pointwise)), norm, activation)
