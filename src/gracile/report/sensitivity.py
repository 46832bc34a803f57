"""`sensitivity.html`: what each tensor minds, as a table of drops and as curves."""

from collections.abc import Sequence
from pathlib import Path

from gracile.analyze.sensitivity import Row, Sensitivity
from gracile.core.state import write_atomic
from gracile.report.figures import STYLES, Figure, Point, figure, line_chart
from gracile.report.page import Block, Items, Prose, Section, render
from gracile.report.run import Run
from gracile.report.texts import Table, percent_text, signed

NOUNS = {"filter": "filters", "channel": "channels", "element": "weights"}


def write_sensitivity(folder: str | Path, scan: Sensitivity, *, name: str, data: str) -> Path:
    """Write `sensitivity.html` beside the scan's other files.

    Args:
        folder: made if needed.
        scan: what is shown.
        name: of the network.
        data: which images were scored.

    Returns:
        The path of the page.
    """
    over = f"{scan.base.images} images of {data}"
    page = render(
        "analysis.html.j2", parts=[_section(scan)], title="Sensitivity", name=name, over=over
    )
    path = Path(folder) / "sensitivity.html"
    write_atomic(path, page.encode())
    return path


def sensitivity(run: Run) -> list[Section]:
    """The scan that lies in a run's directory, if there is one."""
    return [] if run.sensitivity is None else [_section(run.sensitivity)]


def drops(scan: Sensitivity, *, folded: bool = False) -> Table:
    """Points of top-1 lost, a tensor a row and a level a column."""
    levels = list(dict.fromkeys(r.level for r in scan.rows))
    lines: dict[str, dict[float, Row]] = {}
    for r in scan.rows:
        lines.setdefault(r.tensor, {})[r.level] = r
    return Table(
        "Points of top-1 lost",
        ("Tensor", *(_level(scan, v) for v in levels)),
        tuple(
            (t, *(signed(-scan.drop(by[v]), 1) if v in by else "–" for v in levels))
            for t, by in lines.items()
        ),
        note=_how(scan),
        folded=folded,
    )


def _section(scan: Sensitivity) -> Section:
    base = scan.base
    said = f"The network as it is: top-1 {percent_text(base.top1)} %, loss {base.loss:.3f} nats."
    blocks: list[Block] = [Prose(said)]
    names = scan.tensors
    blocks += [_chart(scan, names[k : k + STYLES]) for k in range(0, len(names), STYLES)]
    blocks.append(drops(scan))
    if scan.left_out:
        blocks.append(Items(tuple(scan.left_out.items())))
    return Section("sensitivity", f"Sensitivity by {scan.by}", tuple(blocks))


def _chart(scan: Sensitivity, tensors: Sequence[str]) -> Figure:
    series: dict[str, list[Point]] = {}
    for tensor in tensors:
        own = (r for r in scan.rows if r.tensor == tensor)
        points: list[Point] = [(_x(scan, r.level), 100 * r.top1) for r in own]
        if scan.by != "bits":
            points.append((0.0, 100 * scan.base.top1))
        series[tensor.removesuffix(".weight")] = sorted(points)
    first, last = tensors[0].removesuffix(".weight"), tensors[-1].removesuffix(".weight")
    title = first if first == last else f"{first} to {last}"
    x = "bits" if scan.by == "bits" else f"% of {NOUNS[scan.by]} removed"
    spoken = f"Top-1 accuracy by {x}, one tensor at a time: {', '.join(series)}"
    return figure(title, lambda w: line_chart(spoken, series, width=w, x=x, y="top-1, %"))


def _x(scan: Sensitivity, level: float) -> float:
    return level if scan.by == "bits" else 100 * level


def _level(scan: Sensitivity, level: float) -> str:
    return f"{level:g} bits" if scan.by == "bits" else f"{100 * level:g} %"


def _how(scan: Sensitivity) -> str:
    if scan.by == "bits":
        return "One weight at a time is rounded; activations stay in float."
    return (
        f"One tensor at a time loses this share of its {NOUNS[scan.by]}, those of the least "
        f"{scan.criterion} first; nothing is trained afterwards."
    )
