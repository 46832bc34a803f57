"""`preflight.html`: obstacles, bounds, and where the work of a network is."""

from pathlib import Path

from gracile.analyze.preflight import Preflight
from gracile.core.state import write_atomic
from gracile.report.figures import Bar, bar_chart, figure
from gracile.report.page import Block, Items, Prose, Section, render
from gracile.report.texts import Table, integer, number, percent_text

MOST_BARS = 40


def write_preflight(folder: str | Path, found: Preflight, *, name: str) -> Path:
    """Write `preflight.html` beside the other files.

    Args:
        folder: made if needed.
        found: what is shown.
        name: of the network.

    Returns:
        The path of the page.
    """
    parts = [_bounds(found), _findings(found), _layers(found)]
    over = f"before training, for {found.runtime}"
    page = render("analysis.html.j2", parts=parts, title="Preflight", name=name, over=over)
    path = Path(folder) / "preflight.html"
    write_atomic(path, page.encode())
    return path


def _bounds(found: Preflight) -> Section:
    rows = tuple((b.what, number(b.ratio, 2), b.kind, b.text) for b in found.bounds)
    columns = ("By", "At most (×)", "Kind", "How it was found")
    blocks: list[Block] = [Table("Largest speed-up", columns, rows, frozenset({0, 2, 3}))]
    blocks += [Prose(f"Not known: {what}, {why}.") for what, why in found.notes.items()]
    return Section("bounds", "How fast it could get", tuple(blocks))


def _findings(found: Preflight) -> Section:
    pairs = tuple((f.code, f.text + _places(f.where)) for f in found.findings)
    block = Items(pairs, warning=True) if pairs else Prose("Nothing stands in the way.")
    return Section("findings", "What stands in the way", (block,))


def _places(where: tuple[str, ...]) -> str:
    return f" Layers: {', '.join(where)}." if where else ""


def _layers(found: Preflight) -> Section:
    busiest = sorted(found.layers, key=lambda n: -n.macs)[:MOST_BARS]
    bars = [
        Bar(n.layer, 100 * n.share_of_macs, f"{100 * n.share_of_macs:.1f} %",
            style="after" if n.can_be_cut == "yes" else "before")
        for n in busiest
    ]  # fmt: skip
    spoken = "Share of the multiply-adds of each layer, in %"
    chart = figure(
        "Where the multiply-adds are",
        lambda w: bar_chart(spoken, {"": bars}, width=w, unit="%"),
        "Pale bars are layers whose outputs cannot be cut.",
    )
    columns = ("Layer", "Operator", "Width", "MACs (%)", "MACs a byte", "Can be cut", "Integer")
    rows = tuple(
        (n.layer, n.op, integer(n.width), percent_text(n.share_of_macs, 1),
         number(n.macs_per_byte, 1), n.can_be_cut, n.integer or "not known")
        for n in found.layers
    )  # fmt: skip
    table = Table("Layers", columns, rows, frozenset({0, 1, 5, 6}))
    return Section("layers", "Layers", (chart, table))
