"""`gracile compare`: several recipes under equal conditions: same data, budget and seeds."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from gracile.cli import options as o
from gracile.cli.output import say, write_text


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def compare(
        model: o.Model,
        recipes: Annotated[
            list[Path],
            typer.Option("--recipes", metavar="FILE", help="A recipe to compare. Repeat for each."),
        ],
        out: o.Out,
        data: o.Data = "digits",
        weights: o.Weights = None,
        runtime: o.Runtimes = None,
        seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds 0..N-1 for each.")] = 1,
        set_: o.Set = None,
        resume: bool = typer.Option(False, "--resume", help="Go on with the runs in --out."),
        threads: o.Threads = 1,
        device: o.Device = "cpu",
        json: o.Json = False,
    ) -> int:
        """Run recipes side by side and tabulate accuracy, speed and size, mean over seeds.

        The first recipe's `train.epochs` and `train.batch_size` must be every other's: an equal
        budget is a condition of the comparison.
        """
        import json as jsonlib

        from gracile.errors import UserError
        from gracile.recipe.load import load
        from gracile.recipe.patch import with_overrides
        from gracile.report.comparison import write_comparison
        from gracile.report.html import write
        from gracile.report.tables import comparison_markdown
        from gracile.train.job import Job
        from gracile.train.run import check, run

        loaded = {p: with_overrides(load(p), set_ or []) for p in recipes}
        if len({p.stem for p in recipes}) != len(recipes):
            raise UserError("--recipes: two files have one name; the name labels the row.")
        first = loaded[recipes[0]].train
        for p, r in loaded.items():
            if (r.train.epochs, r.train.batch_size) != (first.epochs, first.batch_size):
                raise UserError(
                    f"{p}: trains {r.train.epochs} epochs of batch {r.train.batch_size}, "
                    f"{recipes[0]} {first.epochs} of {first.batch_size}; equal budgets are needed. "
                    "Use --set train.epochs=N for all."
                )
        jobs = {
            (p.stem, seed): Job(
                model=model, data=data, recipe=with_overrides(r, [f"seed={seed}"]),
                out=out / f"{p.stem}-seed{seed}", weights=weights,
                runtimes=tuple(dict.fromkeys(runtime or ())), threads=threads, device=device,
                progress=not json, command=shlex.join(["gracile", *sys.argv[1:]]), say=say,
            )
            for p, r in loaded.items()
            for seed in range(seeds)
        }  # fmt: skip
        check(jobs.values(), resume=resume)
        rows = []
        for (recipe, seed), job in jobs.items():
            say(f"{recipe}, seed {seed}")
            result = run(job, resume=resume)
            write(job.out)
            rows.append(
                {
                    "recipe": recipe,
                    "seed": seed,
                    "top1": result["after"]["top1"],
                    "drop": result["drop_points"],
                    "speedup": {k: v["ratio"] for k, v in result["speedup"].items()},
                    "macs": result["after"]["macs"],
                    "bytes": result["after"]["bytes"],
                }
            )
        page = write_comparison(out, rows)
        if json:
            print(
                jsonlib.dumps(
                    {"format": 1, "status": "ok", "exit": 0, "rows": rows, "out": str(out)}
                )
            )
        else:
            write_text(comparison_markdown(rows))
            write_text(f"page: {page}")
        return 0
