"""`gracile bisect`: which step of a finished run did the harm."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gracile.cli import options as o
from gracile.cli.output import out, say, write_text


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def bisect(
        run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's directory.")],
        max_drop: Annotated[
            float,
            typer.Option(
                "--max-drop",
                metavar="X",
                help="The drop that is allowed: points of top1 or top5; for loss its rise.",
            ),
        ],
        metric: Annotated[
            str, typer.Option("--metric", metavar="NAME", help="top1, top5 or loss.")
        ] = "top1",
        weights: Annotated[
            Path | None,
            typer.Option(
                "--weights", metavar="FILE", help="The weights file the run began from, if any."
            ),
        ] = None,
        every: bool = typer.Option(False, "--every", help="Evaluate every step, not a search."),
        json: o.Json = False,
    ) -> int:
        """Find the first step of a run after which the drop exceeds a limit; nothing is retrained.

        Exit status 1 if there is one, 0 if not.
        """
        import json as jsonlib

        from gracile.train.bisect import bisect as search
        from gracile.train.finished import open_run

        found = search(open_run(run, weights), metric, max_drop, every=every, say=say)
        code = 0 if found.step is None else 1
        if json:
            answer = {
                "format": 1, "status": "drop exceeded" if code else "ok", "exit": code,
                "run": str(run), "metric": metric, "max_drop": max_drop, "base": found.base,
                "found": found.step, "rows": found.rows, "points": found.points,
                "warnings": [{"code": c, "text": t} for c, t in found.warnings],
            }  # fmt: skip
            print(jsonlib.dumps(answer))
            return code
        out.print(_table(found.rows, metric))
        write_text(f"validation split; evaluated {len(found.rows)} of {found.points} states")
        for name, text in found.warnings:
            out.print(f"[yellow]warning[/yellow] {name}: {text}", soft_wrap=True)
        write_text(_verdict(found.step, metric, max_drop))
        return code


def _table(rows: list[dict[str, Any]], metric: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("step", "kind", "by", "what", metric, "drop"):
        table.add_column(column, justify="right" if column in (metric, "drop") else "left")
    for r in rows:
        step = "" if r["step"] is None else str(r["step"])
        numbers = (f"{r[metric]:.4f}", f"{r['drop']:.3g}")
        table.add_row(step, r["kind"], r["by"], r["what"], *numbers)
    return table


def _verdict(step: dict[str, Any] | None, metric: str, max_drop: float) -> str:
    if step is None:
        return f"no step found after which {metric} is off by more than {max_drop:g}"
    name = "training itself" if step["id"] is None else f"{step['id']} ({step['kind']})"
    return f"first step past {max_drop:g}: {name}, {metric} off by {step['drop']:.3g}"
