"""`compare.html` and `compare.json`: several recipes side by side, mean and spread over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from gracile.core.state import write_atomic, write_json
from gracile.errors import UserError
from gracile.report.candidates import Candidate, candidates, comparison_table, runtimes_of
from gracile.report.figures import Dot, Figure, Point, figure, scatter
from gracile.report.page import Absent, Section, render
from gracile.report.verdict import runtime_name

FORMAT = 1


def write_comparison(out_dir: str | Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `compare.html` and `compare.json` for runs of several recipes.

    Args:
        out_dir: made if needed.
        rows: one mapping a run: `recipe` (name), `seed`, `top1` (share), `drop` (points lost),
            `speedup` (runtime -> measured ratio), `macs`, `bytes`. All but `recipe` may be absent
            or None.

    Returns:
        The path of the page.

    Raises:
        UserError: no rows, or a row that breaks the form.
    """
    if not rows:
        raise UserError("nothing to compare: no run has finished.")
    found = candidates(rows)
    out = Path(out_dir)
    data = {"format": FORMAT, "rows": [dict(r) for r in rows]}
    write_json(out / "compare.json", {**data, "recipes": [asdict(c) for c in found]})
    runs = f"{len(rows)} runs of {len(found)} recipes"
    page = render(
        "comparison.html.j2", parts=[_side_by_side(found), _plots(found, rows)], runs=runs
    )
    write_atomic(out / "compare.html", page.encode())
    return out / "compare.html"


def _side_by_side(found: Sequence[Candidate]) -> Section:
    table = comparison_table(found)
    return Section("table", table.title, (table,))


def _plots(found: Sequence[Candidate], rows: Sequence[Mapping[str, Any]]) -> Section | Absent:
    title = "Accuracy against speed-up"
    plots = tuple(p for n in runtimes_of(found) if (p := _plot(n, found, rows)) is not None)
    if not plots:
        return Absent(title, "no run has both an accuracy and a measured speed-up.")
    return Section("plot", title, plots)


def _plot(
    runtime: str, found: Sequence[Candidate], rows: Sequence[Mapping[str, Any]]
) -> Figure | None:
    dots = [
        Dot(str(i + 1), s.mean, 100 * c.top1.mean, s.sd, c.top1.sd and 100 * c.top1.sd)
        for i, c in enumerate(found)
        if c.top1 is not None and (s := c.speedup.get(runtime)) is not None
    ]
    if not dots:
        return None
    cloud: list[Point] = [
        ((row.get("speedup") or {})[runtime], 100 * row["top1"])
        for row in rows
        if row.get("top1") is not None and (row.get("speedup") or {}).get(runtime) is not None
    ]
    spoken = f"Top-1 accuracy in % against measured speed-up in {runtime_name(runtime)}"

    def draw(width: int) -> Markup:
        axes = {"x": "measured speed-up (×)", "y": "top-1 (%)"}
        return scatter(spoken, dots, width=width, cloud=cloud, **axes)

    note = (
        "Numbers are rows of the table; small dots are single runs, crosses one standard deviation."
    )
    return figure(runtime_name(runtime), draw, note)
