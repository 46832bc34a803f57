"""Linear layers as CSR against dense ones, in PyTorch: where the zeros of a weight bring speed."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.cell import Cell, Values, latency, ratio, side_by_side, template
from gracile.benchmark.csr import CsrLinear

NAME = "csr"
WIDTHS = (256, 1024)
ROWS = (1, 8, 32, 128)
SPARSITY = (0.8, 0.9, 0.95, 0.99)


def cells() -> Iterator[Cell]:
    """A cell for each width and number of rows."""
    for width in WIDTHS:
        for rows in ROWS:
            name = f"{width} x {width}, {rows} rows"
            make = partial(template, NAME, name, batch=rows, shape=(rows, width))
            variants = [f"{100 * s:.0f} % zeros" for s in SPARSITY]
            records = (
                *(make("latency_ms", "ms", v) for v in ("dense", *variants)),
                *(make("speedup", "ratio", v) for v in variants),
            )
            yield Cell(NAME, name, "smoke", records, partial(measure, width, rows))


def measure(width: int, rows: int) -> Values:
    """Time a dense layer and CSR layers of rising sparsity."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.nn.Linear(width, width)
    x = torch.randn(rows, width, generator=generator)
    layers: dict[str, torch.nn.Module] = {"dense": dense}
    for s in SPARSITY:
        there = torch.rand(width, width, generator=generator) >= s
        layer = torch.nn.Linear(width, width)
        layer.weight.data = dense.weight.data * there
        layers[f"{100 * s:.0f} % zeros"] = CsrLinear(layer, always=True)
    with torch.inference_mode():
        t = side_by_side({name: partial(m, x) for name, m in layers.items()}, min_round_ms=20.0)
    found = {("latency_ms", name): latency(one) for name, one in t.items()}
    rest = [name for name in t if name != "dense"]
    return {**found, **{("speedup", name): ratio(t["dense"], t[name]) for name in rest}}
