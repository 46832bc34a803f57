"""Denton's biclustering: channels that are alike together, and a small product for each pair.

Inputs are put into `a` clusters and outputs into `b`, all of equal sizes; each of the ab blocks of
the weight becomes a chain of its own, side by side in grouped layers.
"""

import torch
from torch import Tensor

from gracile.core.kinds import factorizer
from gracile.errors import UserError
from gracile.lowrank import canonical
from gracile.lowrank.clusters import equal_kmeans
from gracile.lowrank.spectral import halves, truncated
from gracile.nn.chain import Chain, Layer, Reorder, Shuffle, Step

SOURCE = "Denton et al. 2014, arXiv:1404.0736 (biclustering"


def _full(layer: Layer) -> tuple[int, ...]:
    if layer.groups > 1 or not layer.kernel:
        raise UserError(
            f"bicluster is for convolutions of one group, got {layer.groups} groups and kernel "
            f"{layer.kernel}; use tucker2, which keeps groups, or svd."
        )
    return layer.inputs, layer.outputs, layer.inputs, layer.outputs


def _full_terms(layer: Layer) -> tuple[int, ...]:
    inputs, outputs, *_ = _full(layer)
    sizes = sorted((inputs, outputs, layer.area))
    return inputs, outputs, sizes[0] * sizes[1]


def _sizes(layer: Layer, a: int, b: int) -> tuple[int, int]:
    """Inputs and outputs of a block."""
    if layer.inputs % a or layer.outputs % b:
        raise UserError(
            f"clusters have equal sizes: {a} must divide {layer.inputs} inputs and {b} "
            f"{layer.outputs} outputs."
        )
    return layer.inputs // a, layer.outputs // b


def _chain(layer: Layer, ranks: tuple[int, ...]) -> Chain:
    a, b, first, last = ranks
    inputs, outputs = _sizes(layer, a, b)
    most = min(inputs, layer.area * outputs)
    if first > most:
        raise UserError(
            f"bicluster: rank 'inputs' must be in 1..{most} for {a} x {b}, got {first}."
        )
    most = min(outputs, first * layer.area)
    if last > most:
        raise UserError(
            f"bicluster: rank 'outputs' must be in 1..{most} for {a} x {b}, got {last}."
        )
    return _blocks(layer, a, b, first, last, a * b)


def _chain_terms(layer: Layer, ranks: tuple[int, ...]) -> Chain:
    a, b, terms = ranks
    _sizes(layer, a, b)
    return _blocks(layer, a, b, terms, terms, a * b * terms)


def _blocks(layer: Layer, a: int, b: int, first: int, last: int, groups: int) -> Chain:
    before, after = a * b * first, a * b * last
    steps: list[Step] = [Reorder(layer.inputs)] if a > 1 else []
    steps += [
        layer.like(layer.inputs, before, groups=a),
        layer.like(before, after, axes=layer.axes, groups=groups),
    ]
    if a > 1 and b > 1:
        steps.append(Shuffle(after, a))
    steps.append(layer.like(after, layer.outputs, groups=b, bias=layer.bias))
    if b > 1:
        steps.append(Reorder(layer.outputs))
    return Chain(tuple(steps))


def along(layer: Layer, t: int) -> tuple[int, ...]:
    """Two clusters on each side where they can be equal; t inputs, outputs in proportion."""
    _full(layer)
    a, b = 2 - layer.inputs % 2, 2 - layer.outputs % 2
    inputs, outputs = _sizes(layer, a, b)
    first = min(t, inputs, layer.area * outputs)
    last = min(max(1, t * outputs // inputs), outputs, first * layer.area)
    return a, b, first, last


def along_terms(layer: Layer, t: int) -> tuple[int, ...]:
    """Two clusters on each side where they can be equal; t terms for each block."""
    most = _full_terms(layer)[2]
    return 2 - layer.inputs % 2, 2 - layer.outputs % 2, min(t, most)


@factorizer(
    "bicluster",
    source=SOURCE + ", two-step SVD)",
    ranks=("input clusters", "output clusters", "inputs", "outputs"),
    full=_full,
    chain=_chain,
    along=along,
    needs=("generator",),
)
def bicluster(
    weight: Tensor,
    groups: int,
    ranks: tuple[int, ...],
    generator: torch.Generator,
    *,
    starts: int = 4,
) -> tuple[Tensor, ...]:
    """Each block by two singular value decompositions: K1 of its inputs, K2 of its outputs.

    Args:
        weight: (O, I, *kernel).
        groups: 1.
        ranks: (a, b, K1, K2); a divides I, b divides O, K1 and K2 are of each block.
        generator: of the starts of k-means.
        starts: of k-means; the best is taken.

    Returns:
        The order of the inputs (I,) if a > 1, (abK1, I / a, 1...), (abK2, K1, *kernel),
        (O, aK2, 1...), and the order of the outputs (O,) if b > 1.
    """
    a, b, first, last = ranks
    blocks, orders = _clustered(weight, a, b, generator, starts)  # (ab, I / a, kernel, O / b)
    u, _, _ = truncated(blocks.flatten(2), first)  # (ab, I / a, K1)
    core = torch.einsum("zik,zipo->zkpo", u, blocks)
    left, right = halves(core.flatten(1, 2), last)  # (ab, K1 kernel, K2), (ab, K2, O / b)
    middle = left.unflatten(1, (first, -1)).permute(0, 3, 1, 2)  # (ab, K2, K1, kernel)
    middle = middle.reshape(-1, first, *weight.shape[2:])
    return _weights(weight, a, b, u.mT, middle, right, orders)


@factorizer(
    "bicluster_rank1",
    source=SOURCE + ", rank-one pursuit)",
    ranks=("input clusters", "output clusters", "terms"),
    full=_full_terms,
    chain=_chain_terms,
    along=along_terms,
    needs=("generator",),
)
def bicluster_rank1(
    weight: Tensor,
    groups: int,
    ranks: tuple[int, ...],
    generator: torch.Generator,
    *,
    starts: int = 4,
    sweeps: int = 30,
) -> tuple[Tensor, ...]:
    """Each block by K rank-one terms, one after another, each fitted to what is left.

    Args:
        weight: (O, I, *kernel).
        groups: 1.
        ranks: (a, b, K); a divides I, b divides O, K terms for each block.
        generator: of the starts of k-means and of each term.
        starts: of k-means; the best is taken.
        sweeps: of alternating least squares for each term, at most.

    Returns:
        As `bicluster`, with (abK, 1, *kernel) in the middle.
    """
    a, b, terms = ranks
    blocks, orders = _clustered(weight, a, b, generator, starts)
    found = canonical.greedy(blocks, terms, generator, sweeps=sweeps)
    inputs, kernel, outputs = canonical.balanced(found)
    middle = kernel.mT.reshape(-1, 1, *weight.shape[2:])
    return _weights(weight, a, b, inputs.mT, middle, outputs.mT, orders)


def _clustered(
    weight: Tensor, a: int, b: int, generator: torch.Generator, starts: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Blocks (ab, I / a, kernel, O / b), inputs slowest; members of the clusters in order."""
    cube = weight.detach().double().flatten(2).permute(1, 2, 0)  # (I, kernel, O)
    inputs = equal_kmeans(cube.flatten(1), a, generator, starts=starts).argsort(stable=True)
    columns = cube.permute(2, 0, 1).flatten(1)
    outputs = equal_kmeans(columns, b, generator, starts=starts).argsort(stable=True)
    sorted_ = cube[inputs][:, :, outputs]
    blocks = sorted_.unflatten(0, (a, -1)).unflatten(3, (b, -1))  # (a, I/a, kernel, b, O/b)
    return blocks.permute(0, 3, 1, 2, 4).flatten(0, 1), (inputs, outputs)


def _weights(
    weight: Tensor,
    a: int,
    b: int,
    first: Tensor,
    middle: Tensor,
    last: Tensor,
    orders: tuple[Tensor, Tensor],
) -> tuple[Tensor, ...]:
    """Factors of the blocks, first (ab, K1, I / a) and last (ab, K2, O / b), as layers' weights."""
    ones = (1,) * (weight.ndim - 2)
    each = last.unflatten(0, (a, b)).permute(1, 3, 2, 0)  # (b, O / b, K2, a): as shuffled
    if b == 1:
        each = each.transpose(2, 3)  # nothing is shuffled: clusters stay slowest
    out = [
        first.flatten(0, 1).reshape(-1, first.shape[2], *ones),
        middle,
        each.reshape(len(weight), -1, *ones),
    ]
    factors = [f.to(weight.dtype) for f in out]
    if a > 1:
        factors.insert(0, orders[0])
    if b > 1:
        factors.append(orders[1].argsort())
    return tuple(factors)
