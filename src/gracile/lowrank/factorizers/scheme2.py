"""Jaderberg's second scheme: a vertical convolution into K channels, then a horizontal one."""

from torch import Tensor

from gracile.core.kinds import factorizer
from gracile.errors import UserError
from gracile.lowrank.spectral import by_group, halves
from gracile.nn.chain import Chain, Layer


def _full(layer: Layer) -> tuple[int]:
    if len(layer.kernel) != 2 or layer.area == 1:
        raise UserError(
            f"scheme2 splits a kernel with two axes into one of each, got {layer.kernel}; use svd."
        )
    inputs, outputs = layer.inputs // layer.groups, layer.outputs // layer.groups
    return (min(inputs * layer.kernel[0], outputs * layer.kernel[1]),)


def _chain(layer: Layer, ranks: tuple[int, ...]) -> Chain:
    middle = ranks[0] * layer.groups
    return Chain(
        (
            layer.like(layer.inputs, middle, axes=(0,), groups=layer.groups),
            layer.like(middle, layer.outputs, axes=(1,), groups=layer.groups, bias=layer.bias),
        )
    )


def _matrices(weight: Tensor, groups: int) -> tuple[Tensor]:
    """(groups, I kh, O kw), per group: rows (c, i), columns (n, j)."""
    return (by_group(weight, groups).permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2),)


@factorizer(
    "scheme2",
    source="Jaderberg, Vedaldi & Zisserman 2014, arXiv:1405.3866, scheme 2; closed form by Tai "
    "et al. 2016, arXiv:1511.06067, theorem 1",
    ranks=("channels",),
    full=_full,
    chain=_chain,
    matrices=_matrices,
)
def scheme2(weight: Tensor, groups: int, ranks: tuple[int, ...]) -> tuple[Tensor, ...]:
    """W[n, c, i, j] = sum over k of V[k, c, i] H[n, k, j]; stride (s, 1), then (1, s).

    As a matrix (c, i) x (n, j) that is a product of rank K, so cutting its singular values is the
    global optimum and the error is what was left out. Costs K(N kw + C kh) for NC kh kw.

    Args:
        weight: (O, I / groups, kh, kw).
        groups: of the layer.
        ranks: (K,), of each group.

    Returns:
        (K x groups, I / groups, kh, 1) and (O, K, 1, kw).
    """
    left, right = halves(_matrices(weight, groups)[0], ranks[0])
    outputs, inputs, high, wide = weight.shape
    vertical = left.mT.reshape(-1, inputs, high, 1)
    # (G, K, (n, j)) -> (G, n, K, j)
    horizontal = right.unflatten(2, (outputs // groups, wide)).transpose(1, 2)
    return vertical.to(weight.dtype), horizontal.reshape(outputs, -1, 1, wide).to(weight.dtype)
