"""Before, after, change: the summary table, for the terminal, for Markdown and for the page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from gracile.report.candidates import candidates, comparison_table
from gracile.report.texts import COUNTS, SIZES, Table, scaled, signed
from gracile.report.verdict import interval, per_runtime, ratios, runtime_name, section, verdict


@dataclass(frozen=True)
class Line:
    """One quantity; its unit is part of the label."""

    label: str
    before: str
    after: str
    change: str


def lines(result: Mapping[str, Any]) -> list[Line]:
    """What was measured before and after, in the order people ask for it.

    A quantity that neither side has is left out; one that a single side has shows a dash.
    """
    before, after = section(result, "before"), section(result, "after")
    out = [
        _accuracy("Top-1 accuracy (%)", before.get("top1"), after.get("top1")),
        *(
            _accuracy(f"Top-1, {runtime_name(n)} (%)", old, new)
            for n, old, new in _both(before, after, "accuracy")
        ),
        _accuracy("Top-5 accuracy (%)", before.get("top5"), after.get("top5")),
        _plain("Loss (nats)", before.get("loss"), after.get("loss")),
        _scaled("Multiply-adds", COUNTS, before.get("macs"), after.get("macs")),
        _scaled("Multiply-adds, mean over inputs", COUNTS, before.get("macs"), exits["mean_macs"])
        if (exits := section(result, "exits"))
        else None,
        _scaled("Parameters", COUNTS, before.get("params"), after.get("params")),
        _scaled("Parameters that are not 0", COUNTS, before.get("nonzeros"), after.get("nonzeros")),
        _scaled("Size of the weights", SIZES, before.get("bytes"), after.get("bytes")),
        _scaled("Packed file", SIZES, before.get("bytes"), after["packed_bytes"])
        if "packed_bytes" in after
        else None,
        *(
            _scaled(f"Artifact, {runtime_name(n)}", SIZES, old, new)
            for n, old, new in _both(before, after, "artifact_bytes")
        ),
        *(
            _latency(n, old, new, ratios(result).get(n))
            for n, old, new in _both(before, after, "latency")
        ),
    ]
    return [line for line in out if line is not None]


def before_after(result: Mapping[str, Any]) -> Table:
    """The summary as a Table."""
    rows = tuple((n.label, n.before, n.after, n.change) for n in lines(result))
    return Table("Before and after", ("", "Before", "After", "Change"), rows)


def summary(result: Mapping[str, Any]) -> RenderableType:
    """The end of a run for the terminal: the verdict's sentence and the table.

    Goal checks and warnings are the caller's to print.
    """
    judged = verdict(result)
    style = "bold" if judged.met is None else "bold green" if judged.met else "bold yellow"
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    summed = before_after(result)
    for number, column in enumerate(summed.columns):
        table.add_column(column, justify="left" if number in summed.words else "right")
    for row in summed.rows:
        table.add_row(*(Text(cell) for cell in row))
    return Group(Text.assemble((judged.label, style), "  ", judged.headline), table)


def markdown(result: Mapping[str, Any]) -> str:
    """Verdict and table as Markdown, for a README or an issue."""
    judged = verdict(result)
    speedups = tuple(
        (f"Speed-up, {runtime_name(n)}, 95 % interval (×)", "", "", interval(s["ci95"], unit=""))
        for n, s in per_runtime(result, "speedup").items()
        if s.get("ci95")
    )
    table = before_after(result)
    rows = _markdown_rows(table.columns, (*table.rows, *speedups), table.words)
    return f"**{judged.label}.** {judged.headline}\n\n{rows}"


def comparison_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `compare.html` as Markdown, from the same rows.

    Raises:
        UserError: a row that breaks the form.
    """
    table = comparison_table(candidates(rows))
    return _markdown_rows(table.columns, table.rows, table.words) + f"\n{table.note}\n"


def _markdown_rows(
    columns: Sequence[str], rows: Sequence[Sequence[str]], words: frozenset[int]
) -> str:
    rule = "|".join(("", *("---" if i in words else "---:" for i in range(len(columns))), ""))
    cells = (" | ".join(_markdown_cell(c) for c in row) for row in (columns, *rows))
    head, *body = (f"| {text} |" for text in cells)
    return "\n".join([head, rule, *body]) + "\n"


def _both(
    before: Mapping[str, Any], after: Mapping[str, Any], part: str
) -> Iterator[tuple[str, Any, Any]]:
    """(runtime, before, after) of every runtime that either side has."""
    old, new = section(before, part), section(after, part)
    for name in dict.fromkeys([*old, *new]):
        yield name, old.get(name), new.get(name)


def _accuracy(label: str, before: float | None, after: float | None) -> Line | None:
    if before is None and after is None:
        return None
    change = "–"
    if before is not None and after is not None:
        change = signed(100 * (after - before)) + " points"
    return Line(label, _percent(before), _percent(after), change)


def _plain(label: str, before: float | None, after: float | None) -> Line | None:
    if before is None and after is None:
        return None
    change = "–" if before is None or after is None else signed(after - before, 3)
    return Line(label, _three(before), _three(after), change)


def _scaled(
    label: str, steps: Sequence[tuple[float, str]], before: float | None, after: float | None
) -> Line | None:
    if before is None and after is None:
        return None
    unit, (old, new) = scaled(steps, before, after)
    change = "–"
    if before and after is not None:
        change = signed(100 * (after / before - 1), 1) + " %"
    return Line(f"{label} ({unit})" if unit else label, old, new, change)


def _latency(
    name: str, before: float | None, after: float | None, ratio: float | None
) -> Line | None:
    if before is None and after is None:
        return None
    if ratio is None and before and after:
        ratio = before / after
    change = "–"
    if ratio:
        change = f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
    return Line(f"Latency, {runtime_name(name)} (ms)", _three(before), _three(after), change)


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}"


def _markdown_cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
