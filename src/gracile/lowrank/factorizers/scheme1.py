"""Jaderberg's first scheme: a few spatial filters for each input channel, shared by all outputs."""

import torch
from torch import Tensor

from gracile.core.kinds import factorizer
from gracile.errors import UserError
from gracile.lowrank import canonical
from gracile.lowrank.spectral import by_group, halves
from gracile.nn.chain import Chain, Layer

SOURCE = "Jaderberg, Vedaldi & Zisserman 2014, arXiv:1405.3866, scheme 1"


def _full(layer: Layer) -> tuple[int]:
    if layer.area == 1:
        raise UserError(
            f"scheme1 shares spatial filters and a kernel {layer.kernel} has none; use svd."
        )
    return (min(layer.outputs // layer.groups, layer.area),)


def _full_separable(layer: Layer) -> tuple[int]:
    if len(layer.kernel) != 2 or min(layer.kernel) == 1:
        raise UserError(
            f"scheme1_separable needs a kernel with two axes, got {layer.kernel}; use scheme1."
        )
    sizes = sorted((layer.outputs // layer.groups, *layer.kernel))
    return (sizes[0] * sizes[1],)


def _chain(layer: Layer, ranks: tuple[int, ...]) -> Chain:
    middle = layer.inputs * ranks[0]
    return Chain(
        (
            layer.like(layer.inputs, middle, axes=layer.axes, groups=layer.inputs),
            layer.like(middle, layer.outputs, groups=layer.groups, bias=layer.bias),
        )
    )


def _chain_separable(layer: Layer, ranks: tuple[int, ...]) -> Chain:
    middle = layer.inputs * ranks[0]
    return Chain(
        (
            layer.like(layer.inputs, middle, axes=(0,), groups=layer.inputs),
            layer.like(middle, middle, axes=(1,), groups=middle),
            layer.like(middle, layer.outputs, groups=layer.groups, bias=layer.bias),
        )
    )


def _matrices(weight: Tensor, groups: int) -> tuple[Tensor]:
    """(inputs, outputs / groups, kernel): one matrix for each channel."""
    return (by_group(weight, groups).flatten(3).transpose(1, 2).flatten(0, 1),)


def _mixing(weight: Tensor, amounts: Tensor, groups: int) -> Tensor:
    """(inputs, outputs / groups, M) -> the pointwise weight (O, I / groups x M, 1...)."""
    each = amounts.unflatten(0, (groups, -1)).transpose(1, 2)  # (G, O / G, I / G, M)
    mixing: Tensor = each.reshape(len(weight), -1, *(1,) * (weight.ndim - 2))
    return mixing.to(weight.dtype)


@factorizer(
    "scheme1", source=SOURCE, ranks=("filters",), full=_full, chain=_chain, matrices=_matrices
)
def scheme1(weight: Tensor, groups: int, ranks: tuple[int, ...]) -> tuple[Tensor, ...]:
    """W[n, c] = sum over m <= M of a[n, c, m] s[c, m]: depthwise with multiplier M, then 1x1.

    Filters s of any form, so each channel's are the right singular vectors of its (O, kernel)
    matrix: the global optimum, with the singular values left out as error. Costs CM(kernel + N)
    for CN kernel; pays where M is much less than the kernel's elements.

    Args:
        weight: (O, I / groups, *kernel), more than one element in the kernel.
        groups: of the layer; each reads its own channels as before.
        ranks: (M,), filters for each input channel.

    Returns:
        (I x M, 1, *kernel) and (O, I / groups x M, 1...).
    """
    left, right = halves(_matrices(weight, groups)[0], ranks[0])
    filters = right.reshape(-1, 1, *weight.shape[2:]).to(weight.dtype)
    return filters, _mixing(weight, left, groups)


@factorizer(
    "scheme1_separable",
    source=SOURCE + ", with separable filters",
    ranks=("filters",),
    full=_full_separable,
    chain=_chain_separable,
    needs=("generator",),
)
def scheme1_separable(
    weight: Tensor,
    groups: int,
    ranks: tuple[int, ...],
    generator: torch.Generator,
    *,
    how: str = "random",
    starts: int = 2,
    sweeps: int = 100,
) -> tuple[Tensor, ...]:
    """As `scheme1` with filters s = v h^T: vertical, horizontal, then 1x1; CM(kh + kw + N).

    Each channel's (O, kh, kw) is a sum of M rank-one tensors, found by alternating least squares
    (the paper alternates with a penalty on the filters' nuclear norm).

    Args:
        weight: (O, I / groups, kh, kw).
        groups: of the layer.
        ranks: (M,), filters for each input channel.
        generator: of the starts.
        how, starts, sweeps: see `gracile.lowrank.canonical.fit`.

    Returns:
        (I x M, 1, kh, 1), (I x M, 1, 1, kw) and (O, I / groups x M, 1, 1).
    """
    tensors = by_group(weight, groups).transpose(1, 2).flatten(0, 1)  # (I, O / G, kh, kw)
    amounts, rows, columns = canonical.fit(
        tensors, ranks[0], generator, how=how, starts=starts, sweeps=sweeps
    )
    vertical = rows.mT.reshape(-1, 1, weight.shape[2], 1)
    horizontal = columns.mT.reshape(-1, 1, 1, weight.shape[3])
    mixing = _mixing(weight, amounts, groups)
    return vertical.to(weight.dtype), horizontal.to(weight.dtype), mixing
