"""Training curves and sparsity over time, one chart for each kind of quantity."""

from collections.abc import Callable, Mapping, Sequence

from gracile.report.figures import Figure, Point, figure, line_chart
from gracile.report.page import Absent, Block, Section
from gracile.report.run import Run

CHARTS: tuple[tuple[str, str, float, Callable[[str], bool]], ...] = (
    ("Loss", "nats", 1, lambda n: "loss" in n),
    (
        "Accuracy",
        "%",
        100,
        lambda n: any(k in n for k in ("top1", "top5", "accuracy", "agreement")),
    ),
    ("Learning rate", "", 1, lambda n: n == "lr" or n.startswith("lr/")),
)


def training(run: Run) -> Section | Absent:
    """Loss, accuracy, learning rate and whatever else was tracked over the epochs."""
    title = "Training curves"
    left = {n: p for n, p in run.curves.items() if not n.startswith("sparsity")}
    charts: list[Block] = []
    for name, unit, factor, belongs in CHARTS:
        series = {n: _times(left.pop(n), factor) for n in list(left) if belongs(n)}
        if series:
            charts.append(_lines(name, series, unit))
    others: dict[str, dict[str, list[Point]]] = {}
    for name, points in left.items():
        others.setdefault(name.partition("/")[0], {})[name] = points
    charts += [_lines(name, series, "") for name, series in others.items()]
    if not charts:
        return Absent(title, "nothing was trained, or the run kept no history.")
    return Section("training", title, tuple(charts))


def sparsity(run: Run) -> Section | Absent:
    """Share of zeros over the epochs."""
    title = "Sparsity over time"
    series = {n: _times(p, 100) for n, p in run.curves.items() if n.startswith("sparsity")}
    if not series:
        return Absent(title, "no method of this run changed sparsity over time.")
    return Section("sparsity", title, (_lines(title, series, "%"),))


def _lines(title: str, series: Mapping[str, list[Point]], unit: str) -> Figure:
    missing = sum(1 for points in series.values() for _, y in points if y is None)
    note = f"Not finite, so left out: {missing} of the values." if missing else ""
    spoken = f"{title} over the epochs: {', '.join(series)}"
    return figure(title, lambda w: line_chart(spoken, series, width=w, x="epoch", y=unit), note)


def _times(points: Sequence[Point], factor: float) -> list[Point]:
    return [(x, None if y is None else y * factor) for x, y in points]
