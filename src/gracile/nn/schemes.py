"""Schemes of low rank by name: what a layer becomes, its full ranks, and the product of factors.

What a scheme is lies in its registration (`gracile.core.kinds.factorizer`); here it is asked, so
that a saved model is built again without the mathematics.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gracile import registry
from gracile.errors import UserError
from gracile.nn.chain import Chain, Layer, Reorder, Shuffle


def full_ranks(scheme: str, layer: Layer) -> tuple[int, ...]:
    """The largest ranks a scheme takes for a layer.

    Raises:
        UserError: no such scheme, or it is not for such a layer.
    """
    meta = registry.get("factorizer", scheme).meta
    full: tuple[int, ...] = meta["full"](as_linear(layer))
    if layer.lookup and (meta["needs"] or meta["matrices"] is None or len(meta["ranks"]) > 1):
        raise UserError(f"'{scheme}' is not for an embedding; use svd.")
    return full


def as_linear(layer: Layer) -> Layer:
    """A lookup as the linear layer it is, on vectors with a single 1; any other as it is."""
    return replace(layer, lookup=False, padding_idx=None) if layer.lookup else layer


def chain_of(scheme: str, layer: Layer, ranks: Sequence[int]) -> Chain:
    """What stands for a layer.

    Args:
        scheme: name of a registered factorizer.
        layer: what is factorized.
        ranks: as many as the scheme has; for a grouped convolution, those of each group.

    Raises:
        UserError: the scheme is unknown or not for this layer, or there are too many or too few
            ranks, or one is out of range.
    """
    meta = registry.get("factorizer", scheme).meta
    names: tuple[str, ...] = meta["ranks"]
    if len(ranks) != len(names):
        raise UserError(
            f"'{scheme}' has {len(names)} ranks ({', '.join(names)}), got {tuple(ranks)}."
        )
    for name, rank, most in zip(names, ranks, full_ranks(scheme, layer), strict=True):
        if not 1 <= rank <= most:
            raise UserError(f"'{scheme}': rank '{name}' must be in 1..{most}, got {rank}.")
    chain: Chain = meta["chain"](as_linear(layer), tuple(ranks))
    if layer.lookup:
        first, *rest = chain.steps
        assert isinstance(first, Layer)
        first = replace(first, lookup=True, padding_idx=layer.padding_idx)
        chain = Chain((first, *rest))
    return chain


def respond(chain: Chain, factors: Sequence[Tensor], patches: Tensor) -> Tensor:
    """(n, outputs): what the chain, without biases, gives for single patches.

    Args:
        chain: its strides, paddings and dilations do not matter for what one output reads.
        factors: one for each of `chain.shapes`.
        patches: (n, inputs, *kernel), what one output position reads.
    """
    x, rest = patches, iter(factors)
    for step in chain.steps:
        if isinstance(step, Shuffle):
            x = x.unflatten(1, (step.groups, -1)).transpose(1, 2).flatten(1, 2)
        elif isinstance(step, Reorder):
            x = x.index_select(1, next(rest))
        elif step.kernel:
            x = _convolved(x, next(rest), step.groups)
        else:
            x = F.linear(x, next(rest))
    return x.flatten(1)


def product(chain: Chain, factors: Sequence[Tensor], layer: Layer) -> Tensor:
    """The weight of the layer that the chain is: of `layer.weight_shape`."""
    if layer.lookup:  # its rows are what the others read
        return respond(Chain(chain.steps[1:]), factors[1:], factors[0])
    size = (layer.inputs // layer.groups) * layer.area
    like = next(f for f in factors if f.is_floating_point())
    ones = torch.eye(size, dtype=like.dtype, device=like.device)
    patches = ones.reshape(size, -1, *layer.kernel).repeat(1, layer.groups, *(1,) * len(layer.axes))
    return respond(chain, factors, patches).T.reshape(layer.weight_shape)


def _convolved(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A convolution of stride 1 as one product of large matrices; images are tiny and many here."""
    windows, axes = x, x.ndim - 2
    for i in range(axes):
        windows = windows.unfold(2 + i, weight.shape[2 + i], 1)  # (n, C, out..., k...)
    out = windows.shape[2 : 2 + axes]
    grouped = windows.unflatten(1, (groups, -1)).movedim(1, 0)  # (G, n, C / G, out..., k...)
    rows: Tensor = grouped.movedim(2, 2 + axes).reshape(groups, len(x) * out.numel(), -1)
    result: Tensor = rows @ weight.reshape(groups, len(weight) // groups, -1).mT
    result = result.unflatten(1, (len(x), *out)).movedim(-1, 2)  # (G, n, O / G, out...)
    return result.transpose(0, 1).flatten(1, 2)
