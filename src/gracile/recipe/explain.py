"""What will happen when: every firing of every method, without a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO

from rich.console import Console
from rich.table import Table

from gracile.core.schedule import Calendar, timetable
from gracile.errors import BindError
from gracile.recipe.fields import LevelValue
from gracile.recipe.schema import Entry, Recipe


@dataclass(frozen=True)
class Firing:
    """One row of the timetable.

    Attributes:
        id: the recipe's name of the entry.
        method: `verb: name`.
        epoch: None after training, and for a method that acts all the time.
        batch: mini-batch within the epoch; None where epoch is None.
        progress: 0 at the first firing, 1 at the last; None for a method that acts all the time.
        levels: option -> its level at this firing, for options that are levels.
    """

    id: str
    method: str
    epoch: int | None = None
    batch: int | None = None
    progress: float | None = None
    levels: dict[str, float] = field(default_factory=dict)

    @property
    def moment(self) -> str:
        """When, in words."""
        if self.progress is None:
            return "always"
        return "end" if self.epoch is None else f"epoch {self.epoch}, batch {self.batch}"


def timetable_rows(recipe: Recipe, calendar: Calendar) -> list[Firing]:
    """All firings, in recipe order, each method's in time order.

    Args:
        recipe: any recipe; no model is needed.
        calendar: how long training is.

    Raises:
        BindError: a method never fires; names its entry and line.
    """
    return [row for id in recipe.methods for row in _rows(id, recipe, calendar)]


def render(rows: Sequence[Firing], most: int = 16) -> Table:
    """The timetable as a table; of more than `most` firings of a method the middle is left out."""
    table = Table("method", "does", "when", "progress", "levels", title="timetable")
    for id in dict.fromkeys(row.id for row in rows):
        mine = [row for row in rows if row.id == id]
        head, tail = (most - most // 4, most // 4) if len(mine) > most else (len(mine), 0)
        for i, row in enumerate(mine[:head] + mine[len(mine) - tail :]):
            if tail and i == head:
                table.add_row("", "", f"... {len(mine) - most} more ...", "", "")
            table.add_row(
                "" if i else row.id,
                "" if i else row.method,
                row.moment,
                "" if row.progress is None else f"{row.progress:.3f}",
                ", ".join(f"{k} {v:.4f}" for k, v in row.levels.items()),
            )
        table.add_section()
    return table


def timetable_text(recipe: Recipe, calendar: Calendar, width: int = 100) -> str:
    """The rendered timetable as plain text."""
    out = StringIO()
    Console(file=out, width=width).print(render(timetable_rows(recipe, calendar)))
    return out.getvalue()


def _rows(id: str, recipe: Recipe, calendar: Calendar) -> list[Firing]:
    entry = recipe.methods[id]
    name = f"{entry.verb}: {entry.method}"
    if entry.options.timing is None:
        return [Firing(id, name)]
    try:
        table = timetable(entry.options.timing, calendar, strict=recipe.compat == "strict")
    except BindError as e:
        place = recipe.places.get(("methods", id), recipe.path)
        raise BindError(f"{place}: '{id}': {e}") from None
    out = []
    for k in range(len(table)):
        p = table.progress(k)
        epoch, batch = table.instants[k] if k < len(table.instants) else (None, None)
        out.append(Firing(id, name, epoch, batch, p, _levels(entry, p)))
    return out


def _levels(entry: Entry, progress: float) -> dict[str, float]:
    values = {k: getattr(entry.options, k) for k in type(entry.options).model_fields}
    return {k: v.at(progress) for k, v in values.items() if isinstance(v, LevelValue)}
