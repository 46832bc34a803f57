"""ResNet-56 teaches ResNet-20: losses compared at equal budget, from scratch and at few bits.

Teacher: `resnet56-cifar10jpeg`. Data `cifar10-jpeg`, scored on test rows 0 to 4,999.

"From scratch": ResNet-20 with random weights, four epochs (SGD, batch 128, cosine from 0.1), three
seeds. "Few bits": ResNet-20 with the weights `resnet20-cifar10jpeg`, one epoch of LSQ (first and
last layer with 8 bits), by itself or with the same teacher (quantized distillation), three seeds.
Every student sees the same images in the same order; what a teacher's forward costs is not in the
budget. The spread is the standard deviation over seeds.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.cell import Cell, Values, once, template
from benchmarks.pruning import DATA, TRAIN, WEIGHTS, job
from gracile.core.record import Record
from gracile.errors import UserError
from gracile.train.evaluate import predict_module, score
from gracile.train.job import Workplace
from gracile.train.loop import fit

NAME = "distillation"
STUDENT, TEACHER = "resnet20_cifar_a", "resnet56_cifar_a"
TEACHER_WEIGHTS = "resnet56-cifar10jpeg.safetensors"
SEEDS = (0, 1, 2)
SCRATCH = {**TRAIN, "epochs": 4, "optimizer": {**TRAIN["optimizer"], "lr": 0.1}}
TUNE = {**TRAIN, "epochs": 1}
STAGES = ["layer1", "layer2", "layer3"]
NONE = "no teacher"
KD = {"kd": {"distill": "kd", "alpha": 0.1, "temperature": 4}}
LEARNING: Mapping[str, Mapping[str, Any]] = {
    NONE: {},
    "KD": KD,
    "DKD": {"kd": {"distill": "kd", "scale": 1, "loss": {"name": "dkd", "alpha": 1, "beta": 8}}},
    "AT": {"at": {"distill": "features", "at": STAGES, "loss": "at"}},
    "FitNets, then KD": {
        "hints": {
            "distill": "features", "at": {"layer2": "layer2"}, "loss": "fitnets", "alpha": 0,
            "when": {"stop": "1ep"},
        },
        "kd": {**KD["kd"], "when": {"start": "1ep"}},
    },
}  # fmt: skip
FEW_BITS = {
    f"{bits} bits, {way}": (bits, learn)
    for bits in (4, 2)
    for way, learn in (("QAT alone", {}), ("QAT with KD", KD))
}
TABLES = {"from scratch": tuple(LEARNING), "few bits": tuple(FEW_BITS)}


def cells() -> Iterator[Cell]:
    """A cell a row and seed; seed 0 of all of them first."""
    for seed in SEEDS:
        for table, rows in TABLES.items():
            for row in rows:
                facts = {"batch": 128, "split": "test[:5000]", "seed": seed}
                records = (template(NAME, table, "top1", "%", row, **facts),)
                run = partial(measure, row, seed)
                yield Cell(NAME, f"{table}/{row}/{seed}", "full", records, run, anywhere=True)


def measure(row: str, seed: int) -> Values:
    """Train one student and score it.

    Raises:
        UserError: the data or the weights are not there.
    """
    root = os.environ.get("GRACILE_MODELS")
    if root is None:
        raise UserError("this benchmark needs GRACILE_MODELS: the folder of weights.")
    bits, learn = FEW_BITS.get(row, (None, LEARNING.get(row, {})))
    teacher = {"model": TEACHER, "weights": str(Path(root) / TEACHER_WEIGHTS)}
    methods: dict[str, Any] = {k: {**v, "teacher": teacher} for k, v in learn.items()}
    if bits is not None:
        methods["q"] = {"quantize": "lsq", "bits": bits, "edges_bits": 8, "when": {"start": "0ep"}}
    weights, train = (None, SCRATCH) if bits is None else (WEIGHTS, TUNE)
    with tempfile.TemporaryDirectory() as folder:
        at = Workplace(job(STUDENT, weights, DATA, methods, Path(folder), seed=seed, train=train))
        fit(at.session, at.train_loader(), progress=False)
        top1 = 100 * score(*predict_module(at.session.finish().model, at.batches("test"))).top1
    return {("top1", row): once(top1)}


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: one row for each way, mean and spread over the seeds there are."""
    found: dict[str, list[float]] = {}
    for r in records:
        found.setdefault(r.subject["variant"], []).append(r.value)
    lines = ["| | top-1 (%) | spread | seeds |", "|---|---:|---:|---:|"]
    for row, values in found.items():
        spread = f"{stdev(values):.2f}" if len(values) > 1 else ""
        lines.append(f"| {row} | {mean(values):.2f} | {spread} | {len(values)} |")
    return lines
