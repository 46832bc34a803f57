"""`gracile undo`: a finished run without some of its steps."""

from pathlib import Path
from typing import Annotated

import typer

from gracile.cli import options as o
from gracile.cli.output import out, say, write_text

SHOWN = 9  # edits of one entry and kind that are listed one by one


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def undo(
        run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's directory.")],
        step: Annotated[
            list[str],
            typer.Option(
                "--step",
                metavar="N",
                help="What to leave out: an edit of plan.json by number or id (e3), or a recipe "
                "entry with all its edits. Repeatable.",
            ),
        ],
        weights: Annotated[
            Path | None,
            typer.Option(
                "--weights", metavar="FILE", help="The weights file the run began from, if any."
            ),
        ] = None,
        out_: Annotated[
            Path | None,
            typer.Option(
                "--out", metavar="DIR", help="Write the model there; without it, only measure."
            ),
        ] = None,
        json: o.Json = False,
    ) -> int:
        """Replay a run's plan without some steps and score both on the validation split."""
        import json as jsonlib

        from rich.table import Table

        from gracile.core.result import Result
        from gracile.errors import UserError
        from gracile.train.checkpoint import load_model, save_model
        from gracile.train.finished import describe, open_run
        from gracile.train.replay import undo as undone

        if out_ is not None and (out_.is_file() or (out_.is_dir() and any(out_.iterdir()))):
            raise UserError(f"--out {out_} is there already; name a new or empty directory.")
        opened = open_run(run, weights)
        done = undone(opened, step)
        say("score: the run, and without the steps")
        before = load_model(run, opened.example, factory=opened.at.fresh).model
        found = {
            name: {
                **opened.score(model).to_dict(),
                "params": sum(p.numel() for p in model.parameters()),
            }
            for name, model in (("before", before), ("after", done.model))
        }
        if out_ is not None:
            save_model(out_, Result(done.model.cpu(), done.plan, tensors=done.tensors))
        dropped = [
            {"id": e.id, "kind": e.kind, "by": e.by, "what": describe(e)} for e in done.dropped
        ]
        if json:
            warnings = [{"code": c, "text": t} for c, t in done.warnings]
            answer = {
                "format": 1, "status": "ok", "exit": 0, "run": str(run), "undone": dropped,
                "edits": len(done.plan), **found, "out": str(out_) if out_ else None,
                "max_error": done.proof.max_error if done.proof else None, "warnings": warnings,
            }  # fmt: skip
            print(jsonlib.dumps(answer))
            return 0
        for line in _lines(dropped):
            write_text(f"undone: {line}")
        table = Table(box=None, pad_edge=False)
        for column in ("", "run", "without"):
            table.add_column(column, justify="right" if column else "left")
        for key in ("top1", "top5", "loss", "params"):
            a, b = found["before"][key], found["after"][key]
            if a is not None:
                table.add_row(key, *(f"{v:,}" if key == "params" else f"{v:.4f}" for v in (a, b)))
        out.print(table)
        write_text(
            f"validation split, {found['after']['n']} samples; {len(done.plan)} edit(s) left"
        )
        for code, text in done.warnings:
            out.print(f"[yellow]warning[/yellow] {code}: {text}", soft_wrap=True)
        if out_ is not None:
            write_text(f"model: {out_}")
        return 0


def _lines(dropped: list[dict[str, str]]) -> list[str]:
    """One line an edit; many of one kind by one entry are counted."""
    groups: dict[tuple[str, str], list[str]] = {}
    for e in dropped:
        line = f"{e['id']} {e['kind']} by {e['by']}: {e['what']}"
        groups.setdefault((e["kind"], e["by"]), []).append(line)
    return [
        line
        for (kind, by), lines in groups.items()
        for line in (lines if len(lines) <= SHOWN else [f"{len(lines)} {kind} edits by {by}"])
    ]
