"""The picture of a network: operators from top to bottom, an arrow for each tensor, as SVG.

Layers by longest path, order within a layer by the mean place of what is read (Sugiyama et al.
1981, doi:10.1109/TSMC.1981.4308636, steps 1 and 2), so that no other program is needed.
"""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from gracile.graph.graph import Graph, Node

WIDE, HIGH, GAP_X, GAP_Y = 190, 40, 24, 34
SWEEPS = 4
LETTERS = 26
COLOURS = {
    "conv": "#a9cddd", "linear": "#a9cddd", "conv_transpose": "#a9cddd", "batch_norm": "#e3e6ea",
    "relu": "#f3e3c3", "add": "#d8e8cf", "cat": "#d8e8cf", "unknown": "#f0b89a",
}  # fmt: skip
PLAIN = "#ffffff"
Place = tuple[int, int]


def draw(graph: Graph, notes: Mapping[str, str] | None = None) -> str:
    """An SVG file of a captured graph.

    Args:
        graph: parameters and sizes are not drawn.
        notes: operator -> a second line in its box, default its kind and shape.
    """
    nodes = [n for n in graph if n.op not in ("param", "size")]
    layers = ordered(nodes)
    widest = max((len(layer) for layer in layers), default=1)
    width = widest * (WIDE + GAP_X) + GAP_X
    at: dict[str, Place] = {}
    for depth, layer in enumerate(layers):
        start = (width - len(layer) * (WIDE + GAP_X) + GAP_X) // 2
        for k, id in enumerate(layer):
            at[id] = start + k * (WIDE + GAP_X), GAP_Y + depth * (HIGH + GAP_Y)
    height = GAP_Y + len(layers) * (HIGH + GAP_Y)
    body = [_arrow(at[i], at[n.id]) for n in nodes for i in dict.fromkeys(n.inputs) if i in at]
    body += [_box(n, at[n.id], (notes or {}).get(n.id) or _kind(n)) for n in nodes]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#5a616b"/></marker></defs>'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>' + "".join(body) + "</svg>\n"
    )


def ordered(nodes: Sequence[Node]) -> list[list[str]]:
    """Ids in layers from the inputs on, each ordered so that few arrows cross.

    >>> ordered([Node("x", "input"), Node("a", "relu", ("x",)), Node("y", "add", ("x", "a"))])
    [['x'], ['a'], ['y']]
    """
    known = {n.id for n in nodes}
    reads = {n.id: [i for i in dict.fromkeys(n.inputs) if i in known] for n in nodes}
    depth: dict[str, int] = {}
    for n in nodes:
        depth[n.id] = max((depth[i] + 1 for i in reads[n.id]), default=0)
    layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for id, d in depth.items():
        layers[d].append(id)
    for _ in range(SWEEPS):
        for k in range(1, len(layers)):
            place = {id: i / len(layer) for layer in layers for i, id in enumerate(layer)}
            layers[k].sort(key=lambda id: _mean([place[i] for i in reads[id]]))
    return layers


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _kind(n: Node) -> str:
    shape = "x".join(str(s) for s in n.shape[1:]) if n.shape else ""
    return f"{n.op} {shape}".strip()


def _box(n: Node, place: Place, note: str) -> str:
    x, y = place
    name = n.id if len(n.id) <= LETTERS else "…" + n.id[-(LETTERS - 1) :]
    note = note if len(note) <= LETTERS else note[: LETTERS - 1] + "…"
    return Markup(
        '<g><title>{}</title><rect x="{}" y="{}" width="{}" height="{}" rx="4" fill="{}" '
        'stroke="#5a616b"/><text x="{}" y="{}" text-anchor="middle" fill="#1c1f24">{}</text>'
        '<text x="{}" y="{}" text-anchor="middle" fill="#5a616b" font-size="10">{}</text></g>'
    ).format(
        f"{n.id}: {_kind(n)}", x, y, WIDE, HIGH, COLOURS.get(n.op, PLAIN),
        x + WIDE // 2, y + 17, name, x + WIDE // 2, y + 31, note,
    )  # fmt: skip


def _arrow(start: Place, end: Place) -> str:
    """Straight to the next layer; around what is between where it skips some."""
    x1, y1, x2, y2 = start[0] + WIDE // 2, start[1] + HIGH, end[0] + WIDE // 2, end[1]
    bend = WIDE // 2 + GAP_X // 2 if y2 - y1 > GAP_Y and abs(x1 - x2) < WIDE else 0
    line = f"M{x1} {y1} C{x1 + 2 * bend} {y1 + GAP_Y},{x2 + 2 * bend} {y2 - GAP_Y},{x2} {y2}"
    return f'<path d="{line}" fill="none" stroke="#5a616b" marker-end="url(#tip)"/>'
