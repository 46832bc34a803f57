"""Charts as inline SVG text: lines, bars, stacked bars, layers, scatter; styled by the page's CSS.

Every chart is drawn for a given width in pixels, so that its text keeps its size; a page holds a
wide and a narrow drawing (`Figure`) and shows the one that fits. Colours come from CSS classes, so
that one drawing serves the light and the dark scheme, and print.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDE, NARROW = 720, 340
MOST_POINTS = 400
STYLES = 6  # line styles of the style sheet, l0 .. l5
CHAR = 6.4  # width of a 12 px character, for laying out legends

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Figure:
    """A chart with its caption, drawn once for desks and once for phones."""

    title: str
    wide: Markup
    narrow: Markup
    note: str = ""
    kind: str = "figure"


@dataclass(frozen=True)
class Bar:
    """One horizontal bar; `spread` is the interval its whisker covers, `style` a CSS class."""

    label: str
    value: float
    text: str
    spread: tuple[float, float] | None = None
    style: str = "after"


@dataclass(frozen=True)
class LayerBars:
    """One layer in `layer_chart`: width before and after, bits, share of zeros."""

    name: str
    before: int | None
    after: int | None
    bits: int | None
    sparsity: float | None


@dataclass(frozen=True)
class Dot:
    """A point of `scatter`, with its standard deviations where there are several seeds."""

    label: str
    x: float
    y: float
    x_sd: float | None = None
    y_sd: float | None = None


def figure(title: str, draw: Callable[[int], Markup], note: str = "") -> Figure:
    """Draw a chart at both widths."""
    return Figure(title, draw(WIDE), draw(NARROW), note)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (steps of 1, 2 or 5) that lie in [low, high], at most `most` + 1 of them.

    >>> ticks(0, 9.3)
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Fewer points with the same outline: the lowest and the highest of each stretch survive."""
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(2 * len(points) / most)
    out: list[Point] = []
    for start in range(0, len(points), stretch):
        part = range(start, min(start + stretch, len(points)))
        finite = [i for i in part if _finite(points[i][1])]
        gaps = [i for i in part if not _finite(points[i][1])][:1]
        ends = [min(finite, key=lambda i: points[i][1] or 0.0)] if finite else []
        ends += [max(finite, key=lambda i: points[i][1] or 0.0)] if finite else []
        out += [points[i] for i in sorted({*gaps, *ends})]
    return out


def line_chart(
    title: str, series: Mapping[str, Sequence[Point]], *, width: int, x: str, y: str
) -> Markup:
    """Values over time; a value that is not finite breaks its line.

    Args:
        title: read aloud by screen readers.
        series: name -> (x, y) points in order of x. The legend shows each one's last value.
        width: pixels.
        x: what the horizontal axis counts.
        y: unit of the vertical axis.
    """
    lines = {name: thin(points) for name, points in series.items()}
    known = [(a, b) for points in lines.values() for a, b in points if b is not None and _finite(b)]
    left, right, bottom = 52, 14, 34
    legend, top = _legend({n: _last(p) for n, p in lines.items()}, width)
    top += 36 if y else 18
    height = top + (190 if width >= WIDE else 160) + bottom
    if not known:
        text = _text(width / 2, top + 60, "no finite value", "muted", anchor="middle")
        return _svg(title, width, height, legend, text)
    to_x = _scale(*_padded([a for a, _ in known], 0), left, width - right)
    low, high = _padded([b for _, b in known], 0.06)
    to_y = _scale(low, high, height - bottom, top)
    body = [legend, *_y_axis(low, high, to_y, left, width - right, y, top)]
    body += _x_axis([a for a, _ in known], to_x, height - bottom, x, width - right, left=left)
    for number, points in enumerate(lines.values()):
        style = f"line l{number % STYLES}"
        for run in _runs(points):
            if len(run) == 1:
                (a, b), *_ = run
                body.append(
                    _tag("circle", cx=to_x(a), cy=to_y(b), r=3, class_=f"dot l{number % STYLES}")
                )
            else:
                path = " ".join(f"{to_x(a):.1f},{to_y(b):.1f}" for a, b in run)
                body.append(_tag("polyline", points=path, class_=style))
    return _svg(title, width, height, *body)


def bar_chart(title: str, groups: Mapping[str, Sequence[Bar]], *, width: int, unit: str) -> Markup:
    """Horizontal bars from zero, in named groups.

    Args:
        title: read aloud by screen readers.
        groups: heading ("" for none) -> bars.
        width: pixels.
        unit: of the axis below.
    """
    bars = [bar for group in groups.values() for bar in group]
    high = max((max(b.value, *(b.spread or (0,))) for b in bars), default=0) or 1.0
    inline = width >= WIDE
    left = min(190, 16 + CHAR * max((len(b.label) for b in bars), default=0)) if inline else 2
    values = 12 + CHAR * max((len(b.text) for b in bars), default=0)
    to_x = _scale(0, high, left, width - values)
    y, body = 4.0, []
    for heading, group in groups.items():
        if heading:
            y += 22
            body.append(_text(0 if inline else 2, y - 8, heading, "strong"))
        for bar in group:
            y += 0 if inline else 15
            at = (left - 8, y + 13, "end") if inline else (left, y - 3, "start")
            body.append(_text(at[0], at[1], bar.label, "label", anchor=at[2]))
            body += _bar(bar, to_x, y, left)
            y += 24
        y += 6
    body += _x_axis([0, high], to_x, y, "", width - values, (0.0, high))
    body.append(_text(width - values + 8, y + 17, unit, "muted"))
    return _svg(title, width, round(y + 22), *body)


def stacked_bar(title: str, parts: Iterable[tuple[str, float]]) -> Markup:
    """One bar of shares that add up to 1; it stretches to the width of its container.

    Args:
        title: read aloud by screen readers.
        parts: (CSS class, share) from left to right.
    """
    x, body = 0.0, []
    for style, share in parts:
        body.append(_tag("rect", x=1000 * x, y=0, width=1000 * share, height=20, class_=style))
        x += share
    attributes = {"viewBox": "0 0 1000 20", "preserveAspectRatio": "none"}
    return _tag(
        "svg", _tag("title", title), *body, class_="stack", role="img", aria_label=title,
        height=18, **attributes,
    )  # fmt: skip


def layer_chart(title: str, layers: Sequence[LayerBars], *, width: int) -> Markup:
    """Channels, bits and sparsity of every layer, in model order, as three columns of bars."""
    inline = width >= WIDE
    name_width = 178 if inline else 0
    space = width - name_width
    text = (62, 34, 40)  # room for the number behind each bar
    row, top = (17, 24) if inline else (35, 28)
    channels = max((max(n.before or 0, n.after or 0) for n in layers), default=0) or 1
    bits = max((n.bits or 0 for n in layers), default=0) or 1
    highs = (channels, bits, 1.0)
    starts = [name_width + space * share for share in (0, 0.42, 0.7)]
    ends = [x - t - 10 for x, t in zip((*starts[1:], width), text, strict=True)]
    body = [
        _text(x, 12, head, "strong")
        for x, head in zip(starts, ("channels", "bits", "zeros"), strict=True)
    ]
    for number, n in enumerate(layers):
        y = top + row * number
        body.append(_text(0, y + 10, _shortened(n.name, 27 if inline else 50), "mono"))
        y += 0 if inline else 14
        share = None if n.sparsity is None else f"{100 * n.sparsity:.0f} %"
        cells: tuple[tuple[dict[str, float | None], str], ...] = (
            ({"before": n.before, "after": n.after}, _change(n.before, n.after)),
            ({"before" if (n.bits or 0) >= 32 else "after": n.bits}, _or_dash(n.bits)),
            ({"after": n.sparsity}, _or_dash(share)),
        )
        for start, end, high, (bars, said) in zip(starts, ends, highs, cells, strict=True):
            to_x = _scale(0, high, start, end)
            body += [_between(style, to_x, v, y) for style, v in bars.items() if v is not None]
            body.append(_text(end + 5, y + 9, said, "value"))
    return _svg(title, width, top + row * len(layers) + 4, *body)


def scatter(
    title: str, dots: Sequence[Dot], *, width: int, x: str, y: str, cloud: Sequence[Point] = ()
) -> Markup:
    """Numbered points with crosses of one standard deviation; `cloud` are the single runs."""
    known = [(a, b) for a, b in cloud if b is not None]
    xs = [v for d in dots for v in (d.x - (d.x_sd or 0), d.x + (d.x_sd or 0))]
    ys = [v for d in dots for v in (d.y - (d.y_sd or 0), d.y + (d.y_sd or 0))]
    left, right, top, bottom = 52, 26, 28, 36
    height = 340 if width >= WIDE else 300
    x_low, x_high = _padded([*xs, *(a for a, _ in known)], 0.1)
    y_low, y_high = _padded([*ys, *(b for _, b in known)], 0.1)
    to_x = _scale(x_low, x_high, left, width - right)
    to_y = _scale(y_low, y_high, height - bottom, top)
    body = _y_axis(y_low, y_high, to_y, left, width - right, y, top)
    body += _x_axis([x_low, x_high], to_x, height - bottom, x, width - right, (x_low, x_high))
    body += [_tag("circle", cx=to_x(a), cy=to_y(b), r=2.5, class_="cloud") for a, b in known]
    for dot in dots:
        cx, cy = to_x(dot.x), to_y(dot.y)
        if dot.x_sd:
            body.append(_line(to_x(dot.x - dot.x_sd), cy, to_x(dot.x + dot.x_sd), cy, "whisker"))
        if dot.y_sd:
            body.append(_line(cx, to_y(dot.y - dot.y_sd), cx, to_y(dot.y + dot.y_sd), "whisker"))
        body.append(_tag("circle", cx=cx, cy=cy, r=5, class_="mark"))
        body.append(_text(cx + 9, cy - 7, dot.label, "strong"))
    return _svg(title, width, height, *body)


def swatch(style: str) -> Markup:
    """A small square in the colour of a stacked bar's part, for a legend beside it."""
    rect = _tag("rect", x=0.5, y=0.5, width=10, height=10, class_=style)
    return _tag("svg", rect, class_="swatch", width=11, height=11, aria_hidden="true")


def _svg(title: str, width: float, height: float, *body: Markup) -> Markup:
    return _tag(
        "svg", _tag("title", title), *body, viewBox=f"0 0 {width:g} {height:g}", width=width,
        height=height, role="img", aria_label=title,
    )  # fmt: skip


def _tag(name: str, *children: object, **attributes: object) -> Markup:
    """One element; text and attribute values are escaped, `aria_label` becomes `aria-label`."""
    out = f"<{name}"
    for key, value in attributes.items():
        shown = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
        key = key.rstrip("_").replace("_", "-")
        out += f' {key}="{escape(shown)}"'
    return Markup(out + ">" + "".join(escape(c) for c in children) + f"</{name}>")


def _text(x: float, y: float, text: object, style: str, anchor: str = "start") -> Markup:
    return _tag("text", text, x=float(x), y=float(y), class_=style, text_anchor=anchor)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return _tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=style)


def _bar(bar: Bar, to_x: Callable[[float], float], y: float, left: float) -> list[Markup]:
    end = to_x(bar.value)
    out = [
        _tag("rect", x=left, y=y, width=max(end - left, 1.0), height=17, class_=bar.style),
    ]
    reach = end
    if bar.spread:
        low, high = to_x(max(bar.spread[0], 0)), to_x(bar.spread[1])
        reach = max(reach, high)
        out.append(_line(low, y + 8.5, high, y + 8.5, "whisker"))
        out += [_line(x, y + 4.5, x, y + 12.5, "whisker") for x in (low, high)]
    return [*out, _text(reach + 6, y + 13, bar.text, "value")]


def _between(style: str, to_x: Callable[[float], float], value: float, y: float) -> Markup:
    start = to_x(0)
    return _tag(
        "rect", x=start, y=float(y), width=max(to_x(value) - start, 0.0), height=10, class_=style
    )


def _y_axis(
    low: float, high: float, to_y: Callable[[float], float], left: float, right: float, unit: str,
    top: float,
) -> list[Markup]:  # fmt: skip
    out = [_text(0, top - 14, unit, "muted")] if unit else []
    for value in ticks(low, high):
        out.append(_line(left, to_y(value), right, to_y(value), "grid"))
        out.append(_text(left - 7, to_y(value) + 4, f"{value:g}", "tick", anchor="end"))
    return out


def _x_axis(
    values: Sequence[float], to_x: Callable[[float], float], y: float, label: str, right: float,
    whole_range: tuple[float, float] | None = None, *, left: float | None = None,
) -> list[Markup]:  # fmt: skip
    low, high = whole_range or (min(values), max(values))
    out = [_line(to_x(low) if left is None else left, y, right, y, "axis")]
    for value in ticks(low, high, 6 if right > NARROW else 4):
        out.append(_line(to_x(value), y, to_x(value), y + 4, "axis"))
        out.append(_text(to_x(value), y + 17, f"{value:g}", "tick", anchor="middle"))
    return [*out, _text(right, y + 31, label, "muted", anchor="end")]


def _legend(entries: Mapping[str, str], width: float) -> tuple[Markup, float]:
    """Line samples with names, wrapped to the width; returns the drawing and its height."""
    x, y, out = 0.0, 11.0, Markup("")
    for number, (name, last) in enumerate(entries.items()):
        name = _shortened(name, 30)
        needed = 30 + CHAR * (len(name) + len(last) + 2)
        if x and x + needed > width:
            x, y = 0.0, y + 18
        out += _line(x, y - 4, x + 20, y - 4, f"line l{number % STYLES}")
        label = Markup("{} <tspan class='muted'>{}</tspan>").format(name, last)
        out += _text(x + 26, y, label, "label")
        x += needed + 8
    return out, y


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        half = abs(low) * 0.1 or 0.5
        return low - half, high + half
    return low - share * (high - low), high + share * (high - low)


def _runs(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """Split a line where a value is missing."""
    runs: list[list[tuple[float, float]]] = [[]]
    for a, b in points:
        if b is not None and _finite(b):
            runs[-1].append((a, b))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _last(points: Sequence[Point]) -> str:
    return next((f"{b:.4g}" for _, b in reversed(points) if b is not None and _finite(b)), "–")


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else "…" + name[-(most - 1) :]


def _change(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return _or_dash(after)
    return f"{before}" if before == after else f"{before} → {after}"


def _or_dash(value: object) -> str:
    return "–" if value is None else str(value)
