"""Recipes over their seeds: mean and spread of accuracy, speed-up and size, and their table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from gracile.errors import UserError
from gracile.report.texts import COUNTS, SIZES, Table, scaled, signed
from gracile.report.verdict import runtime_name

FIELDS = ("recipe", "seed", "top1", "drop", "speedup", "macs", "bytes")


@dataclass(frozen=True)
class Spread:
    """Mean over n runs and their sample standard deviation (None for a single run)."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Candidate:
    """One recipe over its seeds; a quantity no run has is None."""

    recipe: str
    seeds: tuple[int, ...]
    top1: Spread | None
    drop: Spread | None
    macs: Spread | None
    bytes: Spread | None
    speedup: dict[str, Spread]


def candidates(rows: Sequence[Mapping[str, Any]]) -> list[Candidate]:
    """Group single runs by recipe, in order of first appearance.

    Raises:
        UserError: a row without `recipe`, or with a field that is not known.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for number, row in enumerate(rows):
        unknown = sorted(set(row) - set(FIELDS))
        if unknown or "recipe" not in row:
            wrong = f"has unknown {unknown}" if unknown else "has no 'recipe'"
            raise UserError(f"row {number} of the comparison {wrong}; fields: {', '.join(FIELDS)}.")
        groups.setdefault(str(row["recipe"]), []).append(row)
    return [_candidate(recipe, group) for recipe, group in groups.items()]


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and sample standard deviation (n - 1) of what is there.

    >>> spread([1.0, 2.0, 3.0, None])
    Spread(mean=2.0, sd=1.0, n=3)
    """
    known = [v for v in values if v is not None]
    if not known:
        return None
    return Spread(fmean(known), stdev(known) if len(known) > 1 else None, len(known))


def comparison_table(found: Sequence[Candidate]) -> Table:
    """One row a recipe: mean ± sample standard deviation over its seeds."""
    runtimes = runtimes_of(found)
    macs_unit, macs = scaled(COUNTS, *(c.macs.mean if c.macs else None for c in found))
    size_unit, sizes = scaled(SIZES, *(c.bytes.mean if c.bytes else None for c in found))
    columns = (
        "Recipe", "Seeds", "Top-1 (%)", "Drop (points)",
        *(f"Speed-up, {runtime_name(n)} (×)" for n in runtimes),
        f"MACs ({macs_unit})" if macs_unit else "MACs", f"Size ({size_unit})",
    )  # fmt: skip
    rows = tuple(
        (f"{i + 1} · {c.recipe}", str(max(len(c.seeds), 1)), _shown(c.top1, 100), _shown(c.drop),
         *(_shown(c.speedup.get(n)) for n in runtimes), macs[i], sizes[i])
        for i, c in enumerate(found)
    )  # fmt: skip
    note = "Mean ± sample standard deviation over seeds; speed-ups are measured."
    return Table("Side by side", columns, rows, note=note)


def runtimes_of(found: Sequence[Candidate]) -> list[str]:
    """Every runtime any recipe was timed in."""
    return list(dict.fromkeys(name for c in found for name in c.speedup))


def _candidate(recipe: str, group: Sequence[Mapping[str, Any]]) -> Candidate:
    runtimes = dict.fromkeys(name for row in group for name in row.get("speedup") or {})
    speedups = {
        name: spread([(row.get("speedup") or {}).get(name) for row in group]) for name in runtimes
    }
    return Candidate(
        recipe=recipe,
        seeds=tuple(row["seed"] for row in group if row.get("seed") is not None),
        top1=spread([row.get("top1") for row in group]),
        drop=spread([row.get("drop") for row in group]),
        macs=spread([row.get("macs") for row in group]),
        bytes=spread([row.get("bytes") for row in group]),
        speedup={name: s for name, s in speedups.items() if s is not None},
    )


def _shown(value: Spread | None, factor: float = 1) -> str:
    if value is None:
        return "–"
    mean = signed(factor * value.mean).removeprefix("+")
    return mean if value.sd is None else f"{mean} ± {factor * value.sd:.2f}"
