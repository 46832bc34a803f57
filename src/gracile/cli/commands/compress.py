"""`gracile compress`: one recipe in, a smaller, verified, measured model out."""

import shlex
import sys
from pathlib import Path

import typer

from gracile.cli import options as o
from gracile.cli.output import say, show


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def compress(
        model: o.Model,
        recipe: o.RecipeFile,
        out: o.Out,
        data: o.Data = "digits",
        weights: o.Weights = None,
        runtime: o.Runtimes = None,
        set_: o.Set = None,
        resume: bool = typer.Option(False, "--resume", help="Go on with the run in --out."),
        threads: o.Threads = 1,
        hint: o.Hint = "f32",
        batch: o.Batch = 1,
        device: o.Device = "cpu",
        json: o.Json = False,
    ) -> int:
        """Train, prune, distil, quantize as the recipe says; export, verify, measure, report."""
        from gracile.recipe.load import load
        from gracile.recipe.patch import with_overrides
        from gracile.report.html import write
        from gracile.train.job import Job
        from gracile.train.run import run

        loaded = load(recipe)
        if set_:
            loaded = with_overrides(loaded, set_)
        job = Job(
            model=model,
            data=data,
            recipe=loaded,
            out=Path(out),
            weights=weights,
            runtimes=tuple(dict.fromkeys(runtime or ())),
            threads=threads,
            hint=hint,
            batch=batch,
            device=device,
            progress=not json,
            command=shlex.join(["gracile", *sys.argv[1:]]),
            say=say,
        )
        result = run(job, resume=resume)
        say("report")
        write(job.out)
        return show(result, json)
