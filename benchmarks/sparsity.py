"""What zeros bring in dense runtimes: 90 % of all weights pruned one by one, against none."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.cell import ROUNDS, Cell, Values, template, value_fields
from benchmarks.networks import SHAPES, compressed, inputs, proven
from gracile.benchmark.runtimes.base import load
from gracile.benchmark.timing import compare

NAME = "sparsity"
NETWORK = "resnet20_cifar_a"
RUNTIMES = ("openvino", "onnxruntime")
VARIANTS = ("dense", "90 % zeros")
METRICS = {"latency_ms": "ms", "speedup": "ratio"}


def cells() -> Iterator[Cell]:
    """A cell for each runtime."""
    for runtime in RUNTIMES:
        facts = {
            "runtime": runtime,
            "precision_hint": "f32",
            "batch": 1,
            "shape": (1, *SHAPES[NETWORK]),
        }
        records = tuple(
            template(NAME, runtime, metric, unit, variant, **facts)
            for variant in VARIANTS
            for metric, unit in METRICS.items()
            if not (metric == "speedup" and variant == "dense")
        )
        yield Cell(NAME, runtime, "full", records, partial(measure, runtime))


def measure(runtime: str) -> Values:
    """Time both in turn."""
    x = inputs(SHAPES[NETWORK], 2)
    with TemporaryDirectory() as folder:
        loaded = {}
        for variant in VARIANTS:
            result = compressed(NETWORK, variant, runtime)
            artifact = proven(result, runtime, Path(folder) / variant[:2], x)
            loaded[variant] = load(artifact, threads=1, hint="f32", batch=1)
        found = compare(loaded, rounds=ROUNDS, batch=1)
    return {(r.metric, r.subject["model"]): value_fields(r) for r in found if r.metric in METRICS}
