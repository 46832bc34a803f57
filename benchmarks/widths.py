"""What a width costs: four convolutions of 16 to 48 channels, in both runtimes."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.cell import ROUNDS, Cell, Values, template, value_fields
from benchmarks.networks import Chain, inputs
from gracile import Plan, registry
from gracile.benchmark.runtimes.base import load
from gracile.benchmark.timing import compare
from gracile.core.plan import Architecture

NAME = "widths"
WIDTHS = (16, 20, 28, 32, 36, 48)
SIDE = 32
RUNTIMES = ("openvino", "onnxruntime")


def cells() -> Iterator[Cell]:
    """A cell for each runtime."""
    for runtime in RUNTIMES:
        records = tuple(
            template(
                NAME, runtime, "latency_ms", "ms", str(width), runtime=runtime,
                precision_hint="f32", batch=1, shape=(1, width, SIDE, SIDE),
            )
            for width in WIDTHS
        )  # fmt: skip
        yield Cell(NAME, runtime, "smoke", records, partial(measure, runtime))


def measure(runtime: str) -> Values:
    """Time all widths in turn."""
    write = registry.get("exporter", runtime).obj
    plan = Plan(architecture=Architecture(name="chain"))
    with TemporaryDirectory() as folder:
        loaded = {}
        for width in WIDTHS:
            torch.manual_seed(0)
            x = inputs((width, SIDE, SIDE), 2)
            artifact = write(Chain(width).eval(), plan, {}, x, Path(folder) / str(width), {})
            loaded[str(width)] = load(artifact, threads=1, hint="f32", batch=1)
        found = compare(loaded, rounds=ROUNDS, batch=1)
    return {
        (r.metric, r.subject["model"]): value_fields(r) for r in found if r.metric == "latency_ms"
    }
