"""Early exit on ResNet-56: accuracy against mean latency, beside pruned and smaller networks.

Network `resnet56_cifar_a` with the weights `resnet56-cifar10jpeg`, data `cifar10-jpeg`. Exits with
a 3x3 convolution stand behind layer1 and layer2 and are trained with the network for two epochs;
calibrated, and their thresholds chosen for several mean costs, on test rows 5,000 to 9,999.
Referees: the same network with the same share of channels gone in every layer, and ResNet-20
(`resnet20-cifar10jpeg`), trained for as long in the same way. Scored on test rows 0 to 4,999. Times
are of the first 200 images of rows 5,000 to 9,999, one by one, f32, one thread, in interleaved
rounds beside ResNet-56 as it was.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cell import Cell, Values, once, template, value_fields
from benchmarks.distillation import STUDENT, TEACHER, TEACHER_WEIGHTS
from benchmarks.pruning import DATA, SHAPE, TRAIN, WEIGHTS, job
from benchmarks.pruning_methods import cut
from gracile.analyze.cost import totals
from gracile.core.record import Record
from gracile.core.result import Result
from gracile.early_exit.cascade import exit_macs
from gracile.early_exit.thresholds import Operation, as_arrays, curve, most_accurate, operate
from gracile.export import parity
from gracile.graph.capture import capture
from gracile.nn.exits import choice_of
from gracile.train.evaluate import predict_module, score
from gracile.train.exits import all_answers, time_on_inputs
from gracile.train.job import Workplace
from gracile.train.loop import fit

NAME = "early_exit"
NETWORK = TEACHER
RUNTIMES = ("openvino", "onnxruntime")
ROUNDS = 5
LEARN = {**TRAIN, "epochs": 2}
EXITS = {
    "exits": {
        "early_exit": "branches",
        "at": ["layer1", "layer2"],
        "head": "conv_pool_linear",
        "goal": {"max_drop": 0.5},
    }
}
COSTS = (0.5, 0.6, 0.7, 0.8, 0.9)  # mean multiply-adds that thresholds are chosen for
POINTS = {f"exits, mean cost {c}": c for c in COSTS} | {"exits, none taken": None}
PRUNED = (0.3, 0.5, 0.7)  # of the multiply-adds that go
REFEREES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "trained on": (NETWORK, TEACHER_WEIGHTS, {}),
    **{
        f"pruned, {100 * share:.0f} % of the MACs": (
            NETWORK, TEACHER_WEIGHTS, cut("l1", scope="layer", ratio=share),
        )
        for share in PRUNED
    },
    "ResNet-20": (STUDENT, WEIGHTS, {}),
}  # fmt: skip
METRICS = {"top1": "%", "mean_macs": "count"}
TIMES = {"mean_latency_ms": "ms", "mean_speedup": "ratio"}


def cells() -> Iterator[Cell]:
    """One for the exits, all their thresholds in it, and one for each referee."""
    yield _cell("exits", tuple(POINTS), exits)
    for row in REFEREES:
        yield _cell(row, (row,), partial(referee, row))


def _cell(name: str, rows: tuple[str, ...], run: Any) -> Cell:
    facts = {"batch": 1, "shape": SHAPE, "split": "test[:5000]", "precision_hint": "f32"}
    records = []
    for row in rows:
        records += [template(NAME, NETWORK, m, unit, row, **facts) for m, unit in METRICS.items()]
        records += [
            template(NAME, NETWORK, f"{m} {runtime}", unit, row, runtime=runtime, **facts)
            for runtime in RUNTIMES
            for m, unit in TIMES.items()
        ]
    return Cell(NAME, name, "full", tuple(records), run, anywhere=True)


def exits() -> Values:
    """Train the exits once; score, export and time at thresholds for several mean costs.

    Raises:
        UserError: the data or the weights are not there.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        at = Workplace(job(NETWORK, TEACHER_WEIGHTS, DATA, EXITS, Path(folder), train=LEARN))
        result = trained(at)
        until, whole = exit_macs(result.model, at.example())
        points = _points(at, result, [macs / whole for macs in until])
        for row, point in points.items():
            _settle(result, point)
            found |= _judged(at, at, result, row, Path(folder) / row)
            taken = _rates(at, result, point)
            mean = sum(rate * macs for rate, macs in zip(taken, until, strict=True))
            found["mean_macs", row] = once(mean)
    return found


def referee(row: str) -> Values:
    """Train another network for as long, and time it beside the same baseline.

    Raises:
        UserError: the data or the weights are not there.
    """
    network, weights, methods = REFEREES[row]
    with tempfile.TemporaryDirectory() as folder:
        at = Workplace(job(network, weights, DATA, methods, Path(folder), train=LEARN))
        base = Workplace(job(NETWORK, TEACHER_WEIGHTS, DATA, {}, Path(folder), train=LEARN))
        result = trained(at)
        macs = totals(result.model, capture(result.model, at.example())).macs
        found = _judged(base, at, result, row, Path(folder) / "artifacts")
    return {**found, ("mean_macs", row): once(macs)}


def trained(at: Workplace) -> Result:
    """The result of the recipe."""
    fit(at.session, at.train_loader(), progress=False)
    return at.session.finish()


def _points(at: Workplace, result: Result, costs: list[float]) -> dict[str, Operation]:
    """Thresholds for each mean cost, from the curve on validation data; else the cheapest."""
    choice = choice_of(result.model)
    assert choice is not None
    answers, labels = all_answers(result.model, at.batches("val"))
    every = curve(*as_arrays(answers, labels, choice.temperatures.tolist()), costs)
    none = Operation((0.0,) * (len(costs) - 1), 0.0, costs[-1], ())
    return {
        row: none if cost is None else most_accurate(every, cost) or every[0]
        for row, cost in POINTS.items()
    }


def _settle(result: Result, point: Operation) -> None:
    choice = choice_of(result.model)
    assert choice is not None
    choice.thresholds.copy_(torch.tensor(point.thresholds))


def _rates(at: Workplace, result: Result, point: Operation) -> tuple[float, ...]:
    choice = choice_of(result.model)
    assert choice is not None
    answers, labels = all_answers(result.model, at.batches("test"))
    arrays = as_arrays(answers, labels, choice.temperatures.tolist())
    return operate(*arrays, [0.0] * len(answers), point.thresholds).rates


def _judged(base: Workplace, at: Workplace, result: Result, row: str, folder: Path) -> Values:
    """Top-1, and times in both runtimes on real images beside the baseline."""
    top1 = 100 * score(*predict_module(result.model, at.batches("test"))).top1
    found = {("top1", row): once(top1)}
    for runtime in RUNTIMES:
        loaded = {}
        for which, r in (("dense", base.dense_result), ("this", result)):
            artifact = at.exported(runtime, r, folder / runtime / which)
            loaded[which] = at.load(runtime, artifact, r.model)
            parity.require(parity.check(r.model, loaded[which], at.parity_inputs()), r.plan)
        records = time_on_inputs(loaded, at.batches("val"), rounds=ROUNDS)
        mine = {r.metric: r for r in records if r.subject["model"] == "this"}
        found |= {(f"{m} {runtime}", row): value_fields(mine[m]) for m in TIMES}
    return found


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: one row for each network and each choice of thresholds."""
    rows: dict[str, dict[str, Record]] = {}
    for r in records:
        rows.setdefault(r.subject["variant"], {})[r.metric] = r
    heads = ("", "top-1 (%)", "mean MMACs", *(f"{r}, mean (p95) ms" for r in RUNTIMES),
             *(f"{r}, times faster" for r in RUNTIMES))  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for name in (n for n in (*REFEREES, *POINTS) if n in rows):
        row = rows[name]
        cells = [name, f"{row['top1'].value:.2f}", f"{row['mean_macs'].value / 1e6:.1f}"]
        for r in RUNTIMES:
            time = row[f"mean_latency_ms {r}"]
            cells.append(f"{time.value:.3f} ({time.p95:.3f})" if time.p95 else f"{time.value:.3f}")
        cells += [f"{row[f'mean_speedup {r}'].value:.2f}" for r in RUNTIMES]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
