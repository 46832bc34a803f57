"""Latency predicted before it is measured: networks that were never used for fitting.

Random trims of four networks, every channel group at a width drawn from all integers between a
quarter and all of it, at three resolutions, on one thread. The table of units is filled with the
few widths that serve all of them, and twelve other trims calibrate the sum; a third set, which was
looked at while the model was made, is in neither. All networks are timed side by side, in rounds
over all of them. Errors are relative to the measured latency: the median, and the share of networks
within 10 %. "Noise" is the median difference of what the first half of the rounds says of a network
and what the second half does. Beside it: the plain sum of the same layers run alone, and a line
through the MACs of the calibration networks. "Prefixes" is MobileNetV2 cut off behind each of its
blocks (figure 7 of CompactNet).
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.cell import Cell, Values, once, template
from benchmarks.networks import fresh, inputs, normalized, written
from gracile import Recipe, Result, Session
from gracile.analyze.cost import totals
from gracile.benchmark.runtimes.base import Loaded, load
from gracile.core.plan import Architecture, Plan
from gracile.core.record import Record
from gracile.graph.capture import capture
from gracile.graph.dependency import channel_groups
from gracile.graph.surgery import apply, remove_edits
from gracile.latency.calibration import calibrate
from gracile.latency.difference import low, quickest
from gracile.latency.lowering import isolated, units_of
from gracile.latency.measuring import measure, remember, side_by_side
from gracile.latency.predict import Predictor
from gracile.latency.table import Table, Times
from gracile.latency.unit import Setting, Unit
from gracile.report.figures import line_chart

NAME = "latency_model"
RUNTIMES = ("openvino", "onnxruntime")
PRECISIONS = ("f32", "int8")
SIDES = {
    "resnet20_cifar_a": (32, 48, 64),
    "resnet56_cifar_a": (32, 48, 64),
    "mobilenet_v2": (96, 128, 160),
    "vgg16_bn_cifar": (32, 64, 96),
}
TESTED, FITTED = 30, 12
# Seeds. Trims from 0 on were looked at while the model was made, so others judge it.
FIRST_TESTED, FIRST_FITTED = 2000, 1000
LEAST = 0.25  # of a group's width
WITHIN = 0.10
METRICS = {
    "median_error": "share", "within_10": "share", "noise": "share", "isolated_error": "share",
    "macs_error": "share", "measured_units": "count",
}  # fmt: skip
BLOCKS = 19  # of MobileNetV2, the first and the last convolution counted


@dataclass(frozen=True)
class Trim:
    """One random trim: architecture, side of the image, seed of the widths."""

    name: str
    side: int
    seed: int

    @classmethod
    def numbered(cls, seed: int) -> "Trim":
        """Architectures in turn, then sides in turn."""
        name = list(SIDES)[seed % len(SIDES)]
        return cls(name, SIDES[name][seed // len(SIDES) % 3], seed)


def cells() -> Iterator[Cell]:
    """A cell for each runtime and precision, and one with the prefixes for each runtime."""
    for runtime in RUNTIMES:
        for precision in PRECISIONS:
            sizes = (("full", TESTED, FITTED), ("smoke", 1, 1))
            for tier, count, fitted in sizes if precision == "f32" else sizes[:1]:
                cell = f"{runtime} {precision}, {count} networks"
                facts = {"runtime": runtime, "precision_hint": "f32", "batch": 1}
                records = tuple(
                    template(NAME, cell, metric, unit, f"{runtime} {precision}", **facts)
                    for metric, unit in METRICS.items()
                )
                notes: dict[str, Any] = {}
                act = partial(judge, runtime, precision, count, fitted, notes)
                yield Cell(NAME, cell, tier, records, act, notes)
    for runtime in RUNTIMES:
        cell = f"prefixes, {runtime}"
        records = tuple(
            template(NAME, cell, metric, "ms", f"{k} blocks", runtime=runtime, batch=1,
                     precision_hint="f32")
            for k in range(1, BLOCKS + 1)
            for metric in ("latency_ms", "predicted_ms")
        )  # fmt: skip
        yield Cell(NAME, cell, "full", records, partial(prefixes, runtime))


def judge(runtime: str, precision: str, count: int, fitted: int, notes: dict[str, Any]) -> Values:
    """Fill the table, calibrate on other networks, then predict the tested ones."""
    table = _table()
    trims = [Trim.numbered(FIRST_FITTED + k) for k in range(fitted)]
    trims += [Trim.numbered(FIRST_TESTED + k) for k in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        nets = [opened(trim, runtime, precision, Path(folder)) for trim in trims]
        units = [units_of(loaded) for loaded, _ in nets]
        times = table.at(Setting.of(nets[0][0]))
        measure(times, [u for found in units[:fitted] for u in found])
        _save(table)
        before = len(times.points)
        measure(times, [u for found in units[fitted:] for u in found])
        _save(table)
        rounds = side_by_side([loaded for loaded, _ in nets])
    for trim, found, measured in zip(trims[:fitted], units, rounds, strict=False):
        remember(times, f"{trim} {precision}", low(measured), found)
    _save(table)
    macs = [float(m) for _, m in nets]
    per_mac = calibrate([(m, low(r)) for m, r in zip(macs[:fitted], rounds, strict=False)])
    predictor, rows = _predictor(times, precision), []
    for k in range(fitted, len(trims)):
        predicted, ms = predictor.network(units[k]), low(rounds[k])
        first, second = (low(half) for half in np.array_split(rounds[k], 2))
        rows.append({
            "network": str(trims[k]), "ms": ms, "predicted_ms": predicted.ms,
            "error": predicted.ms / ms - 1, "noise": abs(first / second - 1),
            "isolated_error": _isolated_ms(units[k], times) / ms - 1,
            "macs_error": per_mac.apply(macs[k]) / ms - 1, "how": predicted.counts,
        })  # fmt: skip
    notes["networks"] = rows
    notes["calibration"] = asdict(predictor.calibration)
    notes["staircases"] = {" ".join(map(str, k)): asdict(s) for k, s in times.stairs.items()}
    notes["units added by the tested networks"] = len(times.points) - before
    return summarized(rows, len(times.points), f"{runtime} {precision}")


def summarized(rows: Sequence[dict[str, Any]], units: int, variant: str) -> Values:
    """The figures of a cell from its networks."""
    errors = np.abs([r["error"] for r in rows])
    figures = {
        "median_error": np.median(errors),
        "within_10": np.mean(errors <= WITHIN),
        "noise": np.median([r["noise"] for r in rows]),
        "isolated_error": np.median(np.abs([r["isolated_error"] for r in rows])),
        "macs_error": np.median(np.abs([r["macs_error"] for r in rows])),
        "measured_units": units,
    }
    return {(m, variant): {**once(float(v)), "n": len(rows)} for m, v in figures.items()}


def prefixes(runtime: str) -> Values:
    """MobileNetV2 behind each of its blocks, predicted and measured."""
    table, out = _table(), {}
    with tempfile.TemporaryDirectory() as folder:
        nets = [_prefix(k, runtime, Path(folder)) for k in range(1, BLOCKS + 1)]
        units = [units_of(loaded) for loaded in nets]
        times = table.at(Setting.of(nets[0]))
        measure(times, [u for found in units for u in found])
        _save(table)
        rounds = side_by_side(nets)
    predictor = _predictor(times, "f32")
    for k, (found, measured) in enumerate(zip(units, rounds, strict=True), 1):
        out["latency_ms", f"{k} blocks"] = once(low(measured))
        out["predicted_ms", f"{k} blocks"] = once(predictor.network(found).ms)
    return out


def _prefix(blocks: int, runtime: str, folder: Path) -> Loaded:
    whole = normalized(fresh("mobilenet_v2"), inputs((3, 128, 128), 4))
    net = nn.Sequential(*list(whole.features)[:blocks]).eval()  # type: ignore[call-overload]
    result = Result(net, Plan(architecture=Architecture(name="mobilenet_v2")))
    return load(written(result, runtime, folder / str(blocks), inputs((3, 128, 128), 2)))


def opened(trim: Trim, runtime: str, precision: str, folder: Path) -> tuple[Loaded, int]:
    """A trimmed network in a runtime, and its MACs."""
    result, macs = trimmed(trim, runtime, precision)
    x = inputs((3, trim.side, trim.side), 2)
    artifact = written(
        result, runtime, folder / str(trim.seed), x
    )  # not proven: weights are random
    return load(artifact), macs


def trimmed(trim: Trim, runtime: str, precision: str) -> tuple[Result, int]:
    """The network with random widths and random weights, quantized if asked."""
    shape = (3, trim.side, trim.side)
    x = inputs(shape, 4)
    model = fresh(trim.name).eval()
    if trim.name.startswith("vgg"):  # made for one size
        model.flatten = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph = capture(model, x[:2], check=False)
    rng = np.random.default_rng(trim.seed)
    groups = channel_groups(model, graph)
    gone = {}
    for g in groups:
        if g.protected is None:
            n = len(g.units)
            kept = int(rng.integers(max(1, round(LEAST * n)), n + 1))
            gone[g.id] = g.removable(rng.permutation(n)[: n - kept].tolist())
    model = apply(model, remove_edits(groups, gone, by="trim"), example=x[:2], graph=graph)
    model = normalized(model, x)
    macs = totals(model, capture(model, x[:2], check=False)).macs
    if precision == "f32":
        return Result(model, Plan(architecture=Architecture(name=trim.name))), macs
    recipe = Recipe.build(methods={"int8": {"quantize": "ptq", "when": {"at": "end"}}})
    session = Session(model, recipe, example=x[:2], calibration=[x], profile=runtime)
    return session.finish(), macs


def _predictor(times: Times, precision: str) -> Predictor:
    """Calibrated on networks of the same precision only."""
    networks = {n: v for n, v in times.networks.items() if n.endswith(precision)}
    return Predictor(Times(times.setting, times.points, times.stairs, networks))


def _isolated_ms(units: Sequence[tuple[str, Unit]], times: Times) -> float:
    return sum(_alone_ms(unit, times.setting) for _, unit in units)


@cache
def _alone_ms(unit: Unit, setting: Setting) -> float:
    return low(quickest([isolated(unit, setting)], rounds=5, threads=setting.threads)[0])


def _path() -> Path:
    return Path(tempfile.gettempdir()) / "gracile-latency-model.jsonl"


def _table() -> Table:
    """What was measured so far, so that a run that was killed goes on."""
    return Table.load(_path()) if _path().exists() else Table()


def _save(table: Table) -> None:
    table.save(_path())


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: how far predictions were off; of prefixes, both times side by side."""
    rows: dict[str, dict[str, float]] = {}
    for r in records:
        rows.setdefault(r.subject["variant"], {})[r.metric] = r.value
    if not any("median_error" in row for row in rows.values()):
        return _prefixes_table(rows)
    heads = (
        "median error", "within 10 %", "noise", "median error: layers alone", "a line through MACs",
        "units measured",
    )  # fmt: skip
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for variant, v in rows.items():
        shares = " | ".join(f"{v[m]:.1%}" for m in METRICS if m != "measured_units")
        lines.append(f"| {variant} | {shares} | {v['measured_units']:.0f} |")
    return lines


def _prefixes_table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = ["| | measured (ms) | predicted (ms) | off by |", "|---|---:|---:|---:|"]
    for variant, v in rows.items():
        ms, predicted = v["latency_ms"], v["predicted_ms"]
        lines.append(f"| {variant} | {ms:.4f} | {predicted:.4f} | {predicted / ms - 1:+.1%} |")
    series = {
        name: [(float(variant.split()[0]), v[metric]) for variant, v in rows.items()]
        for name, metric in (("measured", "latency_ms"), ("predicted", "predicted_ms"))
    }
    title = "Latency of MobileNetV2 behind each of its blocks, measured and predicted"
    plot = line_chart(title, series, width=720, x="blocks", y="ms")
    return [*lines, "", f'<div class="plot">{plot}</div>']
