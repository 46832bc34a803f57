"""`gracile preflight`: what stands between a network and speed, before any training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gracile.cli import options as o
from gracile.cli.output import log, out, write_text

if TYPE_CHECKING:
    from gracile.analyze.preflight import Preflight

SHOWN = 4


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def preflight(
        model: o.Model,
        runtime: Annotated[
            str, typer.Option("--runtime", metavar="NAME[:DEVICE]", help="Where it will run.")
        ],
        weights: o.Weights = None,
        data: Annotated[
            str | None,
            typer.Option(
                "--data", metavar="SPEC", help="Take the input's shape and the classes from here."
            ),
        ] = None,
        shape: o.Shape = "3,32,32",
        period: Annotated[
            int, typer.Option("--period", min=1, metavar="N", help="Channels that fill a vector.")
        ] = 16,
        balance: Annotated[
            float,
            typer.Option(
                "--balance",
                metavar="X",
                help="Below so many multiply-adds a byte memory is slower.",
            ),
        ] = 4.0,
        measure: bool = typer.Option(
            True, "--measure/--no-measure", help="Time the network and its narrowest cut."
        ),
        threads: o.Threads = 1,
        folder: Annotated[
            Path | None,
            typer.Option("--out", metavar="DIR", help="Write JSON, CSV and a page here."),
        ] = None,
        json: o.Json = False,
    ) -> int:
        """Name what keeps a network from getting faster in a runtime, and how fast it could get.

        Nothing is trained or changed; takes seconds.
        """
        import json as jsonlib

        import torch

        from gracile.data.sets import open_data
        from gracile.models.spec import load_weights, resolve
        from gracile.report.preflight import write_preflight
        from gracile.train.preflight import preflight as look

        bundle = open_data(data) if data is not None else None
        size = bundle.shape if bundle is not None else o.sizes(shape)
        net = resolve(model, num_classes=bundle.classes if bundle else None).model.eval()
        if weights is not None:
            load_weights(net, weights)
        found = look(
            net, torch.zeros(2, *size), runtime,
            period=period, balance=balance, measure=measure, threads=threads,
        )  # fmt: skip
        page = None
        if folder is not None:
            found.save(folder)
            page = write_preflight(folder, found, name=model)
        if json:
            where = str(folder) if folder is not None else None
            answer = {"status": "ok", "exit": 0, "model": model, "out": where, **found.to_dict()}
            print(jsonlib.dumps(answer))
            return 0
        out.print(_table(found))
        for f in found.findings:
            some = ", ".join(f.where[:SHOWN]) + (", ..." if len(f.where) > SHOWN else "")
            out.print(f"[yellow]{f.code}[/yellow] {f.text}" + (f" ({some})" if some else ""))
        for what, why in found.notes.items():
            write_text(f"not known: {what}, {why}")
        for b in found.bounds:
            write_text(f"{b.what}: {b.ratio:.3g}x at most ({b.kind}): {b.text}")
        if page is not None:
            log.print(f"page: {page}", soft_wrap=True)
        return 0


def _table(found: "Preflight") -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for name in ("width", "MACs %", "MACs/byte", "cut", "integer"):
        table.add_column(name, justify="right", no_wrap=True)
    for n in found.layers:
        table.add_row(
            n.layer,
            str(n.width),
            f"{100 * n.share_of_macs:.1f}",
            f"{n.macs_per_byte:.1f}",
            "yes" if n.can_be_cut == "yes" else "no",
            {"yes": "yes", "": "?"}.get(n.integer, "no"),
        )
    return table
