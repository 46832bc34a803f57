"""Size and cost of a network under its masks, in our count and in that of Distiller."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gracile.analyze.cost import CostRow
from gracile.analyze.layers import LAYERS
from gracile.graph.dependency import canonical_addresses


@dataclass(frozen=True)
class Count:
    """Size and cost of a network at one moment.

    Zeros are what a mask hides, and entries of weights (tensors of two dims or more) that are 0.
    With `compat: strict` in the recipe it is counted as Distiller does: only tensors of two and of
    four dims, each name of a tied one; MACs of convolutions (4-D) and linear layers, of these one
    for each weight, however many positions they are applied to.

    Attributes:
        params: parameters, in elements.
        nnz: those that are not zeros.
        sparsity: share of zeros in the weights.
        macs: multiply-adds for one sample, those with zeros included.
        macs_nonzero: without those of convolutions and linear layers whose weight is zero.
    """

    params: int
    nnz: int
    sparsity: float
    macs: int
    macs_nonzero: int


@torch.no_grad()
def count(s: Any, rows: Sequence[CostRow], *, strict: bool) -> Count:
    """Size and cost of a Session's model as its masks leave it.

    Args:
        s: the Session.
        rows: `cost(s.model, s.graph)`.
        strict: as Distiller does (see `Count`).
    """
    sizes = {a: p.numel() for a, p in s.model.named_parameters()}
    dims = {a: p.dim() for a, p in s.model.named_parameters()}
    zeros = {a: _zeros(s, a, dims[a]) for a in sizes}
    first = canonical_addresses(s.model)
    if strict:
        every = [first[a] for a, _ in s.model.named_parameters(remove_duplicate=False)]
        counted = weights = [a for a in every if dims[a] in (2, 4)]
    else:
        counted, weights = [*sizes], [a for a in sizes if dims[a] > 1]
    macs = nonzero = 0
    for row in rows:
        at = first.get(row.weight or "")
        layer = at in sizes and row.op in LAYERS
        n = row.macs
        if strict:
            plain = layer and (row.op == "linear" or (row.op == "conv" and dims[at] == 4))
            n = 0 if not plain else sizes[at] if row.op == "linear" else n
        macs += n
        nonzero += n * (sizes[at] - zeros[at]) // sizes[at] if layer else n
    params, total = sum(sizes[a] for a in counted), sum(sizes[a] for a in weights)
    return Count(
        params=params,
        nnz=params - sum(zeros[a] for a in counted),
        sparsity=sum(zeros[a] for a in weights) / total if total else 0.0,
        macs=macs,
        macs_nonzero=nonzero,
    )


def _zeros(s: Any, address: str, dims: int) -> int:
    if dims > 1:
        seen = s.overlays.effective(address, upto="mask")
        return int(seen.numel() - seen.count_nonzero())
    keep = s.mask(address)
    return 0 if keep is None else int((~keep).sum())
