"""ResNet-56 with 2.1 times fewer MACs and no training at all: what a cut alone leaves.

Weights `resnet56-cifar10`, data `cifar10-exact-subset`. Whole channels of the whole network are
ranked together and cut until 2.1 times fewer MACs are left; nothing is trained. What looks at data
sees 1,024 training images. "Agreement" is the share of another 1,000 training images to which the
cut network gives the uncut network's answer, the figure to choose by; top-1 is that of the 1,000
test images (uncut: 92.6 %). Logs published with Torch-Pruning show another ResNet-56 at this
point, before fine-tuning, with 28 % (L1) and about 11 % (BatchNorm scale, GReg). "In 4 steps": a
quarter of the way at a time, each followed by its repair.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.cell import Cell, Values, once, template
from benchmarks.pruning import job
from gracile.analyze.cost import totals
from gracile.core.record import Record
from gracile.graph.capture import capture
from gracile.train.evaluate import predict_module, score
from gracile.train.job import Workplace

NAME = "oneshot"
NETWORK = "resnet56_cifar_a"
WEIGHTS, DATA = "resnet56-cifar10.safetensors", "cifar10-exact-subset"
CELL = "2.1 times fewer MACs"
RATIO = 1 - 1 / 2.1
SPLITS = {"val": "train[6000:7000]", "test": "test", "calibration": 1024}
TRAIN = {"epochs": 0, "batch_size": 128}
METRICS = {
    "top1": "%", "agreement": "share", "reached": "share", "macs": "count", "seconds": "s",
}  # fmt: skip


def cut(criterion: str, steps: int = 1) -> dict[str, Any]:
    """Channels of the whole network, to the target at once or in equal steps."""
    ramp = {"ramp": "linear", "initial": RATIO / steps, "final": RATIO}
    return {
        "prune": "structure",
        "ratio": RATIO if steps == 1 else ramp,
        "target": "macs",
        "criterion": criterion,
        "when": end(steps),
    }


def end(steps: int) -> dict[str, Any]:
    """After no training, once or several times in turn."""
    return {"at": "end"} if steps == 1 else {"at": "end", "times": steps}


def way(criterion: str, repair: str | None = None, steps: int = 1) -> Mapping[str, Any]:
    """The methods of a recipe: a cut and perhaps what makes up for it."""
    found = {"cut": cut(criterion, steps)}
    return {**found, "repair": {"recover": repair, "when": end(steps)}} if repair else found


WAYS: Mapping[str, Mapping[str, Any]] = {
    "random": way("random"),
    "L1": way("l1"),
    "BatchNorm scale": way("norm_scale"),
    "Taylor": way("taylor"),
    "L1, BatchNorm re-estimation": way("l1", "batch_norm"),
    "Taylor, BatchNorm re-estimation": way("taylor", "batch_norm"),
    "random, reconstruction": way("random", "reconstruct"),
    "L1, reconstruction": way("l1", "reconstruct"),
    "Taylor, reconstruction": way("taylor", "reconstruct"),
    "Taylor in 4 steps, reconstruction": way("taylor", "reconstruct", 4),
    "BatchNorm scale, reconstruction": way("norm_scale", "reconstruct"),
    "geometric median, reconstruction": way("geometric_median", "reconstruct"),
    "L1 in 4 steps, reconstruction": way("l1", "reconstruct", 4),
}


def cells() -> Iterator[Cell]:
    """One cell a way."""
    for name, methods in WAYS.items():
        records = tuple(
            template(NAME, CELL, metric, unit, name, split="test", batch=128, shape=(1, 3, 32, 32))
            for metric, unit in METRICS.items()
        )
        yield Cell(NAME, name, "full", records, partial(measure, name, methods))


def measure(name: str, methods: Mapping[str, Any]) -> Values:
    """Cut, repair and score.

    Raises:
        UserError: the data or the weights are not there.
    """
    with tempfile.TemporaryDirectory() as folder:
        at = Workplace(
            job(NETWORK, WEIGHTS, DATA, methods, Path(folder), train=TRAIN, splits=SPLITS)
        )
        dense = at.dense_result.model
        want, _ = predict_module(dense, at.batches("val"))
        start = perf_counter()
        model = at.session.finish().model
        seconds = perf_counter() - start
        got, _ = predict_module(model, at.batches("val"))
        before, after = (totals(m, capture(m, at.example())).macs for m in (dense, model))
        found = {
            "top1": 100 * score(*predict_module(model, at.batches("test"))).top1,
            "agreement": float((want.argmax(1) == got.argmax(1)).double().mean()),
            "reached": 1 - after / before,
            "macs": after,
            "seconds": seconds,
        }
    return {(k, name): once(float(v)) for k, v in found.items()}


TITLES = ("way", "top-1 (%)", "agreement", "MACs", "fewer", "seconds")


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: one row for each way, the highest agreement first."""
    rows: dict[str, dict[str, float]] = {}
    for r in records:
        rows.setdefault(r.subject["variant"], {})[r.metric] = r.value
    lines = [f"| {' | '.join(TITLES)} |", f"|---|{'---:|' * (len(TITLES) - 1)}"]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["agreement"]):
        lines.append(
            f"| {name} | {row['top1']:.1f} | {row['agreement']:.1%} | {row['macs'] / 1e6:.1f} M | "
            f"{1 / (1 - row['reached']):.2f}x | {row['seconds']:.1f} |"
        )
    return lines
