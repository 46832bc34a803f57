"""`gracile recipe check|explain`: is it right, and what will happen when."""

from pathlib import Path
from typing import Annotated

import typer

from gracile.cli import conversion, simulation
from gracile.cli import options as o
from gracile.cli.output import out, write_text

File = Annotated[Path, typer.Argument(metavar="FILE", help="The recipe (YAML).")]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="Bind to this model as well.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Check a recipe, or print its timetable.", no_args_is_help=True)
    app.add_typer(group, name="recipe")
    conversion.add(group)
    simulation.add(group)

    @group.command()
    def check(
        file: File, model: ModelOption = None, data: o.Data = "digits", set_: o.Set = None
    ) -> int:
        """Validate a recipe; with --model, bind it too: selectors, timings, needs, conflicts."""
        recipe = _load(file, set_)
        if model is not None:
            _bind(recipe, model, data)
        n = len(recipe.methods)
        write_text(f"{file}: ok, {n} method(s)" + (f", binds to {model}" if model else ""))
        return 0

    @group.command()
    def explain(
        file: File,
        model: ModelOption = None,
        data: o.Data = "digits",
        steps: Annotated[
            int, typer.Option("--steps", min=1, help="Mini-batches per epoch (without --model).")
        ] = 100,
        set_: o.Set = None,
    ) -> int:
        """Print every firing with its level; with --model, also which tensors are meant."""
        from gracile.core.schedule import Calendar
        from gracile.recipe.explain import render, timetable_rows

        recipe = _load(file, set_)
        session = _bind(recipe, model, data) if model is not None else None
        calendar = (
            session.calendar
            if session
            else Calendar(recipe.train.epochs, steps, recipe.train.accumulate)
        )
        out.print(render(timetable_rows(recipe, calendar)))
        if session is not None:
            for m in session.methods:
                names = getattr(m, "addresses", None)
                if names:
                    write_text(f"{m.id}: {len(names)} tensors: {', '.join(names)}")
            for code, text in session.warnings:
                write_text(f"warning {code}: {text}")
        return 0


def _load(file: Path, overrides: list[str] | None):  # type: ignore[no-untyped-def]
    from gracile.recipe.load import load
    from gracile.recipe.patch import with_overrides

    recipe = load(file)
    return with_overrides(recipe, overrides) if overrides else recipe


def _bind(recipe, model: str, data: str):  # type: ignore[no-untyped-def]
    from gracile.train.job import Job
    from gracile.train.run import bind

    return bind(Job(model=model, data=data, recipe=recipe, out=Path()))
