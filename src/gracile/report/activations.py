"""`activations.html`: ranges along the network, and a histogram of each activation."""

from pathlib import Path

from gracile.analyze.activations import PERCENTILES, Activations, Statistics
from gracile.core.state import write_atomic
from gracile.report.figures import Figure, Point, figure, line_chart
from gracile.report.page import Block, Items, Prose, Section, render
from gracile.report.texts import Table, percent_text, significant

MOST_CHARTS = 60
SHOWN = ("p1", "p50", "p99")


def write_activations(folder: str | Path, found: Activations, *, name: str, data: str) -> Path:
    """Write `activations.html` beside the statistics' other files.

    Args:
        folder: made if needed.
        found: what is shown.
        name: of the network.
        data: which images were run.

    Returns:
        The path of the page.
    """
    over = f"{found.images} images of {data}"
    parts = [_along(found), _histograms(found)]
    page = render("analysis.html.j2", parts=parts, title="Activations", name=name, over=over)
    path = Path(folder) / "activations.html"
    write_atomic(path, page.encode())
    return path


def table(found: Activations) -> Table:
    """The main figures, an activation a row."""
    columns = (
        "Tensor", "Operator", "Shape", "Min", "p1", "Mean", "p99", "Max", "Std", "Zeros (%)",
        "Dead channels",
    )  # fmt: skip
    rows = tuple(
        (r.tensor, r.op, "x".join(str(n) for n in r.shape), significant(r.min),
         significant(_percentile(r, 1.0)), significant(r.mean), significant(_percentile(r, 99.0)),
         significant(r.max), significant(r.std), percent_text(r.zeros, 1),
         "–" if r.channels is None else f"{r.channels.dead} of {len(r.channels.zeros)}")
        for r in found.rows
    )  # fmt: skip
    note = "Dead channels were zero for every image. p1 and p99: 1 % of the values lie beyond."
    return Table("Activations", columns, rows, frozenset({0, 1, 2}), note)


def _along(found: Activations) -> Section:
    lines: dict[str, list[Point]] = {
        "min": [(k, r.min) for k, r in enumerate(found.rows, 1)],
        **{
            f"p{q:g}": [(k, _percentile(r, q)) for k, r in enumerate(found.rows, 1)]
            for q in PERCENTILES
            if f"p{q:g}" in SHOWN
        },
        "max": [(k, r.max) for k, r in enumerate(found.rows, 1)],
    }
    spoken = "Smallest value, percentiles and largest value of each activation along the network"
    chart = figure(
        "Ranges along the network",
        lambda w: line_chart(spoken, lines, width=w, x="row of the table", y="value"),
    )
    blocks: list[Block] = [chart, table(found)]
    if found.left_out:
        blocks.append(Items(tuple(found.left_out.items()), warning=True))
    return Section("along", "Along the network", tuple(blocks))


def _histograms(found: Activations) -> Section:
    blocks: list[Block] = [_histogram(r) for r in found.rows[:MOST_CHARTS]]
    if len(found.rows) > MOST_CHARTS:
        rest = len(found.rows) - MOST_CHARTS
        said = f"{rest} more are in activations.json; name those to draw with --tensors."
        blocks.append(Prose(said))
    return Section("histograms", "Histograms", tuple(blocks))


def _histogram(r: Statistics) -> Figure:
    h = r.histogram
    points: list[Point] = [
        (h.start + (k + 0.5) * h.step, 100 * n / r.values) for k, n in enumerate(h.counts)
    ]
    note = f"Without the {percent_text(r.zeros, 1)} % that are exactly zero." if r.zeros else ""
    spoken = f"Share of the values of {r.tensor} in bins of {h.step:.3g}"
    return figure(
        r.tensor,
        lambda w: line_chart(spoken, {r.op: points}, width=w, x="value", y="% of the values"),
        note,
    )


def _percentile(r: Statistics, q: float) -> float:
    return r.percentiles[PERCENTILES.index(q)]
