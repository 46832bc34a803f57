"""`gracile recipe simulate`: what a recipe would do to a model, epoch by epoch, in seconds."""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gracile.cli import options as o
from gracile.cli.output import out, write_text

if TYPE_CHECKING:
    from gracile.recipe.schema import Recipe
    from gracile.train.simulate import Fired, Moment, Simulation

LOST = "*"  # behind an entry whose effect is in none of the figures


def add(group: typer.Typer) -> None:
    """Add the command to those of `recipe`."""

    @group.command()
    def simulate(
        file: Annotated[Path, typer.Argument(metavar="FILE", help="The recipe (YAML).")],
        model: Annotated[
            str, typer.Option("--model", metavar="MODEL", help="The model it is for.")
        ],
        weights: o.Weights = None,
        epochs: Annotated[
            int | None, typer.Option("--epochs", min=0, help="Instead of the recipe's.")
        ] = None,
        steps: Annotated[int, typer.Option("--steps", min=1, help="Mini-batches per epoch.")] = 100,
        shape: o.Shape = "3,32,32",
        runtime: o.Runtimes = None,
        set_: o.Set = None,
        json: o.Json = False,
    ) -> int:
        """Run a recipe without data or training: what fires, zeros, cost and learning rate.

        Weights stand still, so accuracy is not told; what only training moves is named in a
        warning. With --runtime it also warns where the pattern brings no speed.
        """
        import json as jsonlib

        from gracile.models.spec import load_weights
        from gracile.recipe.load import load
        from gracile.recipe.patch import with_overrides
        from gracile.train.simulate import simulate as run

        recipe = load(file)
        changes = [*(set_ or ()), *([] if epochs is None else [f"train.epochs={epochs}"])]
        if changes:
            recipe = with_overrides(recipe, changes)
        size = o.sizes(shape)
        net = _fresh(model, recipe)
        if weights is not None:
            load_weights(net, weights)
        example = _example(net, size)
        found = run(recipe, net, example=example, steps_per_epoch=steps, runtimes=runtime or ())
        warnings = [*found.warnings]
        if weights is None and any(e.verb == "prune" for e in recipe.methods.values()):
            text = "no --weights: which weights go is ranked on those the model is built with."
            warnings.append(("fresh-weights", text))
        if json:
            about = {"recipe": str(file), "model": model, "steps": steps}
            told = [{"code": code, "text": text} for code, text in warnings]
            result = {**about, **found.to_dict(), "warnings": told}
            print(jsonlib.dumps({"format": 1, "status": "ok", "exit": 0, **result}))
            return 0
        out.print(_table(found))
        write_text(f"{file} on {model}, {steps} mini-batches per epoch: {_summary(found)}")
        for code, text in warnings:
            out.print(f"[yellow]warning[/yellow] {code}: {text}", soft_wrap=True)
        return 0


def _fresh(model: str, recipe: "Recipe") -> Any:
    """The network as `compress` would begin with it."""
    import torch

    from gracile.core.state import derive_seed
    from gracile.models.spec import resolve

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "init"))
        return resolve(model).model


def _example(net: Any, size: tuple[int, ...]) -> Any:
    """Two random inputs; word numbers where one has a single size and goes to an embedding."""
    import torch

    rng = torch.Generator().manual_seed(0)
    words = [m.num_embeddings for m in net.modules() if isinstance(m, torch.nn.Embedding)]
    if words and len(size) == 1:
        return torch.randint(min(words), (2, *size), generator=rng)
    return torch.randn(2, *size, generator=rng)


def _table(found: "Simulation") -> Any:
    """One row for each epoch; epochs that are alike share one."""
    from rich.table import Table

    note = f"{LOST} not simulated: needs data or training" if found.not_simulated else None
    table = Table(box=None, pad_edge=False, caption=note, caption_justify="left")
    table.add_column("epoch", no_wrap=True)
    table.add_column("fires", overflow="fold")
    for name in ("sparsity", "non-zeros", "parameters", "MACs", "learning rate"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("start", "", *_numbers(found.before), "")
    cells = [(m.epoch, _row(m, found.not_simulated)) for m in found.epochs]
    for row, same in groupby(cells, key=lambda c: c[1]):
        numbers = [epoch for epoch, _ in same]
        first, last = numbers[0], numbers[-1]
        table.add_row(str(first) if first == last else f"{first}-{last}", *row)
    table.add_row("end", *_row(found.end, found.not_simulated))
    return table


def _row(m: "Moment", lost: tuple[str, ...]) -> tuple[str, ...]:
    fires = ", ".join(_fired(f, f.id in lost) for f in m.fired)
    lr = "" if m.learning_rate is None else f"{m.learning_rate:.4g}"
    return (fires, *_numbers(m.count), lr)


def _fired(f: "Fired", lost: bool) -> str:
    """An entry in words: how often it fired, and its levels where it has some."""
    parts = [f.id + (LOST if lost else "")]
    if f.times > 1:
        parts.append(f"{f.times}x")
    parts += [f"{k} {v:.4g}" for k, v in f.levels.items()]
    return " ".join(parts)


def _numbers(count: Any) -> tuple[str, ...]:
    from gracile.units import human_count, percent

    counts = (human_count(n) for n in (count.nnz, count.params, count.macs))
    return (percent(count.sparsity, 2), *counts)


def _summary(found: "Simulation") -> str:
    from gracile.units import human_count

    totals = found.totals
    return (
        f"{human_count(totals['macs_before'])} MACs become {human_count(totals['macs_after'])}, "
        f"{human_count(found.before.params)} parameters {human_count(totals['params'])}, of which "
        f"{human_count(totals['nnz'])} are not zero"
    )
