"""Does a runtime compute the integers that PyTorch simulates? Every fused unit, on real images.

Weights `resnet{20,56}-cifar10`, the first 100 exact test images of `cifar10-exact-subset`, each
profile in the runtimes it is for. Networks are quantized after training (`ptq`, percentile ranges;
4 and 2 bits leave no accuracy worth telling, which is not the question here). The artifact is cut
at its quantizers and each unit is fed what PyTorch computed there, so that it shows its own error
only: "off by" is the largest difference in levels of the unit's grid, "share off" the largest share
of a unit's numbers that is off at all. Then both compute on their own from the image to the logits:
smallest cosine of a sample, and how often the same class wins.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cell import Cell, Values, once, template
from benchmarks.pruning import job
from gracile.benchmark.runtimes.base import load
from gracile.core.record import Record
from gracile.export import parity
from gracile.train.job import Workplace

NAME = "integer_proof"
DATA = "cifar10-exact-subset"
SHAPE = (1, 3, 32, 32)
IMAGES = 100
SPLITS = {"val": "train[6000:7000]", "test": "test", "calibration": 300}
TRAIN = {"epochs": 0, "batch_size": 128}
DEPTHS = (20, 56)
BITS = (8, 4, 2)
ONLY_8 = ("executorch",)  # takes no activations of fewer bits
PLACES = (
    ("openvino", "openvino"),
    ("onnxruntime", "onnxruntime"),
    ("portable", "openvino"),
    ("portable", "onnxruntime"),
    ("ncnn", "ncnn"),
    ("xnnpack", "executorch"),
    ("litert", "litert"),
)
METRICS = {
    "units": "count", "exact": "count", "max_lsb": "levels", "share_off": "share",
    "cosine": "cosine", "agreement": "share",
}  # fmt: skip


def cells() -> Iterator[Cell]:
    """A cell for each network, profile and runtime."""
    for depth in DEPTHS:
        for profile, runtime in PLACES:
            name = f"ResNet-{depth}, profile {profile}, {runtime}"
            records = tuple(
                template(
                    NAME, name, metric, unit, f"W{b}A{b}", split=f"test[:{IMAGES}]",
                    runtime=runtime, precision_hint="f32", batch=IMAGES, shape=SHAPE,
                )
                for b in _bits(runtime)
                for metric, unit in METRICS.items()
            )  # fmt: skip
            notes: dict[str, Any] = {}
            run = partial(measure, depth, profile, runtime, notes)
            yield Cell(NAME, name, "full", records, run, notes)


def measure(depth: int, profile: str, runtime: str, notes: dict[str, Any]) -> Values:
    """Quantize, export and compare unit by unit, for each number of bits.

    Raises:
        UserError: the data or the weights are not there.
    """
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for bits in _bits(runtime):
        with tempfile.TemporaryDirectory() as folder:
            report = _report(depth, profile, runtime, bits, Path(folder))
        grids = [u for u in report.units if u.lsb is not None]
        off = {u.id: f"{u.lsb:g} ({u.share:.2%})" for u in grids if u.lsb}
        variant = f"W{bits}A{bits}"
        notes[variant] = off
        values = {
            "units": len(grids),
            "exact": len(grids) - len(off),
            "max_lsb": max((float(u.lsb or 0) for u in grids), default=0.0),
            "share_off": max((u.share for u in grids), default=0.0),
            "cosine": report.cosine,
            "agreement": report.agreement,
        }
        found |= {(k, variant): once(v) for k, v in values.items()}
    return found


def _bits(runtime: str) -> tuple[int, ...]:
    return BITS[:1] if runtime in ONLY_8 else BITS


def _report(depth: int, profile: str, runtime: str, bits: int, folder: Path) -> parity.ParityReport:
    method = {
        "quantize": "ptq", "bits": bits, "profile": profile, "observer": "percentile",
        "when": {"at": "end"},
    }  # fmt: skip
    at = Workplace(
        job(
            f"resnet{depth}_cifar_a", f"resnet{depth}-cifar10.safetensors", DATA, {"q": method},
            folder, train=TRAIN, splits=SPLITS, runtime=runtime,
        )
    )  # fmt: skip
    result = at.session.finish()
    artifact = at.exported(runtime, result, folder / "artifact")
    images = torch.cat([x for x, _ in at.batches("test")])[:IMAGES]
    return parity.check(result.model, load(artifact, threads=1, hint="f32", batch=None), images)


TITLES = (
    "bits", "quantized units", "of them exact", "off by (levels)", "share off", "cosine", "top-1",
)  # fmt: skip


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: one row for each number of bits, then the units that are off."""
    rows: dict[str, dict[str, Record]] = {}
    for r in records:
        rows.setdefault(r.subject["variant"], {})[r.metric] = r
        cell = r.subject["cell"]
    lines = [f"| {' | '.join(TITLES)} |", f"|---|{'---:|' * (len(TITLES) - 1)}"]
    for variant, row in rows.items():
        v = {k: r.value for k, r in row.items()}
        lines.append(
            f"| {variant} | {v['units']:.0f} | {v['exact']:.0f} | {v['max_lsb']:g} | "
            f"{v['share_off']:.2%} | {v['cosine']:.6f} | {v['agreement']:.1%} |"
        )
    for variant, off in texts.get(cell, {}).items():
        if off:
            lines += ["", f"Off in {variant}: " + ", ".join(f"`{k}` {v}" for k, v in off.items())]
    return lines
