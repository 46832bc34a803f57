"""Layers as products of smaller ones: schemes and ranks, what they lose, and what they bring.

"resnet20", "vgg16": every convolution but the first is factorized to the same share of its own
MACs, or (knapsack, sensitivity) all of them to that share together. ResNet-20 has the weights
`resnet20-cifar10jpeg`; VGG-16 has no published ones here and is trained by the benchmark first, for
two epochs from random weights (SGD, 0.05), far from its best. Data `cifar10-jpeg`. "Error" is that
of the network's answers right after, relative to the answers' size, and "right after" the top-1,
both on test rows 5,000 to 9,999 with the statistics of batch norms as they were; "tuned" after 100
steps with the network before as teacher (batch 128, SGD 0.02), on rows 0 to 4,999. Times are of one
image in OpenVINO, f32, one thread, beside the network before in interleaved rounds. "Refused" is
how many of the replacements a table of OpenVINO's times would not have made (option `latency`): the
network with that one layer replaced is predicted to be no faster.

"cp": ways to find a canonical decomposition, for the convolutions of ResNet-20's third stage, at a
quarter of their MACs. "denil": a perceptron on MNIST (784-500-500-10, three epochs from random
weights) of which one weight in twenty is learned and the others are predicted from these by a
kernel over pixels, or by the covariance of what the layer reads; scored on 3,000 test images.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import isnan, nan
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.cell import MANY_ROUNDS, Cell, Values, once, template, value_fields
from benchmarks.pruning import DATA, NETWORK, RUNTIME, SHAPE, SPLITS, TRAIN, WEIGHTS, job
from gracile.analyze.cost import totals
from gracile.benchmark.timing import compare
from gracile.core.record import Record
from gracile.core.result import Result
from gracile.graph.capture import capture
from gracile.latency.table import Table
from gracile.latency.unit import Setting
from gracile.lowrank.faster import Faster, LatencyRef
from gracile.nn.chain import drawn, layer_of
from gracile.nn.schemes import chain_of
from gracile.train.evaluate import predict_module, score
from gracile.train.job import Workplace
from gracile.train.loop import fit

NAME = "lowrank"
START = {"at": "0ep"}
KD = {"kd": {"distill": "kd", "alpha": 0.1, "temperature": 4}}
TUNE = {**TRAIN, "epochs": 1}
SHORT = {**SPLITS, "train": "train[:12800]"}  # 100 steps
SCRATCH = {**TRAIN, "epochs": 2, "optimizer": {**TRAIN["optimizer"], "lr": 0.05}}
VGG = "vgg16_bn_cifar"
NETWORKS = {"resnet20": NETWORK, "vgg16": VGG}
EVERY = {"resnet20": ["type:Conv2d", "!conv1.weight"], "vgg16": ["type:Conv2d", "!features.0.*"]}
THIRD = ["layer3.*.conv1.weight", "layer3.*.conv2.weight"]
RATIOS = (0.5, 0.25)
PLAIN: Mapping[str, Any] = {
    "SVD": {"scheme": "svd"},
    "SVD by data": {"scheme": "svd_response"},
    "3x1, then 1x3": {"scheme": "scheme2"},
    "Tucker-2": {"scheme": "tucker2"},
    "CP, 3x3 whole": {"scheme": "cp3"},
}
MORE: Mapping[str, Any] = {
    "filters of each channel": {"scheme": "scheme1"},
    "SVD by data, fitted": {"scheme": "svd_response", "fit": True},
    "Tucker-2, fitted": {"scheme": "tucker2", "fit": True},
}
TOGETHER = {"SVD by data, knapsack": "knapsack", "SVD by data, sensitivity": "sensitivity"}
CP = {how: {"scheme": {"name": "cp", "how": how}} for how in ("random", "greedy", "nls")}
METRICS = {
    "error": "share", "top1_cut": "%", "top1": "%", "params": "count", "macs": "count",
    "factorized": "count", "refused": "count", "latency_ms": "ms", "speedup": "ratio",
}  # fmt: skip
LEARNED = 0.05
MLP_TRAIN = {
    "epochs": 3, "batch_size": 128, "augment": "none",
    "optimizer": {"class": "Adam", "lr": 0.001},
}  # fmt: skip
MLP_SPLITS = {"val": "train[58000:]", "train": "train[:58000]", "test": "test", "calibration": 1000}
DENIL: Mapping[str, Mapping[str, Any]] = {
    "all weights": {},
    "5 %, pixels then covariance": {
        "first": {"weights": "first", "scheme": {"name": "denil", "width": 3.0}},
        "second": {"weights": "second", "scheme": "denil_data"},
    },
    "5 %, covariance": {"both": {"weights": ["first", "second"], "scheme": "denil_data"}},
    "5 % of the ranks, all learned (SVD)": {
        "both": {"weights": ["first", "second"], "scheme": "svd"},
    },
}  # fmt: skip


class MLP(nn.Sequential):
    """Two hidden layers of 500 units, as in Denil et al. 2013.

    Args:
        num_classes: outputs.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.flatten = nn.Flatten()
        self.first, self.relu = nn.Linear(784, 500), nn.ReLU()
        self.second, self.relu2 = nn.Linear(500, 500), nn.ReLU()
        self.head = nn.Linear(500, num_classes)


def rows(table: str) -> dict[str, Mapping[str, Any]]:
    """Row -> options of `lowrank: factorize`."""
    if table == "cp":
        share = {"rank": {"name": "macs", "ratio": 0.25}, "weights": THIRD}
        return {how: {**options, **share} for how, options in CP.items()}
    schemes = {**PLAIN, **(MORE if table == "resnet20" else {})}
    found: dict[str, Mapping[str, Any]] = {}
    for ratio in RATIOS:
        end, weights = f", {ratio:.0%} of the MACs", EVERY[table]
        for name, options in schemes.items():
            rank = {"name": "macs", "ratio": ratio}
            found[name + end] = {**options, "rank": rank, "weights": weights}
        for name, rule in TOGETHER.items():
            rank = {"name": rule, "ratio": ratio}
            found[name + end] = {"scheme": "svd_response", "rank": rank, "weights": weights}
    return found


def cells() -> Iterator[Cell]:
    """A cell a row: ResNet-20 first, then CP and MNIST, VGG-16 last."""
    facts = {"batch": 1, "shape": SHAPE, "split": "test[:5000]", "precision_hint": "f32"}
    for table in ("resnet20", "cp", "denil", "vgg16"):
        if table == "denil":
            for row in DENIL:
                records = [template(NAME, table, m, u, row, batch=128, split="test")
                           for m, u in (("top1", "%"), ("learned", "share"))]  # fmt: skip
                run = partial(mlp, row)
                yield Cell(NAME, f"{table}/{row}", "full", tuple(records), run, anywhere=True)
            continue
        for row, options in rows(table).items():
            records = [template(NAME, table, m, u, row, runtime=RUNTIME, **facts)
                       for m, u in METRICS.items()]  # fmt: skip
            notes: dict[str, Any] = {}
            run = partial(measure, table, row, options, notes)
            yield Cell(NAME, f"{table}/{row}", "full", tuple(records), run, notes, anywhere=True)


def measure(table: str, row: str, options: Mapping[str, Any], notes: dict[str, Any]) -> Values:
    """Factorize, tune, score, export, time, and ask the table about each replacement.

    Raises:
        UserError: the data or the weights are not there.
    """
    network = NETWORKS.get(table, NETWORK)
    entry = {"lowrank": "factorize", **options, "when": START}
    with tempfile.TemporaryDirectory() as folder:
        asked = job(network, None, DATA, {"r": entry, **KD}, Path(folder), train=TUNE, splits=SHORT)
        at = Workplace(replace(asked, weights=weights_of(network)))
        seen: list[float] = []

        def val() -> Iterable[tuple[Tensor, Tensor]]:
            if not seen:  # asked first right after the layers were replaced
                seen.append(_error(at))
            return at.batches("val")

        fit(at.session, at.train_loader(), val=val, progress=False)
        cut = at.session.history.get("val_top1_cut", [(0.0, nan)])[0][1]
        result = at.session.finish()
        top1 = score(*predict_module(result.model, at.batches("test"))).top1
        cost = totals(result.model, capture(result.model, at.example()))
        edits = result.plan.of_kind("factorize")
        refused = _refused(at, edits, network)
        notes["refused"] = refused
        found = {
            "error": seen[0] if edits else 0.0, "top1_cut": 100 * cut, "top1": 100 * top1,
            "params": sum(p.numel() for p in result.model.parameters()), "macs": cost.macs,
            "factorized": len(edits), "refused": len(refused),
        }  # fmt: skip
        times = _times(at, result, Path(folder))
    return {(m, row): v for m, v in ({k: once(float(v)) for k, v in found.items()} | times).items()}


def mlp(row: str) -> Values:
    """Train the perceptron as a row says.

    Raises:
        UserError: the data are not there.
    """
    rank = {"name": "fixed", "share": LEARNED}
    methods = {
        k: {"lowrank": "factorize", "rank": rank, "round_to": 1, "when": START, **v}
        for k, v in DENIL[row].items()
    }
    with tempfile.TemporaryDirectory() as folder:
        model = f"{Path(__file__)}:MLP"
        asked = job(model, None, "mnist", methods, Path(folder), train=MLP_TRAIN, splits=MLP_SPLITS)
        at = Workplace(asked)
        whole = sum(p.numel() for p in at.dense_result.model.parameters())
        fit(at.session, at.train_loader(), progress=False)
        model_now = at.session.finish().model
        learned = sum(p.numel() for p in model_now.parameters() if p.requires_grad) / whole
        top1 = score(*predict_module(model_now, at.batches("test"))).top1
    return {("top1", row): once(100 * top1), ("learned", row): once(learned)}


def weights_of(network: str) -> Path:
    """Where the weights of a network lie; those of VGG-16 are trained if they are not there."""
    if network != VGG:
        return Path(os.environ["GRACILE_MODELS"]) / WEIGHTS
    file = _kept(f"{VGG}.safetensors")
    if not file.exists():
        with tempfile.TemporaryDirectory() as folder:
            at = Workplace(job(VGG, None, DATA, {}, Path(folder), train=SCRATCH))
            fit(at.session, at.train_loader(), progress=False)
            save_file(at.session.finish().model.state_dict(), file)
    return file


def _kept(name: str) -> Path:
    """A file for all cells of this benchmark, not for the results."""
    folder = Path(tempfile.gettempdir()) / f"gracile-lowrank-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder / name


def _error(at: Workplace) -> float:
    """||answers now - answers before|| / ||answers before|| on the validation images."""
    before, now = (
        predict_module(m, at.batches("val"))[0]
        for m in (at.dense_result.model, at.session.present())
    )
    return float((now - before).norm() / before.norm())


def _refused(at: Workplace, edits: Iterable[Any], network: str) -> list[str]:
    """Which of these replacements a table would not make: `layer: both times`."""
    dense, file = at.dense_result.model, _kept(f"{network}.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        artifact = at.exported(RUNTIME, at.dense_result, Path(folder) / "dense")
        setting = Setting.of(at.load(RUNTIME, artifact, dense))
    table = Table.load(file) if file.exists() else Table()
    table.at(setting)
    table.save(file)
    ref = LatencyRef(str(file), setting.runtime, setting.threads, measure=True)
    faster, rng, out = Faster(ref, "<python>"), torch.Generator().manual_seed(0), []
    for edit in edits:
        chain = chain_of(edit.scheme, layer_of(dense.get_submodule(edit.at)), edit.ranks)
        factors = {edit.at: drawn(chain, rng)}
        why = faster.refusal(dense, [edit], factors, at.example())
        out += [f"{edit.at}: {why}"] if why else []
    return out


def _times(at: Workplace, result: Result, folder: Path) -> dict[str, dict[str, Any]]:
    loaded = {}
    for which, r in (("dense", at.dense_result), ("compressed", result)):
        artifact = at.exported(RUNTIME, r, folder / which)
        loaded[which] = at.load(RUNTIME, artifact, r.model)
    found = {(r.subject["model"], r.metric): r for r in compare(loaded, rounds=MANY_ROUNDS)}
    return {m: value_fields(found["compressed", m]) for m in ("latency_ms", "speedup")}


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: one row for each way; below it the layers that a table would have refused."""
    found: dict[str, dict[str, Record]] = {}
    place = ""
    for r in records:
        place = r.subject["cell"]
        found.setdefault(r.subject["variant"], {})[r.metric] = r
    if all("learned" in row for row in found.values()):
        lines = ["| | top-1 (%) | learned |", "|---|---:|---:|"]
        return lines + [
            f"| {n} | {row['top1'].value:.2f} | {row['learned'].value:.1%} |"
            for n, row in found.items()
        ]
    heads = (
        "error", "right after (%)", "tuned (%)", "parameters", "MACs", "layers", "refused", "ms",
        "times faster",
    )  # fmt: skip
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for name, row in found.items():
        v = {m: r.value for m, r in row.items()}
        cells = (
            f"{v['error']:.3f}", "" if isnan(v["top1_cut"]) else f"{v['top1_cut']:.2f}",
            f"{v['top1']:.2f}", f"{v['params'] / 1e3:.0f} k", f"{v['macs'] / 1e6:.1f} M",
            f"{v['factorized']:.0f}", f"{v['refused']:.0f}", f"{v['latency_ms']:.3f}",
            f"{v['speedup']:.2f}",
        )  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in found:
        why = texts.get(f"{place}/{name}", {}).get("refused", [])
        if why:
            lines += ["", f"{name}, refused: {'; '.join(why)}."]
    return lines
