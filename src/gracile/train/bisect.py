"""Bisect: which edit of a finished run did the harm, found by replaying prefixes of its Plan.

The idea is ours, after `git bisect`. Nothing is retrained, so two stretches are told apart: cuts
are made one after another on the *original* weights (what they did before training went on), masks
and grids are laid on the weights that training *ended* with. The first point is the original
network, the last one what the run stored, both exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from gracile.core.plan import Plan
from gracile.errors import UserError
from gracile.train.finished import Finished, describe, named_tensors, settled, value_edits

T = TypeVar("T")
VALUES = ("mask", "bits")  # kinds of edits that leave the structure alone
METRICS = ("top1", "top5", "loss")
ROUNDING = 1e-9  # points; a drop of exactly the limit is within it


@dataclass(frozen=True)
class Point:
    """One state of the network between the original and what the run stored.

    Attributes:
        edits: how many edits of the Plan are applied.
        trained: on the weights training ended with, else on the original ones.
    """

    edits: int
    trained: bool


@dataclass(frozen=True)
class Found:
    """What a bisection found.

    Attributes:
        base: the metric of the network that drops count from: the first point that was judged.
        step: the first row whose drop exceeds the limit, or None.
        rows: every point that was evaluated, in order.
        points: how many there are in all.
        warnings: (code, text).
    """

    base: float
    step: dict[str, Any] | None
    rows: list[dict[str, Any]]
    points: int
    warnings: list[tuple[str, str]]


def bisect(
    run: Finished, metric: str, max_drop: float, *, every: bool = False, say: Callable[[str], None]
) -> Found:
    """Find the first edit whose application makes the drop exceed a limit.

    Args:
        run: see `open_run`.
        metric: top1 or top5, whose drop counts in points; or loss, whose rise counts in nats.
        max_drop: the limit.
        every: evaluate every point, in place of the few that a binary search needs.
        say: told what is evaluated.

    Raises:
        UserError: no such metric here, or a Plan that cannot be replayed step by step.
    """
    if metric not in METRICS:
        raise UserError(f"--metric must be one of {', '.join(METRICS)}, got '{metric}'.")
    stretches, warnings = _stretches(run)
    values: dict[Point, float] = {}

    def value(point: Point) -> float:
        if point not in values:
            say(f"evaluate: {_name(run, point)}")
            values[point] = _value(run, point, metric)
        return values[point]

    base = value(stretches[0][0])

    def drop(point: Point) -> float:
        return value(point) - base if metric == "loss" else 100 * (base - value(point))

    found: Point | None = None
    for stretch in stretches:
        if found is None:
            found = first_exceeding(drop, stretch, max_drop, every=every)
        if every:
            [value(p) for p in stretch]
    points = [p for stretch in stretches for p in stretch]
    rows = {p: _row(run, p, metric, values[p], drop(p)) for p in points if p in values}
    step = rows[found] if found is not None else None
    return Found(base, step, list(rows.values()), len(points), warnings)


def first_exceeding(
    drop: Callable[[T], float], points: Sequence[T], limit: float, *, every: bool = False
) -> T | None:
    """The first point whose drop exceeds a limit; None if there is none.

    Binary search, which takes it that nothing exceeds the limit if the last point does not. Where
    the drops it sees do not grow from point to point, all are evaluated, one after another.

    Args:
        drop: of a point; asked as seldom as possible.
        points: at least one.
        limit: in the unit of `drop`.
        every: ask about every point from the first one on, until one exceeds.

    >>> first_exceeding([0, 0, 3, 5].__getitem__, range(4), 2)
    2
    """
    seen: dict[int, float] = {}

    def exceeds(k: int) -> bool:
        seen[k] = drop(points[k])
        return seen[k] > limit + ROUNDING

    if every:
        return next((p for k, p in enumerate(points) if exceeds(k)), None)
    below, above = -1, len(points) - 1
    if not exceeds(above):
        return None
    while above - below > 1:
        middle = (above + below) // 2
        if exceeds(middle):
            above = middle
        else:
            below = middle
    drops = [seen[k] for k in sorted(seen)]
    if drops != sorted(drops):
        return next(p for k, p in enumerate(points) if exceeds(k))
    return points[above]


def _stretches(run: Finished) -> tuple[list[list[Point]], list[tuple[str, str]]]:
    """The points in order: the cuts on the original weights, the rest on the trained ones."""
    edits = run.plan.edits
    cut = _cut(run)
    if smaller := run.plan.of_kind("factorize"):
        raise UserError(
            f"{run.folder}: edit {smaller[0].id} factorized '{smaller[0].at}'; its factors were "
            "made from weights that the run no longer has, so cuts cannot be replayed one by one "
            "on the original. `gracile undo` leaves single steps out."
        )
    early = next((e for e in edits[:cut] if e.kind in VALUES), None)
    if early is not None:
        raise UserError(
            f"{run.folder}: edit {early.id} ({early.kind}) lies before a cut; what its key names "
            "fits only the network after it, so the plan cannot be replayed step by step."
        )
    if not run.trained:
        return [[Point(k, False) for k in range(len(edits) + 1)]], []
    before = [Point(k, False) for k in range(cut + 1)]
    after = [Point(k, True) for k in range(cut, len(edits) + 1)]
    if run.pretrained:
        return [before, after], []
    text = (
        f"the run began from random weights: its {cut} cut(s) are not judged, and drops count from "
        "where training ended."
    )
    return [after], [("not-judged", text)] if cut else []


def _value(run: Finished, point: Point, metric: str) -> float:
    plan = Plan(architecture=run.plan.architecture).extended(run.plan.edits[: point.edits])
    model = run.build(plan)
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            value = run.floats(name) if point.trained else tensor
            tensor.copy_(settled(value, value_edits(plan, name), run.stored))
    found: float | None = getattr(run.score(run.quantized(model, plan, run.stored)), metric)
    if found is None:
        raise UserError(f"--metric {metric}: the data has too few classes for it; use top1.")
    return found


def _row(run: Finished, point: Point, metric: str, value: float, drop: float) -> dict[str, Any]:
    kind = {Point(0, False): "original", Point(_cut(run), True): "trained"}.get(point)
    if kind is not None:
        what: dict[str, Any] = {"step": None, "id": None, "kind": kind, "by": "", "what": ""}
    else:
        e = run.plan.edits[point.edits - 1]
        what = {
            "step": point.edits - 1, "id": e.id, "kind": e.kind, "by": e.by, "what": describe(e),
        }  # fmt: skip
    return {**what, metric: value, "drop": drop}


def _cut(run: Finished) -> int:
    """Number of edits up to the last one that changes the structure."""
    return max((k + 1 for k, e in enumerate(run.plan) if e.kind not in VALUES), default=0)


def _name(run: Finished, point: Point) -> str:
    row = _row(run, point, "", 0.0, 0.0)
    return f"{row['id']} {row['kind']} {row['what']}" if row["id"] else str(row["kind"])
