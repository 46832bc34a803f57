"""What halving filters and INT8 bring in every runtime: dense, half, INT8 and both, in turn.

Each row is a recipe and its Plan; nothing is trained, ranges come from 8 random images. PyTorch
runs INT8 by its engine x86, and "compiled" is torch.compile's program. Every unit of an artifact
was compared with PyTorch before it was timed: "off by" is the largest difference in levels of a
unit's grid (of the largest value, where nothing is on a grid), "top-1" how often runtime and
PyTorch choose the same class of 16 random images. IQR is of all inferences.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.cell import ROUNDS, Cell, Values, once, template, value_fields
from benchmarks.networks import SHAPES, compressed, inputs, written
from gracile import capture
from gracile.analyze.cost import totals
from gracile.benchmark.artifact import Artifact
from gracile.benchmark.runtimes.base import load
from gracile.benchmark.timing import compare
from gracile.core.record import Record
from gracile.core.result import Result
from gracile.export import parity
from gracile.units import human_bytes, human_count

NAME = "runtimes"
TIERS = {"resnet20_cifar_a": "smoke", "mobilenet_v2": "full", "resnet50": "full"}
SMOKE = ("openvino", "onnxruntime")
VARIANTS = {"dense": "CPU", "half": "CPU", "int8": "CPU", "half int8": "CPU"}
PYTORCH = {
    "dense": "CPU", "half": "CPU", "int8": "x86", "half int8": "x86",
    "dense compiled": "compile", "half compiled": "compile", "int8 qnnpack": "qnnpack",
}  # fmt: skip
# Runtime -> variant -> its device.
RUNTIMES: Mapping[str, Mapping[str, str]] = {
    "openvino": VARIANTS,
    "onnxruntime": VARIANTS,
    "ncnn": VARIANTS,
    "executorch": VARIANTS,
    "litert": VARIANTS,
    "pytorch": PYTORCH,
}
PROFILES = {"pytorch": "portable"}
THREADS = (1, 2)
ONE_NUMBER_OF_THREADS = ("executorch",)  # for all programs of a process
IMAGES = 16
METRICS = {
    "latency_ms": "ms",
    "speedup": "ratio",
    "drift": "flag",
    "macs": "count",
    "artifact_bytes": "bytes",
    "convolutions": "count",
    "convolutions_integer": "count",
    "off_by": "levels",
    "cosine": "cosine",
    "agreement": "share",
}


def cells() -> Iterator[Cell]:
    """A cell for each network, runtime and number of threads."""
    for network, tier in TIERS.items():
        for runtime, variants in RUNTIMES.items():
            for threads in THREADS:
                cell = f"{network} {runtime}, {threads} thread" + ("s" if threads > 1 else "")
                facts = {
                    "runtime": runtime, "precision_hint": "f32", "batch": 1, "threads": threads,
                    "shape": (1, *SHAPES[network]),
                }  # fmt: skip
                records = tuple(
                    template(NAME, cell, metric, unit, variant, **facts)
                    for variant in variants
                    for metric, unit in METRICS.items()
                    if not (metric == "speedup" and variant == "dense")
                )
                smoke = tier == "smoke" and runtime in SMOKE and threads == 1
                act = partial(measure, network, runtime, threads)
                yield Cell(NAME, cell, "smoke" if smoke else "full", records, act)


def measure(network: str, runtime: str, threads: int) -> Values:
    """Compare the variants' artifacts with PyTorch, and time them in turn."""
    if runtime not in ONE_NUMBER_OF_THREADS:
        return _figures(network, runtime, threads)
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:
        return apart.submit(_figures, network, runtime, threads).result()


def _figures(network: str, runtime: str, threads: int) -> Values:
    _, exported = _exported(network, runtime)
    out: dict[tuple[str, str], dict[str, object]] = {}
    x = inputs(SHAPES[network], IMAGES)
    loaded = {}
    for variant, device in RUNTIMES[runtime].items():
        result, artifact = exported[_recipe(variant)]
        one = load(artifact, threads=threads, hint="f32", batch=1, device=device)
        report = parity.check(result.model, one, x)
        if report.first_bad is not None:
            parity.require(report, result.plan)
        convolutions = [k for k in one.kernels() if k.is_convolution]
        figures = {
            "macs": totals(result.model, capture(result.model, x[:2])).macs,
            "artifact_bytes": artifact.size_bytes,
            "convolutions": len(convolutions),
            "convolutions_integer": sum(k.is_integer for k in convolutions),
            "off_by": _off_by(report),
            "cosine": report.cosine,
            "agreement": report.agreement,
        }
        out |= {(metric, variant): once(value) for metric, value in figures.items()}
        loaded[variant] = one
    for r in compare(loaded, rounds=ROUNDS, batch=1):
        if r.metric in METRICS:
            out[r.metric, r.subject["model"]] = value_fields(r)
    return out


@lru_cache(maxsize=1)
def _exported(
    network: str, runtime: str
) -> tuple[TemporaryDirectory[str], dict[str, tuple[Result, Artifact]]]:
    """The artifacts of each recipe, written once for all numbers of threads; they go with the
    folder."""
    folder = TemporaryDirectory()
    x = inputs(SHAPES[network], 2)
    found = {}
    for recipe in dict.fromkeys(map(_recipe, RUNTIMES[runtime])):
        result = compressed(network, recipe, PROFILES.get(runtime, runtime))
        found[recipe] = result, written(result, runtime, Path(folder.name) / recipe, x)
    return folder, found


def _recipe(variant: str) -> str:
    """What was done to the network, however it is run."""
    return variant.removesuffix(" compiled").removesuffix(" qnnpack")


def _off_by(report: parity.ParityReport) -> float:
    """Levels of the unit that is off the most; without grids, of the largest value."""
    if report.max_lsb is not None:
        return report.max_lsb
    return max((u.relative for u in report.units), default=report.max_abs)


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: one row for each variant; older Records have fewer columns."""
    rows: dict[str, dict[str, Record]] = {}
    for r in records:
        rows.setdefault(r.subject["variant"], {})[r.metric] = r
    lines = [
        f"| | {' | '.join(t for t, _ in COLUMNS.values())} |",
        f"|---|{'---:|' * len(COLUMNS)}",
    ]
    for variant, row in rows.items():
        shown = (how(row[metric]) if metric in row else "" for metric, (_, how) in COLUMNS.items())
        lines.append(f"| {variant} | {' | '.join(shown)} |")
    return lines


def _interval(r: Record) -> str:
    return f"{r.value:.3g}x [{r.ci95[0]:.3g}, {r.ci95[1]:.3g}]" if r.ci95 else f"{r.value:.3g}x"


# Metric -> title, and how a Record of it is shown.
COLUMNS: Mapping[str, tuple[str, Callable[[Record], str]]] = {
    "latency_ms": ("latency (IQR), ms", lambda r: f"{r.value:.3g} ({r.iqr or 0:.2g})"),
    "speedup": ("speed-up", _interval),
    "macs": ("multiply-adds", lambda r: human_count(r.value)),
    "artifact_bytes": ("artifact", lambda r: human_bytes(r.value)),
    "convolutions": ("convolutions", lambda r: f"{r.value:.0f}"),
    "convolutions_integer": ("in integers", lambda r: f"{r.value:.0f}"),
    "off_by": ("off by", lambda r: f"{r.value:.2g}"),
    "cosine": ("cosine", lambda r: f"{r.value:.6f}"),
    "agreement": ("top-1", lambda r: f"{r.value:.1%}"),
    "drift": ("drifted", lambda r: "yes" if r.value else "no"),
}
