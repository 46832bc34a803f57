"""`gracile summary`: what a model is made of: operators, zeros, modules, and its picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gracile.cli import options as o
from gracile.cli.output import log, out, write_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from gracile.analyze.comparison import ComparedOperator, Side
    from gracile.analyze.cost import CostRow, Totals
    from gracile.analyze.inventory import Listing
    from gracile.graph.graph import Graph
    from gracile.models.spec import ModelSpec

LISTS = ("modules", "attributes", "connectivity", "percentiles")
PICTURES = ("graph", "graph-params")
KINDS = ("compute", "sparsity", *LISTS, "model", *PICTURES)


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def summary(
        model: o.Model,
        weights: o.Weights = None,
        shape: o.Shape = "3,32,32",
        kind: Annotated[
            list[str] | None,
            typer.Option(
                "--kind",
                metavar="KIND",
                help=f"{', '.join(KINDS)}; pictures need --out. Repeatable.",
            ),
        ] = None,
        against: Annotated[
            str | None,
            typer.Option(
                "--against",
                metavar="MODEL|RUN",
                help="Put another model, or a run's compressed one, beside it.",
            ),
        ] = None,
        folder: Annotated[
            Path | None,
            typer.Option("--out", metavar="DIR", help="Write each as a CSV (graph: SVG) here."),
        ] = None,
        json: o.Json = False,
    ) -> int:
        """Print what a model is made of; by default every operator with its cost.

        compute: output shape, MACs and parameters of each operator, and the totals. sparsity: zeros
        of each weight by element, kernel, filter and channel. modules: the leaf modules.
        attributes: their settings. connectivity: what each operator reads. percentiles: of absolute
        weights. model: as PyTorch prints it. graph, graph-params: a picture, with shapes or sizes.

        --against names a second network: shapes, cost and zeros of each operator in both, and how
        far apart their outputs are for one input of random numbers.
        """
        import json as jsonlib

        import torch

        from gracile.analyze.cost import cost, totals
        from gracile.errors import UserError, nearest
        from gracile.graph.capture import capture
        from gracile.models.spec import load_weights, resolve

        kinds = list(dict.fromkeys(kind or ["compute"]))
        for k in kinds:
            if k not in KINDS:
                raise UserError(f"unknown kind of summary '{k}'.{nearest(k, KINDS)}")
        picture = next((k for k in kinds if k in PICTURES), None)
        if picture is not None and folder is None:
            raise UserError(f"--kind {picture} draws {picture}.svg: name a folder with --out.")
        size = o.sizes(shape)
        spec = resolve(model)
        net = spec.model.eval()
        if weights is not None:
            load_weights(net, weights)
        if against is not None:
            if kind:
                raise UserError("--against compares costs and zeros; leave --kind out.")
            return _compare(model, spec, against, size, folder, json)
        graph = capture(net, torch.zeros(2, *size))
        rows, total = cost(net, graph), totals(net, graph)
        if folder is not None:
            for path in _write(folder, kinds, net, graph, rows):
                log.print(f"wrote {path}", soft_wrap=True)
        if json:
            print(
                jsonlib.dumps(
                    {
                        "format": 1,
                        "status": "ok",
                        "exit": 0,
                        "model": model,
                        "captured_by": graph.how,
                        "reason": graph.reason,
                        "macs": total.macs,
                        "params": total.params,
                        "bytes": total.bytes,
                        "operators": [vars(r) for r in rows],
                        **_described(kinds, net, graph),
                    },
                    default=str,
                )
            )
            return 0
        for k in kinds:
            if k == "compute":
                _compute(model, graph, rows, total)
            elif k == "sparsity":
                _sparsity(model, net)
            elif k in LISTS:
                found = _listing(k, net, graph)
                out.print(_table(found.columns, ([_short(v) for v in row] for row in found.rows)))
            elif k == "model":
                write_text(repr(net))
        return 0


def _compare(
    model: str,
    spec: "ModelSpec",
    against: str,
    size: tuple[int, ...],
    folder: Path | None,
    json: bool,
) -> int:
    import json as jsonlib

    import torch

    from gracile.analyze.comparison import compare_models
    from gracile.core.plan import Plan
    from gracile.core.state import write_atomic
    from gracile.models.spec import resolve
    from gracile.train.checkpoint import load_model
    from gracile.units import human_bytes, human_count

    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    if Path(against).is_dir():
        same = Plan.load(Path(against) / "plan.json").architecture.name == spec.architecture.name
        factory = (lambda: resolve(model)) if same else None
        other = load_model(against, x, factory=factory).model
    else:
        other = resolve(against).model
    found = compare_models(spec.model, other, x)
    if folder is not None:
        write_atomic(folder / "comparison.csv", found.to_csv().encode())
        log.print(f"wrote {folder / 'comparison.csv'}", soft_wrap=True)
    if json:
        answer = {"format": 1, "status": "ok", "exit": 0, "model": model, "against": against}
        print(jsonlib.dumps({**answer, **found.to_dict()}))
        return 0

    def pair(o: "ComparedOperator", text: "Callable[[Side], str]") -> str:
        one, other = (text(s) if s is not None else "-" for s in (o.one, o.other))
        return one if one == other else f"{one} -> {other}"

    def zeros(s: "Side") -> str:
        return "" if s.zeros is None else f"{100 * s.zeros:.1f}"

    cells = [
        (
            o.id, o.op, o.status, pair(o, lambda s: "x".join(map(str, s.shape or ()))),
            pair(o, lambda s: f"{s.macs:,}" if s.macs else ""),
            pair(o, lambda s: f"{s.params:,}" if s.params else ""), pair(o, zeros),
            "" if o.distance is None else f"{o.distance:.3g}",
        )
        for o in found.operators
    ]  # fmt: skip
    heads = ("operator", "kind", "", "output", "MACs", "parameters", "0s %", "distance")
    out.print(_table(heads, cells, numbers=4))
    a, b = found.one, found.other
    changed = len(found.of_status("changed", "gone", "new"))
    write_text(
        f"{model} -> {against}: {human_count(a.macs)} -> {human_count(b.macs)} MACs, "
        f"{human_count(a.params)} -> {human_count(b.params)} parameters, {human_bytes(a.bytes)} -> "
        f"{human_bytes(b.bytes)}; {changed} of {len(found.operators)} operators changed"
    )
    return 0


def _compute(model: str, graph: "Graph", rows: "list[CostRow]", total: "Totals") -> None:
    from gracile.units import human_bytes, human_count

    cells = []
    for r in rows:
        shape = graph[r.id].shape
        cells.append(
            (
                r.id,
                r.op,
                "x".join(str(n) for n in shape[1:]) if shape else "",
                f"{r.macs:,}" if r.macs else "",
                f"{r.params:,}" if r.params else "",
            )
        )
    out.print(_table(("operator", "kind", "output", "MACs", "parameters"), cells, numbers=2))
    write_text(
        f"{model}: {human_count(total.macs)} MACs, {human_count(total.params)} parameters, "
        f"{human_bytes(total.bytes)}; captured by {graph.how}"
        + (f" ({graph.reason})" if graph.reason else "")
    )


def _sparsity(model: str, net: "nn.Module") -> None:
    from gracile.analyze.sparsity import sparsity_rows, total

    rows = sparsity_rows(net)
    heads = (
        "tensor", "shape", "size", "nnz", "0s %", "kernels", "filters", "channels", "std", "mean",
        "|mean|",
    )  # fmt: skip

    def share(v: float | None) -> str:
        return "" if v is None else f"{100 * v:.1f}"

    cells = [
        (r.tensor, r.shape, f"{r.size:,}", f"{r.nnz:,}", *(share(v) for v in
         (r.element, r.kernel, r.filter, r.channel)), f"{r.std:.3g}", f"{r.mean:.3g}",
         f"{r.mean_abs:.3g}")
        for r in rows
    ]  # fmt: skip
    out.print(_table(heads, cells, numbers=9))
    whole = total(rows)
    write_text(
        f"{model}: {100 * whole.element:.2f} % of {whole.size:,} weights are zero, "
        f"{whole.nnz:,} left"
    )


def _table(heads: tuple[str, ...], rows: Any, numbers: int = 0) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for k, head in enumerate(heads):
        right = k >= len(heads) - numbers
        table.add_column(head, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _listing(kind: str, net: "nn.Module", graph: "Graph") -> "Listing":
    from gracile.analyze import inventory

    if kind == "connectivity":
        return inventory.connectivity(graph)
    made: Listing = getattr(inventory, kind)(net)
    return made


def _described(kinds: list[str], net: "nn.Module", graph: "Graph") -> dict[str, Any]:
    """What is asked for beside the operators, as JSON."""
    from gracile.analyze.sparsity import sparsity_rows, total

    found: dict[str, Any] = {}
    if "sparsity" in kinds:
        rows = sparsity_rows(net)
        found["sparsity"] = {"tensors": [vars(r) for r in rows], "total": vars(total(rows))}
    found |= {k: _listing(k, net, graph).to_dicts() for k in kinds if k in LISTS}
    if "model" in kinds:
        found["text"] = repr(net)
    return found


def _write(
    folder: Path, kinds: list[str], net: "nn.Module", graph: "Graph", rows: "list[CostRow]"
) -> list[Path]:
    """One file for each kind."""
    from gracile.analyze.sparsity import sparsity_rows, to_csv
    from gracile.core.csv_text import csv_text
    from gracile.core.state import write_atomic
    from gracile.report.drawing import draw
    from gracile.units import human_count

    def compute() -> str:
        heads = ("operator", "kind", "output", "macs", "params", "weight")
        shapes = ("x".join(str(n) for n in (graph[r.id].shape or (0,))[1:]) for r in rows)
        lines = (
            (r.id, r.op, s, r.macs, r.params, r.weight or "")
            for r, s in zip(rows, shapes, strict=True)
        )
        return csv_text(heads, lines)

    sizes = {r.id: f"{human_count(r.params)} parameters" for r in rows if r.params}
    made = {
        "compute": ("compute.csv", compute),
        "sparsity": ("sparsity.csv", lambda: to_csv(sparsity_rows(net))),
        **{k: (f"{k}.csv", _listing(k, net, graph).to_csv) for k in kinds if k in LISTS},
        "model": ("model.txt", lambda: repr(net) + "\n"),
        "graph": ("graph.svg", lambda: draw(graph)),
        "graph-params": ("graph-params.svg", lambda: draw(graph, sizes)),
    }
    for kind in kinds:
        name, text = made[kind]
        write_atomic(folder / name, text().encode())
    return [folder / made[kind][0] for kind in kinds]
