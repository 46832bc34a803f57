"""A network compressed by a recipe: what it keeps, and what it costs in two runtimes.

Data `cifar10-jpeg`; scored on test rows 0 to 4,999. Exported by the profile `portable`, every
artifact checked, and timed beside the network that nothing was done to, in the same rounds.
"""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Any

from benchmarks.cell import MANY_ROUNDS, Values, once, template, value_fields
from benchmarks.pruning import DATA, NETWORK, SHAPE, TRAIN, WEIGHTS, job
from gracile.analyze.cost import totals
from gracile.benchmark.timing import compare
from gracile.core.record import Record
from gracile.core.result import Result
from gracile.errors import GracileError
from gracile.export import parity
from gracile.graph.capture import capture
from gracile.train.evaluate import predict_module, score
from gracile.train.job import Workplace
from gracile.train.loop import fit
from gracile.train.packing import packed
from gracile.units import human_bytes, human_count

RUNTIMES = ("openvino", "onnxruntime")
METRICS = {"top1": "%", "file_bytes": "bytes", "macs": "count"}
TIMES = {"latency_ms": "ms", "speedup": "ratio"}


@dataclass(frozen=True)
class Start:
    """What is compressed, and how long it is trained for.

    Attributes:
        network: a model spec.
        weights: file in the folder of weights.
        train: section of the recipe.
        beside: network and weights that times are told beside, as they come; default its own.
    """

    network: str = NETWORK
    weights: str = WEIGHTS
    train: Mapping[str, Any] = field(default_factory=lambda: TRAIN)
    beside: tuple[str, str] | None = None


RESNET20 = Start()


def templates(benchmark: str, row: str, start: Start = RESNET20) -> tuple[Record, ...]:
    """What `outcome` finds for a row."""
    facts: dict[str, Any] = {
        "batch": 1, "shape": SHAPE, "split": "test[:5000]", "precision_hint": "f32",
    }  # fmt: skip
    records = [
        template(benchmark, start.network, m, unit, row, **facts) for m, unit in METRICS.items()
    ]
    for runtime in RUNTIMES:
        records += [
            template(
                benchmark, start.network, f"{m} {runtime}", unit, row, runtime=runtime, **facts
            )
            for m, unit in TIMES.items()
        ]
    return tuple(records)


def outcome(
    row: str, methods: Mapping[str, Any], notes: dict[str, Any], start: Start = RESNET20
) -> Values:
    """Compress, score, export to each runtime and time beside the dense network.

    Args:
        row: the variant its Records are of.
        methods: of the recipe.
        notes: gets the reason, by runtime, where an artifact was not taken; and the rungs of a
            ladder.
        start: what is compressed.

    Raises:
        UserError: the data or the weights are not there.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        asked = job(start.network, start.weights, DATA, methods, Path(folder), train=start.train)
        at = beside = Workplace(replace(asked, runtimes=RUNTIMES))
        if start.beside is not None:
            network, weights = start.beside
            beside = Workplace(job(network, weights, DATA, {}, Path(folder)), bind=False)
        if at.session.epochs:
            fit(at.session, at.train_loader(), val=lambda: at.batches("val"), progress=False)
        result = at.session.finish()
        if result.ladder:
            notes["ladder"] = result.ladder
        top1 = 100 * score(*predict_module(result.model, at.batches("test"))).top1
        found["top1", row] = once(top1)
        macs = totals(result.model, capture(result.model, at.example(), check=False)).macs
        found["macs", row] = once(macs)
        tensors = {**result.model.state_dict(), **result.tensors}
        sizes = [sum(t.nbytes for t in packed(tensors, result.plan).tensors.values())]
        for runtime in RUNTIMES:
            times = {metric: once(nan) for metric in TIMES}
            try:
                size, times = _timed(at, beside, result, runtime, Path(folder) / runtime)
                sizes += [size] if runtime == "onnxruntime" else []
            except GracileError as e:
                notes[runtime] = str(e)
            found |= {(f"{metric} {runtime}", row): v for metric, v in times.items()}
        found["file_bytes", row] = once(min(sizes))
    return found


def _timed(
    at: Workplace, beside: Workplace, result: Result, runtime: str, folder: Path
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Size of the artifact, and its times beside the dense network's."""
    loaded = {}
    for which, r in (("dense", beside.dense_result), ("compressed", result)):
        artifact = at.exported(runtime, r, folder / which)
        loaded[which] = at.load(runtime, artifact, r.model)
        report = parity.check(r.model, loaded[which], at.parity_inputs())
        parity.require(report, r.plan)
    rows = {(r.subject["model"], r.metric): r for r in compare(loaded, rounds=MANY_ROUNDS)}
    times = {metric: value_fields(rows["compressed", metric]) for metric in TIMES}
    return artifact.size_bytes, times


def heads(*first: str) -> list[str]:
    """The two lines above a table of outcomes."""
    names = (*first, "top-1 (%)", "MACs", "file", *(f"{r} (ms)" for r in RUNTIMES),
             *(f"{r}, times faster" for r in RUNTIMES))  # fmt: skip
    return [
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(first)}{'---:|' * (len(names) - len(first))}",
    ]


def columns(row: Mapping[str, Record]) -> list[str]:
    """What was found for a row, as `heads` names it."""
    return [
        f"{row['top1'].value:.2f}", human_count(row["macs"].value),
        human_bytes(row["file_bytes"].value), *(_ms(row[f"latency_ms {r}"]) for r in RUNTIMES),
        *(_ratio(row[f"speedup {r}"]) for r in RUNTIMES),
    ]  # fmt: skip


def by_row(records: Iterable[Record]) -> dict[str, dict[str, Record]]:
    """Variant -> metric -> Record."""
    rows: dict[str, dict[str, Record]] = {}
    for r in records:
        rows.setdefault(r.subject["variant"], {})[r.metric] = r
    return rows


def reasons(texts: Mapping[str, Any]) -> list[str]:
    """Below a table: why a runtime did not take an artifact."""
    out = []
    for name, why in texts.items():
        told = {k: text for k, text in why.items() if isinstance(text, str)}
        out += [line for k, text in told.items() for line in ("", f"{name}, {k}: {text}")]
    return out


def _ms(r: Record) -> str:
    return "" if r.value != r.value else f"{r.value:.3f}"


def _ratio(r: Record) -> str:
    if r.value != r.value:
        return "not taken"
    return f"{r.value:.2f} [{r.ci95[0]:.2f}, {r.ci95[1]:.2f}]" if r.ci95 else f"{r.value:.2f}"
