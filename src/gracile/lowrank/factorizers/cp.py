"""Canonical polyadic decomposition: pointwise, depthwise along each axis, pointwise."""

import torch
from torch import Tensor

from gracile.core.kinds import factorizer
from gracile.errors import UserError
from gracile.lowrank import canonical
from gracile.lowrank.spectral import by_group
from gracile.nn.chain import Chain, Layer

SOURCE = "Lebedev et al. 2015, arXiv:1412.6553"


def _full(layer: Layer) -> tuple[int]:
    return (_largest(layer, layer.kernel),)


def _full3(layer: Layer) -> tuple[int]:
    return (_largest(layer, (layer.area,)),)


def _largest(layer: Layer, kernel: tuple[int, ...]) -> int:
    """No tensor needs more terms than the product of all its sizes but the largest."""
    if layer.area == 1:
        raise UserError(f"cp needs a spatial kernel, got {layer.kernel}; use svd.")
    total = largest = 1
    for n in (layer.outputs // layer.groups, layer.inputs // layer.groups, *kernel):
        total, largest = total * n, max(largest, n)
    return total // largest


def _chain(layer: Layer, ranks: tuple[int, ...]) -> Chain:
    return _with_middle(layer, ranks[0], [(a,) for a in layer.axes])


def _chain3(layer: Layer, ranks: tuple[int, ...]) -> Chain:
    return _with_middle(layer, ranks[0], [layer.axes])


def _with_middle(layer: Layer, rank: int, middle: list[tuple[int, ...]]) -> Chain:
    n = rank * layer.groups
    spatial = tuple(layer.like(n, n, axes=axes, groups=n) for axes in middle)
    first = layer.like(layer.inputs, n, groups=layer.groups)
    last = layer.like(n, layer.outputs, groups=layer.groups, bias=layer.bias)
    return Chain((first, *spatial, last))


@factorizer("cp", source=SOURCE, ranks=("rank",), full=_full, chain=_chain, needs=("generator",))
def cp(
    weight: Tensor,
    groups: int,
    ranks: tuple[int, ...],
    generator: torch.Generator,
    *,
    how: str = "random",
    starts: int = 2,
    sweeps: int = 100,
    steps: int = 50,
) -> tuple[Tensor, ...]:
    """W[t, s, y, x] = sum over r of T[t, r] S[s, r] Y[y, r] X[x, r]; R(S + kh + kw + T) weights.

    Vertical stride lies on the vertical depthwise layer, horizontal on the horizontal one. Terms
    may nearly cancel each other and are then hard to tune: all modes of a term get one norm.

    Args:
        weight: (O, I / groups, *kernel), more than one element in the kernel.
        groups: of the layer; each is decomposed by itself.
        ranks: (R,), terms of each group.
        generator: of the starts.
        how: random, greedy or nls, best and slowest; see `gracile.lowrank.canonical.fit`.
        starts: random starts, of which the best is taken.
        sweeps: of alternating least squares, at most.
        steps: of Gauss-Newton, at most.

    Returns:
        (R x groups, I / groups, 1, 1), (R x groups, 1, kh, 1), (R x groups, 1, 1, kw) and
        (O, R, 1, 1); with one axis, one depthwise layer.
    """
    each = by_group(weight, groups)
    found = canonical.fit(
        each, ranks[0], generator, how=how, starts=starts, sweeps=sweeps, steps=steps
    )
    outputs, inputs, *spatial = found
    axes = len(spatial)
    kernels = [
        f.mT.reshape(-1, 1, *(weight.shape[2 + i] if i == a else 1 for i in range(axes)))
        for a, f in enumerate(spatial)
    ]
    return _weights(weight, inputs, kernels, outputs)


@factorizer(
    "cp3",
    source=SOURCE + ", with the spatial modes merged; Astrid & Lee 2017, arXiv:1701.07148",
    ranks=("rank",),
    full=_full3,
    chain=_chain3,
    needs=("generator",),
)
def cp3(
    weight: Tensor,
    groups: int,
    ranks: tuple[int, ...],
    generator: torch.Generator,
    *,
    how: str = "random",
    starts: int = 2,
    sweeps: int = 100,
    steps: int = 50,
) -> tuple[Tensor, ...]:
    """W[t, s, i] = sum over r of T[t, r] S[s, r] K[i, r], i over the kernel: R(S + kh kw + T).

    One layer less than `cp` and a smaller error at the same rank, for a few more weights.

    Args:
        weight, groups, ranks, generator, how, starts, sweeps, steps: see `cp`.

    Returns:
        (R x groups, I / groups, 1...), (R x groups, 1, *kernel) and (O, R, 1...).
    """
    each = by_group(weight, groups).flatten(3)
    outputs, inputs, spatial = canonical.fit(
        each, ranks[0], generator, how=how, starts=starts, sweeps=sweeps, steps=steps
    )
    return _weights(weight, inputs, [spatial.mT.reshape(-1, 1, *weight.shape[2:])], outputs)


def _weights(
    weight: Tensor, inputs: Tensor, kernels: list[Tensor], outputs: Tensor
) -> tuple[Tensor, ...]:
    ones = (1,) * (weight.ndim - 2)
    first = inputs.mT.reshape(-1, inputs.shape[1], *ones)
    last = outputs.reshape(len(weight), -1, *ones)
    return tuple(f.to(weight.dtype) for f in (first, *kernels, last))
