"""Binding: a Recipe meets a model and a training length; what cannot work is refused.

After binding every selector has matched, every timing fires, every need is met and no two entries
decide about the same thing. Nothing has been trained yet.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from gracile import registry
from gracile.core.method import Method
from gracile.core.schedule import Calendar, Timetable, timetable
from gracile.errors import BindError, PlanConflict
from gracile.recipe.schema import Recipe


def build_methods(recipe: Recipe) -> list[Method]:
    """One Method object per recipe entry, in recipe order."""
    out = []
    for id, entry in recipe.methods.items():
        cls = registry.get("method", f"{entry.verb}/{entry.method}").obj
        out.append(cls(id, entry.options))
    return out


def check_needs(methods: list[Method], *, epochs: int, calibration: bool, teacher: bool) -> None:
    """Refuse methods whose needs this session cannot meet.

    Raises:
        BindError: names the method, what it needs and how to give it.
    """
    for m in methods:
        if "train" in m.needs and epochs == 0:
            raise BindError(
                f"'{m.id}' ({m.verb}: {m.kind_name}) acts during training, but train.epochs is 0; "
                "set train: {epochs: N}."
            )
        if "calibration" in m.needs and not calibration:
            raise BindError(
                f"'{m.id}' ({m.verb}: {m.kind_name}) needs calibration data: pass "
                "calibration=<batches> to Session, or set data: {calibration: 300}."
            )
        if "teacher" in m.needs and not teacher:
            raise BindError(f"'{m.id}' needs a teacher, and this session was made without one.")


def timetables(
    methods: list[Method], calendar: Calendar, lines: Mapping[str, int] | None = None
) -> dict[str, Timetable]:
    """All firings of all methods.

    Raises:
        BindError: a method never fires; names its recipe entry and line.
    """
    out = {}
    for m in methods:
        when = m.options.timing
        if when is None:
            continue
        try:
            out[m.id] = timetable(when, calendar)
        except BindError as e:
            line = (lines or {}).get(m.id)
            place = f"'{m.id}'" + (f" (line {line})" if line else "")
            raise BindError(f"{place}: {e}") from None
    return out


def check_claims(methods: list[Method], s: Any, lines: Mapping[str, int] | None = None) -> None:
    """Refuse two methods that decide about the same thing, unless one says `after: <other>`.

    Raises:
        PlanConflict: names both entries with their lines.
    """
    owner: dict[tuple[str, str], Method] = {}
    for m in methods:
        for target in m.claims(s):
            other = owner.get(target)
            if other is not None and getattr(m.options, "after", None) != other.id:
                raise PlanConflict(
                    f"{_entry(other.id, lines)} and {_entry(m.id, lines)} both set "
                    f"{target[0].split(':')[0]} of '{target[1]}'; keep one."
                )
            owner[target] = m


def _entry(id: str, lines: Mapping[str, int] | None) -> str:
    line = (lines or {}).get(id)
    return f"'{id}'" + (f" (line {line})" if line else "")


def class_names(model: nn.Module) -> dict[str, list[str]]:
    """Module path -> its class name and those of its bases, for `type:` selectors."""
    stop = (nn.Module, object)
    return {
        path: [c.__name__ for c in type(m).__mro__ if c not in stop]
        for path, m in model.named_modules()
    }
