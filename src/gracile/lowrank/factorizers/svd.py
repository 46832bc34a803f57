"""Truncated singular value decomposition of a layer as one matrix, outputs x what each reads."""

from torch import Tensor

from gracile.core.kinds import factorizer
from gracile.lowrank.spectral import by_group, halves
from gracile.nn.chain import Chain, Layer


def svd_full(layer: Layer) -> tuple[int]:
    """min(outputs, inputs x kernel) of a group."""
    return (min(layer.outputs // layer.groups, layer.inputs // layer.groups * layer.area),)


def svd_chain(layer: Layer, ranks: tuple[int, ...]) -> Chain:
    """The layer with r outputs for each group, then a pointwise one."""
    middle = ranks[0] * layer.groups
    return Chain(
        (
            layer.like(layer.inputs, middle, axes=layer.axes, groups=layer.groups),
            layer.like(middle, layer.outputs, groups=layer.groups, bias=layer.bias),
        )
    )


def svd_matrices(weight: Tensor, groups: int) -> tuple[Tensor]:
    """(groups, outputs / groups, inputs / groups x kernel)."""
    return (by_group(weight, groups).flatten(2),)


@factorizer(
    "svd",
    source="Eckart & Young 1936; for convolutions Zhang et al. 2015, arXiv:1411.4229",
    ranks=("rank",),
    full=svd_full,
    chain=svd_chain,
    matrices=svd_matrices,
)
def svd(weight: Tensor, groups: int, ranks: tuple[int, ...]) -> tuple[Tensor, ...]:
    """W = (U S^1/2)(S^1/2 V^T) cut to the r largest singular values: r(m + n) weights for mn.

    The squared error is the sum of the squares of those left out; no two matrices of this size do
    better. Pays for a linear layer if r < mn / (m + n).

    Args:
        weight: (O, I / groups, *kernel); each group is a matrix of its own.
        groups: of the layer.
        ranks: (r,), of each group.

    Returns:
        (r x groups, I / groups, *kernel) and (O, r, 1...).
    """
    left, right = halves(svd_matrices(weight, groups)[0], ranks[0])
    return two_factors(weight, left, right)


def two_factors(weight: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices of each group as weights of the two layers of `svd_chain`, in the weight's dtype.

    Args:
        weight: of the layer they stand for.
        left: (groups, O / groups, r).
        right: (groups, r, I / groups x kernel).
    """
    first = right.reshape(-1, *weight.shape[1:])
    second = left.flatten(0, 1).reshape(len(weight), -1, *(1,) * (weight.ndim - 2))
    return first.to(weight.dtype), second.to(weight.dtype)
