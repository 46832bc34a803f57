"""Global average pooling in the place of a head that reads every pixel by itself."""

from collections.abc import Sequence
from math import prod

from torch import Tensor

from gracile.core.kinds import block
from gracile.errors import UserError
from gracile.nn.blocks import Block
from gracile.nn.chain import Chain, Layer


def _start(weight: Tensor, layer: Layer, block: Block) -> tuple[Tensor, ...]:
    """The sum over positions: equal to the layer wherever a channel is the same everywhere."""
    if not block.chain.layers:
        return ()
    return (weight.detach().unflatten(1, (block.image[0], -1)).sum(2),)


@block(
    "global_pool",
    source="Lin et al. 2013, arXiv:1312.4400; in the place of a linear layer: Szegedy et al. 2014, "
    "arXiv:1409.4842; start: ours",
    start=_start,
    reads="flat",
)
def global_pool(layer: Layer, *, image: Sequence[int] = (), linear: bool = True) -> Block:
    """The mean of each channel over all pixels, then a linear layer: C O for C H W O.

    Args:
        layer: a linear layer behind a flatten, or a head of several.
        image: (channels, *size) of what is flattened; found by the method.
        linear: whether a linear layer follows; without, there must be a channel for each output.

    Raises:
        UserError: it is not for such a layer.
    """
    if layer.kernel or len(image) not in (2, 3) or prod(image) != layer.inputs:
        raise UserError(
            f"it reads no flattened image of {layer.inputs} numbers."
            if not layer.kernel
            else "it is a convolution."
        )
    if prod(image[1:]) == 1:
        raise UserError("there is one pixel only, so nothing to average.")
    if not linear and image[0] != layer.outputs:
        raise UserError(
            f"without a linear layer there must be {layer.outputs} channels, there are {image[0]}."
        )
    after = (Layer(image[0], layer.outputs, bias=layer.bias),) if linear else ()
    return Block(Chain(after), image=tuple(image))
