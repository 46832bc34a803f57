"""The climbs of a recovery ladder: what each rung cost, what it brought, and whether it stayed."""

from collections.abc import Mapping, Sequence
from typing import Any

from gracile.report.page import Section
from gracile.report.run import Run
from gracile.report.texts import Table, integer, number, percent_text, signed

NOTE = (
    "Top-1 is that on the validation data; each rung's time includes measuring it. A rung that "
    "lost accuracy was taken back. Climbing ends as soon as the accuracy is within the budget."
)


def ladder(run: Run) -> list[Section]:
    """The section of a report; none where no ladder climbed."""
    climbs: Sequence[Mapping[str, Any]] = run.result.get("ladder") or ()
    rows = tuple(row for climbed in climbs for row in _rows(climbed))
    if not rows:
        return []
    columns = (
        "Entry", "Epoch", "Rung", "Top-1 before (%)", "With it (%)", "Gain (points)",
        "Seconds", "Images", "Kept",
    )  # fmt: skip
    table = Table("Recovery ladder", columns, rows, frozenset({0, 2, 8}), NOTE)
    return [Section("ladder", "Recovery ladder", (table,))]


def _rows(climbed: Mapping[str, Any]) -> list[tuple[str, ...]]:
    entry, epoch = str(climbed.get("entry")), integer(climbed.get("epoch"))
    rungs: Sequence[Mapping[str, Any]] = climbed.get("rungs") or ()
    if not rungs:
        before = percent_text(climbed.get("before"))
        return [(entry, epoch, "none needed", before, before, signed(0.0), "–", "–", "–")]
    return [
        (entry, epoch, str(r.get("rung")), percent_text(r.get("before")),
         percent_text(r.get("after")), signed(r.get("gain") or 0.0), number(r.get("seconds"), 2),
         integer(r.get("images")), _kept(r))
        for r in rungs
    ]  # fmt: skip


def _kept(rung: Mapping[str, Any]) -> str:
    if rung.get("why"):
        return f"not taken: {rung['why']}"
    return "yes" if rung.get("kept") else "no"
