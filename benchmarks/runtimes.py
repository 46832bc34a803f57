"""What halving filters and INT8 bring in real runtimes: dense, half, INT8 and both, in turn."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.cell import ROUNDS, Cell, Values, once, template, value_fields
from benchmarks.networks import SHAPES, compressed, inputs, proven
from gracile import capture
from gracile.analyze.cost import totals
from gracile.benchmark.runtimes.base import load
from gracile.benchmark.timing import compare

NAME = "runtimes"
TIERS = {"resnet20_cifar_a": "smoke", "mobilenet_v2": "full", "resnet50": "full"}
VARIANTS = ("dense", "half", "int8", "half int8")
RUNTIMES = ("openvino", "onnxruntime")
METRICS = {
    "latency_ms": "ms",
    "speedup": "ratio",
    "drift": "flag",
    "macs": "count",
    "artifact_bytes": "bytes",
    "convolutions": "count",
    "convolutions_integer": "count",
}


def cells() -> Iterator[Cell]:
    """A cell for each network and runtime."""
    for network, tier in TIERS.items():
        for runtime in RUNTIMES:
            cell = f"{network} {runtime}"
            records = []
            for variant in VARIANTS:
                facts = {
                    "runtime": runtime,
                    "precision_hint": "f32",
                    "batch": 1,
                    "shape": (1, *SHAPES[network]),
                }
                for metric, unit in METRICS.items():
                    if not (metric == "speedup" and variant == "dense"):
                        records.append(template(NAME, cell, metric, unit, variant, **facts))
            yield Cell(NAME, cell, tier, tuple(records), partial(measure, network, runtime))


def measure(network: str, runtime: str) -> Values:
    """Export the four variants and time them in turn."""
    out: dict[tuple[str, str], dict[str, object]] = {}
    with TemporaryDirectory() as folder:
        loaded = {}
        for variant in VARIANTS:
            result = compressed(network, variant, runtime)
            x = inputs(SHAPES[network], 2)
            out["macs", variant] = once(totals(result.model, capture(result.model, x)).macs)
            artifact = proven(result, runtime, Path(folder) / variant, x)
            loaded[variant] = load(artifact, threads=1, hint="f32", batch=1)
            convolutions = [k for k in loaded[variant].kernels() if k.is_convolution]
            out["artifact_bytes", variant] = once(artifact.size_bytes)
            out["convolutions", variant] = once(len(convolutions))
            out["convolutions_integer", variant] = once(sum(k.is_integer for k in convolutions))
        for r in compare(loaded, rounds=ROUNDS, batch=1):
            if r.metric in METRICS:
                out[r.metric, r.subject["model"]] = value_fields(r)
    return out
