"""`report.html`: one self-contained page about one run, made from the files of its directory."""

from datetime import UTC, datetime
from pathlib import Path

from gracile.core.state import write_atomic
from gracile.report.page import render
from gracile.report.run import Run, read
from gracile.report.sections import everything
from gracile.report.verdict import verdict


def write(run_dir: str | Path) -> Path:
    """Write `report.html` beside the files it is made from.

    Needs `result.json`; uses `recipe.yaml`, `plan.json`, `ledger.json`, `records.jsonl` and
    `history.json` where they are there. What a run does not have is listed with one sentence at
    the end of the page. The same files always give the same page.

    Args:
        run_dir: a directory as described in DESIGN.md section 6.

    Returns:
        The path of the page. It loads nothing else: no scripts, fonts or images.

    Raises:
        UserError: the directory is not a finished run, or a file in it is damaged.
    """
    run = read(run_dir)
    page = render(
        "report.html.j2",
        parts=everything(run),
        title=run.name,
        folder=run.path.resolve().name,
        date=_date(run),
        verdict=verdict(run.result),
        warnings=len(run.result.get("warnings") or ()),
    )
    path = run.path / "report.html"
    write_atomic(path, page.encode())
    return path


def _date(run: Run) -> str:
    """When the newest value was measured; a page has no date of its own."""
    times = [r.time for r in run.records]
    if not times:
        return ""
    return datetime.fromtimestamp(max(times), UTC).strftime("%Y-%m-%d %H:%M UTC")
