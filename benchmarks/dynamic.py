"""Linear layers with ranges found as the network runs: three of 1024 x 1024 with ReLU.

One thread, f32 hint, random weights, in interleaved rounds: float, `quantize: dynamic`, and
`quantize: ptq`, whose ranges were found before.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cell import ROUNDS, Cell, Values, latency, ratio, template
from benchmarks.networks import proven
from gracile import Recipe, Session
from gracile.benchmark.runtimes.base import load
from gracile.benchmark.timing import measure as measure_rounds

NAME = "dynamic"
WIDTH, BATCHES, RUNTIMES = 1024, (1, 32), ("onnxruntime", "openvino")
METHODS: dict[str, dict[str, Any]] = {
    "float": {},
    "dynamic": {"q": {"quantize": "dynamic", "profile": "portable"}},
    "ptq": {"q": {"quantize": "ptq"}},
}
RATIOS = tuple(v for v in METHODS if v != "float")


def cells() -> Iterator[Cell]:
    """A cell for each runtime and batch."""
    for runtime in RUNTIMES:
        for batch in BATCHES:
            name = f"{runtime}, batch {batch}"
            facts = {
                "runtime": runtime, "batch": batch, "shape": (batch, WIDTH),
                "precision_hint": "f32",
            }  # fmt: skip
            records = [template(NAME, name, "latency_ms", "ms", v, **facts) for v in METHODS]
            records += [
                template(NAME, name, "ratio", "ratio", f"{v} / float", **facts) for v in RATIOS
            ]
            yield Cell(NAME, name, "full", tuple(records), partial(measure, runtime, batch))


def measure(runtime: str, batch: int) -> Values:
    """Quantize, prove and time all three."""
    x = torch.randn(batch + 1, WIDTH, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        loaded = {}
        for k, (name, methods) in enumerate(METHODS.items()):
            session = Session(
                network(), Recipe.build(methods=methods), example=x[:2], calibration=[x]
            )
            artifact = proven(session.finish(), runtime, Path(folder) / str(k), x)
            loaded[name] = load(artifact, threads=1, hint="f32", batch=batch)
        t = measure_rounds(
            loaded, dict.fromkeys(METHODS, batch), rounds=ROUNDS, warmup=5, min_round_ms=50.0
        )
    found = {("latency_ms", v): latency(t[v]) for v in METHODS}
    return {**found, **{("ratio", f"{v} / float"): ratio(t[v], t["float"]) for v in RATIOS}}


def network() -> nn.Module:
    """Three layers, the same each time."""
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()
