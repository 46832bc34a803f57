"""`gracile latency measure|predict|show`: what a network will take, from a table of its units."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gracile.cli import options as o
from gracile.cli.output import out, say, write_text

if TYPE_CHECKING:
    from gracile.benchmark.runtimes.base import Loaded
    from gracile.latency.table import Table, Times

TableFile = Annotated[
    Path, typer.Option("--table", metavar="FILE", help="The table of measured units (JSON lines).")
]
Subject = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RUN|FILE",
        help="A model spec, a run directory, or an artifact (.onnx, .xml).",
    ),
]
Runtime = Annotated[
    str | None,
    typer.Option("--runtime", metavar="NAME[:DEVICE]", help="openvino or onnxruntime."),
]
Precision = Annotated[
    str,
    typer.Option("--precision", help="Of a model spec: f32, or int8 (ranges from random images)."),
]
DEFAULT = Path("latency.jsonl")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Predict latencies from a table of units.", no_args_is_help=True)
    app.add_typer(group, name="latency")

    @group.command()
    def measure(
        model: Subject,
        runtime: Runtime = None,
        table: TableFile = DEFAULT,
        precision: Precision = "f32",
        weights: o.Weights = None,
        shape: o.Shape = "3,32,32",
        threads: o.Threads = 1,
        hint: o.Hint = "f32",
        batch: o.Batch = 1,
        exact: Annotated[
            bool,
            typer.Option("--exact", help="This network's own widths, not those that serve all."),
        ] = False,
        target: Annotated[
            Path | None, typer.Option("--out", metavar="FILE", help="Write here, not to --table.")
        ] = None,
        json: o.Json = False,
    ) -> int:
        """Measure what the table lacks to predict this network, and the network itself.

        Only missing units are timed, each as the difference of two small networks. Run it for
        several networks: each also calibrates the sum.
        """
        from gracile.latency import measuring
        from gracile.latency.lowering import units_of
        from gracile.latency.table import Table
        from gracile.latency.unit import Setting

        known = Table.load(table) if table.exists() else Table()
        with _opened(model, runtime, precision, weights, shape, threads, hint, batch) as loaded:
            units, times = units_of(loaded), known.at(Setting.of(loaded))
            done = measuring.measure(times, units, exact=exact, told=say)
            ms = measuring.measure_network(times, f"{model} {precision} {shape}", loaded, units)
        known.save(target or table)
        written, refused = str(target or table), list(done.refused.values())
        if json:
            return _print_json(
                table=written, units=done.units, staircases=done.stairs, refused=refused,
                network_ms=ms,
            )  # fmt: skip
        write_text(
            f"{written}: {done.units} unit(s) and {done.stairs} staircase(s) added; "
            f"{model} takes {ms:.4f} ms"
        )
        for text in refused:
            write_text(f"not measured: {text}")
        return 0

    @group.command()
    def predict(
        model: Subject,
        runtime: Runtime = None,
        table: TableFile = DEFAULT,
        precision: Precision = "f32",
        weights: o.Weights = None,
        shape: o.Shape = "3,32,32",
        threads: o.Threads = 1,
        hint: o.Hint = "f32",
        batch: o.Batch = 1,
        anyway: Annotated[
            bool,
            typer.Option("--anyway", help="Use times of another device or version, if need be."),
        ] = False,
        records: Annotated[
            Path | None, typer.Option("--out", metavar="FILE", help="Append the Record here.")
        ] = None,
        json: o.Json = False,
    ) -> int:
        """Predict a latency from the table; nothing is timed.

        Says how many units were measured, and how many lie between measured widths.
        """
        from gracile.core.record import RecordLog
        from gracile.latency.lowering import units_of
        from gracile.latency.predict import Predictor
        from gracile.latency.table import Table
        from gracile.latency.unit import Setting

        known = Table.load(table)
        with _opened(model, runtime, precision, weights, shape, threads, hint, batch) as loaded:
            times = known.of(Setting.of(loaded), anyway=anyway)
            found = Predictor(times).network(units_of(loaded))
            subject = {"model": model, "artifact_sha": loaded.artifact.sha}
        record = found.record(times, subject=subject)
        if records is not None:
            RecordLog(records).add(record)
        if json:
            return _print_json(
                record=record.to_dict(), sum_ms=found.sum_ms, units=found.counts,
                shares=found.shares, warnings=found.warnings,
            )  # fmt: skip
        out.print(_units_table(found.units))
        low, high = found.interval
        counts = ", ".join(f"{n} {how}" for how, n in found.counts.items())
        write_text(f"predicted {found.ms:.4f} ms, 95 % within {low:.4f} to {high:.4f} ({counts})")
        for text in found.warnings:
            write_text(f"warning: {text}")
        return 0

    @group.command()
    def show(table: TableFile = DEFAULT, json: o.Json = False) -> int:
        """Print what a table covers: settings, units by kind, staircases, age."""
        from gracile.latency.table import Table

        rows = [_described(times) for times in _settings(Table.load(table))]
        if json:
            return _print_json(table=str(table), settings=rows)
        for row in rows:
            for line in _lines(row):
                write_text(line)
        if not rows:
            write_text(f"{table}: empty")
        return 0


@contextmanager
def _opened(
    model: str,
    runtime: str | None,
    precision: str,
    weights: Path | None,
    shape: str,
    threads: int,
    hint: str,
    batch: int,
) -> "Iterator[Loaded]":
    """The artifact a user means, loaded; one made for the occasion is thrown away afterwards."""
    from tempfile import TemporaryDirectory

    from gracile.benchmark.artifact import RUNTIMES, open_artifact
    from gracile.benchmark.runtimes.base import load, parse_target

    name, device = parse_target(runtime) if runtime is not None else (None, "CPU")
    with TemporaryDirectory() as folder:
        if Path(model).suffix in RUNTIMES:
            artifact = open_artifact(model)
        elif Path(model).is_dir():
            artifact = _of_run(Path(model), name)
        else:
            artifact = _made(model, name or "openvino", precision, weights, shape, Path(folder))
        yield load(artifact, threads=threads, hint=hint, batch=batch, device=device)


def _of_run(folder: Path, runtime: str | None) -> Any:
    from gracile.benchmark.artifact import open_artifact
    from gracile.errors import UserError

    paths = sorted((folder / "export").glob(f"{runtime or '*'}/compressed/model.*"))
    found = [p for p in paths if p.suffix in (".onnx", ".xml")]
    if not found:
        asked = f"for '{runtime}' " if runtime else ""
        raise UserError(
            f"{folder}: no compressed artifact {asked}in it; run `gracile compress ... --runtime "
            "NAME`, or name another --runtime."
        )
    if len(found) > 1:
        names = ", ".join(p.parts[-3] for p in found)
        raise UserError(f"{folder}: artifacts for {names}; say which with --runtime.")
    return open_artifact(found[0])


def _made(
    model: str, runtime: str, precision: str, weights: Path | None, shape: str, folder: Path
) -> Any:
    import torch

    from gracile import registry
    from gracile.core.plan import Plan
    from gracile.core.result import Result
    from gracile.errors import UserError
    from gracile.models.spec import load_weights, resolve
    from gracile.recipe.build import build, quantize
    from gracile.train.session import Session

    if precision not in ("f32", "int8"):
        raise UserError(f"--precision must be f32 or int8, got '{precision}'.")
    x = torch.randn(4, *o.sizes(shape), generator=torch.Generator().manual_seed(0))
    spec = resolve(model)
    net = spec.model.eval()
    if weights is not None:
        load_weights(net, weights)
    result = Result(net, Plan(architecture=spec.architecture))
    if precision == "int8":
        recipe = build(methods={"int8": quantize("ptq", when={"at": "end"})})
        result = Session(net, recipe, example=x[:2], calibration=[x], profile=runtime).finish()
    write = registry.get("exporter", runtime).obj
    return write(result.model, result.plan, result.tensors, x[:2], folder / "model", {})


def _print_json(**values: Any) -> int:
    import json as jsonlib

    print(jsonlib.dumps({"format": 1, "status": "ok", "exit": 0, **values}))
    return 0


def _units_table(units: Any) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("unit", "kind", "widths", "ms", "+-", ""):
        table.add_column(column, justify="right" if column in ("ms", "+-") else "left")
    for name, unit, e in units:
        widths = " -> ".join(str(w) for w in unit.widths)
        table.add_row(name, unit.kind, widths, f"{e.ms:.4f}", f"{e.sigma_ms:.4f}", e.how)
    return table


def _settings(table: "Table") -> "list[Times]":
    return [table.of(s) for s in table.settings]


def _described(times: "Times") -> dict[str, Any]:
    from collections import Counter

    from gracile.latency.predict import Predictor

    ages = [p.time for p in times.points.values()]
    c = Predictor(times).calibration
    return {
        **times.setting.to_dict(),
        "units": dict(Counter(f"{u.kind} {u.precision}" for u in times.points)),
        "staircases": [
            {"kind": k, "precision": p, "width": axis + 1, "period": s.period, "tail": s.tail}
            for (k, p, axis), s in sorted(times.stairs.items())
        ],
        "networks": {n: {"sum_ms": v.sum_ms, "ms": v.ms} for n, v in times.networks.items()},
        "calibration": {**asdict(c), "text": c.text},
        "oldest": min(ages, default=None),
        "newest": max(ages, default=None),
    }


def _lines(row: dict[str, Any]) -> Iterator[str]:
    from datetime import UTC, datetime

    yield (
        f"{row['runtime']} {row['version']} on {row['device']}, {row['threads']} thread(s), "
        f"batch {row['batch']}, {row['hint']}"
    )
    for kind, n in sorted(row["units"].items()):
        yield f"  {kind}: {n} unit(s)"
    for s in row["staircases"]:
        more = ", another one for partly filled blocks" if s["tail"] else ""
        yield f"  {s['kind']} {s['precision']}, width {s['width']}: steps of {s['period']}{more}"
    c = row["calibration"]
    yield f"  {c['networks']} network(s): {c['text']}, off by {100 * c['spread']:.1f} %"
    if row["oldest"] is not None:
        old, new = (
            datetime.fromtimestamp(row[k], UTC).strftime("%Y-%m-%d") for k in ("oldest", "newest")
        )
        yield f"  measured {old} to {new}"
