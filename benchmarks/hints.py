"""How far OpenVINO's precision hint moves a latency: one float artifact, hint f32 and bf16."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.cell import ROUNDS, Cell, Values, latency, ratio, template
from benchmarks.networks import SHAPES, compressed, inputs, proven
from gracile.benchmark.runtimes.base import load
from gracile.benchmark.timing import measure as measure_rounds

NAME = "hints"
NETWORK = "resnet20_cifar_a"
HINTS = ("f32", "bf16")


def cells() -> Iterator[Cell]:
    """One cell."""
    facts = {"runtime": "openvino", "batch": 1, "shape": (1, *SHAPES[NETWORK])}
    records = [
        template(NAME, NETWORK, "latency_ms", "ms", hint, precision_hint=hint, **facts)
        for hint in HINTS
    ]
    records.append(
        template(NAME, NETWORK, "ratio", "ratio", "f32 / bf16", precision_hint="f32, bf16", **facts)
    )
    yield Cell(NAME, NETWORK, "smoke", tuple(records), measure)


def measure() -> Values:
    """Interleave both hints; the ratio says what comparing across hints would be off by."""
    with TemporaryDirectory() as folder:
        x = inputs(SHAPES[NETWORK], 2)
        result = compressed(NETWORK, "dense", "openvino")
        artifact = proven(result, "openvino", Path(folder), x)
        loaded = {h: load(artifact, threads=1, hint=h, batch=1) for h in HINTS}
        t = measure_rounds(
            loaded, dict.fromkeys(HINTS, 1), rounds=ROUNDS, warmup=5, min_round_ms=50.0
        )
    found = {("latency_ms", h): latency(t[h]) for h in HINTS}
    return {**found, ("ratio", "f32 / bf16"): ratio(t["f32"], t["bf16"])}
