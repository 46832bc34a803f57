"""Where the zeros of a network are: single weights, kernels, filters, channels, of each tensor."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor, nn

from gracile.core.csv_text import csv_text


@dataclass(frozen=True)
class SparsityRow:
    """One tensor; shares are of zeros, in [0, 1], None where it has no such groups.

    Attributes:
        tensor: address; shape: like 16x3x3x3.
        size, nnz: entries, and those that are not zero.
        element: share of entries that are zero.
        kernel: of 2-D kernels that are all zero (weights of at least 3 dims).
        filter: of indices of dim 0; channel: of dim 1; both of at least 2 dims.
        mean, std, mean_abs: of all entries.
    """

    tensor: str
    shape: str
    size: int
    nnz: int
    element: float
    kernel: float | None
    filter: float | None
    channel: float | None
    mean: float
    std: float
    mean_abs: float


def sparsity_rows(model: nn.Module, *, every: bool = False) -> list[SparsityRow]:
    """One row for each weight of two or more dims, tied ones once.

    Args:
        model: with its masks applied.
        every: all parameters, biases and normalization too.
    """
    return [
        _row(name, p.detach())
        for name, p in model.named_parameters()
        if (every or p.dim() > 1) and p.numel()
    ]


def total(rows: Sequence[SparsityRow]) -> SparsityRow:
    """All of them together; moments are left at 0."""
    size, nnz = sum(r.size for r in rows), sum(r.nnz for r in rows)
    share = 1 - nnz / size if size else 0.0
    return SparsityRow("total", "", size, nnz, share, None, None, None, 0.0, 0.0, 0.0)


def to_csv(rows: Sequence[SparsityRow]) -> str:
    """One line a tensor, under the names of the fields."""

    def cell(v: object) -> object:
        return "" if v is None else f"{v:.7g}" if isinstance(v, float) else v

    return csv_text(
        [f.name for f in fields(SparsityRow)], (list(map(cell, astuple(r))) for r in rows)
    )


def _row(name: str, w: Tensor) -> SparsityRow:
    zero, values = w == 0, w.double()
    nnz = w.numel() - int(zero.sum())
    return SparsityRow(
        tensor=name,
        shape="x".join(str(n) for n in w.shape),
        size=w.numel(),
        nnz=nnz,
        element=1 - nnz / w.numel(),
        kernel=_share(zero.flatten(2).all(2)) if w.dim() > 2 else None,
        filter=_share(zero.flatten(1).all(1)) if w.dim() > 1 else None,
        channel=_share(zero.transpose(0, 1).flatten(1).all(1)) if w.dim() > 1 else None,
        mean=float(values.mean()),
        std=float(values.std(correction=0)),
        mean_abs=float(values.abs().mean()),
    )


def _share(gone: Tensor) -> float:
    return float(gone.to(torch.float64).mean())
