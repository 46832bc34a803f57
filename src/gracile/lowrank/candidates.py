"""What layers may become at several ranks: what each costs, and how far off it is.

Rules that see all layers at once choose among these. The way of ranks is the scheme's own; what a
candidate costs is counted on the description of its chain, after ranks were rounded.
"""

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import UserError
from gracile.lowrank.affordable import largest_ranks
from gracile.lowrank.reconstruct import grams_of
from gracile.lowrank.rounding import rounded_up
from gracile.nn.chain import Chain, Layer, Size
from gracile.nn.schemes import chain_of, full_ranks

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """One way to have a layer.

    Attributes:
        ranks: of its factors; None leaves the layer as it is.
        cost: multiply-adds, parameters or milliseconds, as the rule counts.
        error: what it does harm; 0 for the layer as it is.
    """

    ranks: Ranks | None
    cost: float
    error: float = 0.0


def work(what: Layer | Chain, size: Size) -> int:
    """Multiply-adds; parameters for a lookup and what stands for one, as it multiplies nothing.

    Args:
        what: a layer, or a chain that stands for one.
        size: see `Layer.macs`.
    """
    first = what if isinstance(what, Layer) else what.layers[0]
    return what.params if first.lookup else what.macs(size)


def ladder(scheme: str, layer: Layer, size: Size, count: int, period: int) -> list[Ranks]:
    """Ranks at equal steps of work between nothing and the layer's own, cheapest first.

    Args:
        scheme, layer: what is factorized, and how.
        size: of the layer's input.
        count: steps; those too small for the scheme, equal to another, or not below the layer's
            work after rounding are left out.
        period: ranks are rounded up to multiples.

    >>> ladder("svd", Layer(8, 8), (), 3, 1)
    [(1,), (2,), (3,)]
    """

    def cost(what: Layer | Chain) -> int:
        return work(what, size)

    whole, full = cost(layer), full_ranks(scheme, layer)
    found: dict[Ranks, int] = {}
    for k in range(1, count + 1):
        with suppress(UserError):  # even ranks of 1 cost more
            ranks = largest_ranks(scheme, layer, cost, whole * k / (count + 1), "")
            ranks = rounded_up(ranks, full, period) if period > 1 else ranks
            price = cost(chain_of(scheme, layer, ranks))
            if price < whole:
                found[ranks] = price
    return sorted(found, key=lambda ranks: found[ranks])


def response_error(weight: Tensor, near: Tensor, gram: Tensor, groups: int) -> float:
    """sum over x of ||(W - W') x||^2 / ||W x||^2, from the Gram matrix of the inputs.

    Args:
        weight, near: (O, I / groups, *kernel).
        gram: (groups, P, P) or (P, P), sum or mean of x x^T.
        groups: of the layer.

    >>> eye, near = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> response_error(eye, near, torch.diag(torch.tensor([3.0, 1.0])), 1)
    0.25
    """
    flat = weight.detach().double().reshape(groups, weight.shape[0] // groups, -1)
    change = flat - near.detach().double().reshape(flat.shape)
    metric = grams_of(gram, groups, flat.shape[-1])
    off, whole = (float(torch.einsum("gop,gpq,goq->", w, metric, w)) for w in (change, flat))
    return max(0.0, off) / whole if whole > 0 else 0.0
