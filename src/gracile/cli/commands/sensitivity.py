"""`gracile sensitivity`: accuracy with each tensor pruned alone, or rounded alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gracile.cli import options as o
from gracile.cli.output import log, out, say, write_text

if TYPE_CHECKING:
    from gracile.analyze.sensitivity import Sensitivity


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def sensitivity(
        model: o.Model,
        weights: o.Weights = None,
        data: o.Data = "digits",
        by: Annotated[
            str, typer.Option("--by", metavar="KIND", help="filter, channel, element or bits.")
        ] = "filter",
        levels: Annotated[
            str | None,
            typer.Option(
                "--levels",
                metavar="LIST",
                help="Shares like 0.2,0.5 or 0.1:0.9:0.1 (both ends), or bits like 8,4,2.",
            ),
        ] = None,
        tensors: Annotated[
            list[str] | None,
            typer.Option(
                "--tensors",
                metavar="SELECTOR",
                help="Which weights; default all of convolutions and linear layers. Repeatable.",
            ),
        ] = None,
        criterion: Annotated[
            str, typer.Option("--criterion", metavar="NAME", help="What ranks: l1, l2, ...")
        ] = "l1",
        split: o.Split = "val",
        images: o.Images = 512,
        max_drop: Annotated[
            float | None,
            typer.Option(
                "--max-drop", metavar="X", help="Name the level each tensor stands for X points."
            ),
        ] = None,
        folder: Annotated[
            Path | None,
            typer.Option(
                "--out", metavar="DIR", help="Write JSON, CSV and a page here; may be a run's."
            ),
        ] = None,
        resume: bool = typer.Option(False, "--resume", help="Go on with the scan in --out."),
        memory: Annotated[
            int, typer.Option("--memory", min=1, metavar="MIB", help="Bound on activations.")
        ] = 64,
        threads: o.TorchThreads = None,
        json: o.Json = False,
    ) -> int:
        """Score the network with one tensor at a time pruned, or rounded, at several levels.

        Nothing is trained. Each image goes once through the network; from every tensor on, its
        levels run as one batch.
        """
        import json as jsonlib

        import torch

        from gracile.cli.scored import opened
        from gracile.errors import UserError
        from gracile.report.sensitivity import write_sensitivity
        from gracile.train.loop import bar
        from gracile.train.sensitivity import sensitivity as search

        if resume and folder is None:
            raise UserError("--resume needs the --out of the scan it goes on with.")
        if threads is not None:
            torch.set_num_threads(threads)
        scored = opened(model, weights, data, split, images)
        with bar("sensitivity", len(scored.loader), show=not json) as advance:
            scan = search(
                scored.model,
                scored.loader,
                by=by,  # type: ignore[arg-type]  # a wrong one is refused there
                levels=_numbers(levels) if levels is not None else None,
                tensors=tensors,
                criterion=criterion,
                memory_mib=memory,
                state=folder / "sensitivity.state.json" if folder is not None else None,
                resume=resume,
                identity={"images": scored.sha},
                advance=lambda: advance(""),
            )
        page = None
        if folder is not None:
            scan.save(folder)
            (folder / "sensitivity.state.json").unlink(missing_ok=True)
            page = write_sensitivity(folder, scan, name=model, data=scored.what)
        if json:
            answer = {
                "status": "ok", "exit": 0, "model": model, "data": scored.what,
                "out": str(folder) if folder is not None else None, **scan.to_dict(),
            }  # fmt: skip
            if max_drop is not None:
                answer |= {"max_drop": max_drop, "tolerated": scan.tolerated(max_drop)}
            print(jsonlib.dumps(answer))
            return 0
        out.print(_table(scan, max_drop))
        for address, why in scan.left_out.items():
            write_text(f"{address}: left out, {why}")
        write_text(
            f"{model}: top-1 {100 * scan.base.top1:.2f} %, loss {scan.base.loss:.4f} on "
            f"{scan.base.images} images of {scored.what}; the table is in points of top-1"
        )
        say(f"{len(scan.rows)} scores in {scan.seconds:.1f} s")
        if page is not None:
            log.print(f"page: {page}", soft_wrap=True)
        return 0


def _numbers(text: str) -> list[float]:
    """The numbers of `--levels`: a list, or start:stop:step with both ends."""
    from gracile.errors import UserError

    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        start, stop, step = (float(part) for part in text.split(":"))
        count = int((stop - start) / step + 1e-9) + 1
        return [round(start + k * step, 9) for k in range(count)]
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"--levels must be like 0.2,0.5 or 0.1:0.9:0.1 or 8,4,2, got '{text}'."
        ) from None


def _table(scan: "Sensitivity", max_drop: float | None) -> Any:
    from rich.table import Table

    from gracile.report.sensitivity import drops

    found = drops(scan)
    stands = scan.tolerated(max_drop) if max_drop is not None else {}
    table = Table(box=None, pad_edge=False)
    for k, column in enumerate(found.columns):
        table.add_column(column, justify="right" if k else "left", overflow="fold", no_wrap=k > 0)
    if stands:
        table.add_column(f"stands for {max_drop:g}", justify="right")
    for row in found.rows:
        table.add_row(*row, *([f"{stands[row[0]]:g}"] if stands else ()))
    return table
