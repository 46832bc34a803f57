"""Regularizers of Distiller as penalties: one entry for each strength, group type and span."""

from collections.abc import Iterable, Iterator
from typing import Any

from gracile.recipe.distiller.names import by_value
from gracile.recipe.distiller.pruners import GRANULARITIES
from gracile.recipe.distiller.read import Policy, Schedule
from gracile.recipe.distiller.timing import Entry

LASSO_EPS = 1e-8  # under the root of channels alone


def convert(s: Schedule, p: Policy) -> list[Entry]:
    """The entries of one policy of a regularizer.

    A threshold zeroes weights, and Distiller cuts out what is zero; gracile cuts out what is
    masked. So the span of a regularizer with a threshold ends, with masks, where an extension acts
    in it, and another begins.
    """
    args = p.component.args
    threshold = args.get("threshold_criteria")
    cuts = {e for q in s.policies if q.kind == "extension" for e in q.epochs} if threshold else ()
    out = []
    for start, stop in runs(p.epochs, cuts):
        if start >= s.epochs:
            continue
        last = stop == (p.stop if s.strict else p.epochs[-1] + 1)
        keep = (last and p.args.get("keep_mask", False)) or (threshold and stop in cuts)
        more: Entry = {}
        if threshold:
            on = "mean_abs" if p.component.cls == "L1Regularizer" else threshold.lower()
            more = {"threshold": "strength", "threshold_on": on, "keep_mask": bool(keep)}
        when = {"start": f"{start}ep", "stop": f"{stop}ep"}
        for strength, group, names in _regimes(s, p):
            out.append(
                {
                    "regularize": "penalty",
                    "weights": names[0] if len(names) == 1 else names,
                    "penalty": _penalty(p.component.cls, group),
                    "granularity": group,
                    "strength": strength,
                    **more,
                    "when": when,
                }
            )
    return out


def runs(epochs: Iterable[int], cuts: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Epochs without gaps, as [start, stop); a new one begins at each cut.

    >>> list(runs([0, 1, 2, 5], [2]))
    [(0, 2), (2, 3), (5, 6)]
    """
    start = stop = -1
    for e in epochs:
        if e != stop or e in cuts:
            if stop > start:
                yield start, stop
            start = e
        stop = e + 1
    yield start, stop


def _regimes(s: Schedule, p: Policy) -> Iterator[tuple[float, str, list[str]]]:
    """(strength, granularity, names), without those of strength 0."""
    keys = (*p.component.keys, "reg_regims")
    regimes: dict[str, tuple[Any, ...]] = {
        n: tuple(v) if isinstance(v, list) else (v, None)
        for n, v in p.component.args["reg_regims"].items()
    }
    for (strength, group), names in by_value(regimes):
        if strength == 0:
            s.warn("ignored", keys, f"has no effect of strength 0 on {', '.join(names)}.")
            continue
        for part in (group or "element").split("+"):
            yield float(strength), GRANULARITIES.get(part, part), names


def _penalty(cls: str, granularity: str) -> Any:
    if cls == "L1Regularizer":
        return "l1"
    if cls == "GroupVarianceRegularizer":
        return "group_variance"
    return {"name": "group_lasso", "eps": LASSO_EPS} if granularity == "channel" else "group_lasso"
