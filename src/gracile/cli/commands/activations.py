"""`gracile activations`: what flows through a network, tensor by tensor."""

from pathlib import Path
from typing import Annotated

import typer

from gracile.cli import options as o
from gracile.cli.output import log, out, write_text

HEADS = ("tensor", "op", "shape", "min", "p1", "mean", "p99", "max", "std", "0s %", "dead")


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def activations(
        model: o.Model,
        weights: o.Weights = None,
        data: o.Data = "digits",
        tensors: Annotated[
            list[str] | None,
            typer.Option(
                "--tensors", metavar="SELECTOR", help="Which operators; default all. Repeatable."
            ),
        ] = None,
        split: o.Split = "calibration",
        images: o.Images = 300,
        bins: Annotated[
            int, typer.Option("--bins", min=1, metavar="N", help="Bins of a histogram, at most.")
        ] = 128,
        folder: Annotated[
            Path | None,
            typer.Option("--out", metavar="DIR", help="Write JSON, CSV, YAML and a page here."),
        ] = None,
        threads: o.TorchThreads = None,
        json: o.Json = False,
    ) -> int:
        """Print range, mean, spread, percentiles and zeros of each activation over real images."""
        import json as jsonlib

        import torch
        from rich.table import Table

        from gracile.cli.scored import opened
        from gracile.report.activations import table, write_activations
        from gracile.train.activations import activations as collect
        from gracile.train.loop import bar

        if threads is not None:
            torch.set_num_threads(threads)
        scored = opened(model, weights, data, split, images)
        with bar("activations", len(scored.loader), show=not json) as advance:
            found = collect(
                scored.model, scored.loader, tensors=tensors, bins=bins, advance=lambda: advance("")
            )
        page = None
        if folder is not None:
            found.save(folder)
            page = write_activations(folder, found, name=model, data=scored.what)
        if json:
            where = str(folder) if folder is not None else None
            answer = {"status": "ok", "exit": 0, "model": model, "data": scored.what, "out": where}
            print(jsonlib.dumps({**answer, **found.to_dict()}))
            return 0
        shown = table(found)
        printed = Table(box=None, pad_edge=False)
        for k, column in enumerate(HEADS):
            left = k in shown.words
            printed.add_column(column, justify="left" if left else "right", no_wrap=k > 0)
        for row in shown.rows:
            printed.add_row(*row)
        out.print(printed)
        for id, why in found.left_out.items():
            write_text(f"{id}: left out, {why}")
        write_text(f"{model}: {found.images} images of {scored.what}")
        if page is not None:
            log.print(f"page: {page}", soft_wrap=True)
        return 0
