"""Plain lists of what a network consists of: modules, settings, connections, sizes of weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gracile.core.csv_text import csv_text
from gracile.graph.graph import Graph

# Settings of layers that decide what they compute; layers without any are left out.
SETTINGS = (
    "in_channels", "out_channels", "in_features", "out_features", "num_features", "kernel_size",
    "stride", "padding", "dilation", "groups", "bias",
)  # fmt: skip
PERCENT = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class Listing:
    """A table of texts and numbers.

    Attributes:
        columns: their names.
        rows: one value for each column.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def to_csv(self) -> str:
        """With a header."""
        return csv_text(self.columns, self.rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dictionary a row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def modules(model: nn.Module) -> Listing:
    """Path and class of every module without children."""
    leaves = ((p, m) for p, m in model.named_modules() if next(m.children(), None) is None)
    return Listing(("module", "type"), tuple((p, type(m).__name__) for p, m in leaves))


def attributes(model: nn.Module) -> Listing:
    """Sizes and settings of every layer that has some, as it is constructed."""
    rows = []
    for path, m in model.named_modules():
        if next(m.children(), None) is None:
            values = [_shown(getattr(m, name, None)) for name in SETTINGS]
            if any(values):
                rows.append((path, type(m).__name__, *values))
    return Listing(("module", "type", *SETTINGS), tuple(rows))


def connectivity(graph: Graph) -> Listing:
    """Every operator of a captured graph, what it reads and what reads it."""
    rows = (
        (n.id, n.op, " ".join(n.inputs), " ".join(c.id for c in graph.consumers(n.id)))
        for n in graph
        if n.op not in ("param", "size")
    )
    return Listing(("operator", "kind", "reads", "read_by"), tuple(rows))


def percentiles(model: nn.Module) -> Listing:
    """Percentiles of the absolute values of each weight of two or more dims.

    What lies below the p-th percentile are the weights that a magnitude criterion prunes first for
    a sparsity of p %. Interpolated linearly.
    """
    rows = []
    for name, p in model.named_parameters():
        if p.dim() > 1 and p.numel():
            values = p.detach().abs().flatten().double()
            ordered = values.sort().values  # torch.quantile takes at most 2^24 values
            rows.append((name, p.numel(), *(_at(ordered, q / 100) for q in PERCENT)))
    return Listing(("tensor", "size", *(f"p{q}" for q in PERCENT)), tuple(rows))


def _at(ordered: torch.Tensor, share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    low, high = float(ordered[below]), float(ordered[above])
    return low + (place - below) * (high - low)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "x".join(str(v) for v in value)
    return "yes" if isinstance(value, (nn.Parameter, torch.Tensor)) else str(value)
