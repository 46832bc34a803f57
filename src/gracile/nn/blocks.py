"""Blocks that take a layer's place without computing what it did: cheaper layers, to be trained.

As a chain of low rank a block is known from the layer and a few options alone, so that a saved
model is built again from its plan. All of it is layers of torch: what comes later cuts, quantizes
and exports them like any.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from gracile import registry
from gracile.core.kinds import check_options, kernel_options
from gracile.errors import UserError, nearest
from gracile.nn.chain import Chain, Layer, Size, build, layer_of

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU,
    "hardswish": nn.Hardswish, "gelu": nn.GELU,
}  # fmt: skip
NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
BETWEEN = (nn.Dropout, nn.Identity, nn.LeakyReLU, nn.Tanh, *ACTIVATIONS.values())


@dataclass(frozen=True)
class Block:
    """What a block is made of.

    Attributes:
        chain: its layers and shuffles, in the order they run.
        norm: a batch norm behind each layer but the last.
        activation: behind each layer but the last, a name of `ACTIVATIONS`.
        residual: what the block reads is added to what it gives.
        image: (channels, *size) of the flattened image it reads, which is averaged over its pixels
            first; () if it reads images as they are.

    Raises:
        UserError: no such activation.
    """

    chain: Chain
    norm: bool = False
    activation: str = "none"
    residual: bool = False
    image: Size = ()

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"no activation '{self.activation}' for a block."
                f"{nearest(self.activation, ACTIVATIONS)}"
            )

    @property
    def linear(self) -> bool:
        """Whether it is a chain and nothing else, so that factors can be fitted to it."""
        return not (self.norm or self.residual or self.activation != "none")

    @property
    def params(self) -> int:
        """Weights and biases, of batch norms too."""
        norms = sum(2 * layer.outputs for layer in self.chain.layers[:-1])
        return self.chain.params + self.norm * norms

    def macs(self, size: Size) -> int:
        """Multiply-adds of one sample; those of layers, as everywhere.

        Args:
            size: pixels along each axis of what it reads; () where that is flat.
        """
        return self.chain.macs(size)


class Residual(nn.Sequential):
    """Layers, and what they read added to what they give."""

    def forward(self, x: Tensor) -> Tensor:
        """x + layers(x), of one shape."""
        out: Tensor = super().forward(x)
        return x + out


def block_of(name: str, layer: Layer, args: Mapping[str, Any]) -> Block:
    """What takes a layer's place.

    Args:
        name: of a registered block.
        layer: what is replaced.
        args: options of the block; the others keep their defaults.

    Raises:
        UserError: no such block or option, or it is not for this layer.
    """
    check_options("block", name, args)
    block: Block = registry.get("block", name).obj(layer, **args)
    return block


def all_args(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a block with the defaults filled in, as a plan keeps them."""
    known = kernel_options(registry.get("block", name).obj)
    return {k: args.get(k, p.default) for k, p in known.items()}


def reads(name: str) -> str:
    """What a block takes the place of layers for: "image", or "flat" behind a flatten."""
    return str(registry.get("block", name).meta["reads"])


def plain_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has them: lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in args.items()}


def standing_for(module: nn.Module) -> Layer:
    """The description of a layer, or of a head: linear layers with what has no weights between.

    Raises:
        UserError: it is neither.
    """
    if not isinstance(module, nn.Sequential):
        return layer_of(module)
    linear = linear_layers(module)
    if not linear:
        raise UserError("only linear layers with activations and dropouts between are one head.")
    first, last = layer_of(linear[0]), layer_of(linear[-1])
    return Layer(first.inputs, last.outputs, bias=last.bias)


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    """The linear layers of a head, in order; none if a module is something else than a head."""
    parts = list(module) if isinstance(module, nn.Sequential) else []
    if not all(type(p) is nn.Linear or isinstance(p, BETWEEN) for p in parts):
        return []
    return [p for p in parts if isinstance(p, nn.Linear)]


def build_block(
    block: Block,
    factors: Sequence[Tensor] | None = None,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """The block as a module; no random number is drawn.

    Args:
        block: what to build.
        factors: one for each of the chain's shapes, copied; None leaves weights zero, to be loaded.
        bias: (outputs,) of the last layer; None is zeros where it has one.
        dtype: of what is left zero; that of the factors, or torch's default.

    Raises:
        UserError: a factor is missing or has another shape.
    """
    parts = [] if not block.chain.steps else list(build(block.chain, factors, bias, dtype=dtype))
    made: list[nn.Module] = []
    if block.image:
        pool = nn.AdaptiveAvgPool1d(1) if len(block.image) == 2 else nn.AdaptiveAvgPool2d(1)
        made += [nn.Unflatten(1, block.image), pool, nn.Flatten(1)]
    last = max((i for i, s in enumerate(block.chain.steps) if isinstance(s, Layer)), default=-1)
    for i, (step, module) in enumerate(zip(block.chain.steps, parts, strict=True)):
        made.append(module)
        if isinstance(step, Layer) and i < last:
            made += _behind(block, step, next(module.parameters()).dtype)
    return (Residual if block.residual else nn.Sequential)(*made)


def same_size(layer: Layer) -> bool:
    """Whether a layer gives images of the size and channels it reads, so that they can be added."""
    spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel, strict=True)]
    return (
        layer.inputs == layer.outputs
        and prod(layer.stride) == 1
        and all(2 * p == n for p, n in zip(layer.padding, spans, strict=True))
    )


def _behind(block: Block, layer: Layer, dtype: torch.dtype) -> list[nn.Module]:
    out: list[nn.Module] = []
    if block.norm:
        out.append(NORMS[len(layer.kernel)](layer.outputs).to(dtype))
    if block.activation != "none":
        out.append(ACTIVATIONS[block.activation]())
    return out
