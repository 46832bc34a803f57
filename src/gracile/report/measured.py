"""Measured Records as tables for the terminal: each kind of measurement in a table of its own."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from gracile.core.record import Record, find
from gracile.units import human_bytes

LEFT = ("runtime", "model", "unit", "torch layers", "kernels")


def tables(records: Sequence[Record]) -> list[Table]:
    """Latency, then layers and throughput where they were measured, and sizes."""
    made = [_latency(records), _operators(records), *_units(records)]
    made += [_throughput(records), _sizes(records)]
    return [t for t in made if t.row_count]


def _latency(records: Sequence[Record]) -> Table:
    related = bool(find(records, "relative_latency"))
    more = ["x reference"] if related else []
    table = _table(
        "End to end, one stream",
        "runtime", "model", "median ms", "p95 ms", "IQR ms", "speed-up", "95 % CI", *more,
    )  # fmt: skip
    for r in find(records, "latency_ms"):
        ratio = _of(records, "speedup", r)
        relative = _of(records, "relative_latency", r)
        cells = [f"{relative.value:.3f}" if relative else ""] if related else []
        table.add_row(*_names(r), *_times(r), *_ratio(ratio, "1 (reference)"), *cells)
    return table


def _operators(records: Sequence[Record]) -> Table:
    table = _table(
        "Sum of operators, by the runtime's own counters: no end-to-end time",
        "runtime", "model", "median ms", "p95 ms", "IQR ms",
    )  # fmt: skip
    for r in find(records, "operators_ms"):
        table.add_row(*_names(r), *_times(r))
    return table


def _units(records: Sequence[Record]) -> list[Table]:
    """A table for each artifact in each runtime."""
    counted = find(records, "unit_ms")
    out = []
    for whose in dict.fromkeys(_names(r) for r in counted):
        mine = [r for r in counted if _names(r) == whose]
        ratios = {r.subject["unit"]: r for r in find(records, "unit_speedup") if _names(r) == whose}
        total = sum(r.value for r in mine)
        runtime, model = whose
        table = _table(
            f"Layers of {model} in {runtime}, by its own counters",
            "unit", "torch layers", "kernels", "ms", "share", "speed-up", "95 % CI",
        )  # fmt: skip
        for r in mine:
            table.add_row(
                r.subject["unit"], r.subject["layers"], r.subject["kernels"], f"{r.value:.4f}",
                f"{100 * r.value / total:.1f} %" if total else "",
                *_ratio(ratios.get(r.subject["unit"]), ""),
            )  # fmt: skip
        out.append(table)
    return out


def _throughput(records: Sequence[Record]) -> Table:
    table = _table(
        "Throughput, several streams at once",
        "runtime", "model", "streams", "batch", "images/s", "times", "95 % CI",
    )  # fmt: skip
    for r in find(records, "throughput"):
        ratio = _of(records, "throughput_ratio", r)
        table.add_row(
            *_names(r), r.subject.get("streams", ""), str(r.batch), f"{r.value:,.1f}",
            *_ratio(ratio, "1 (reference)"),
        )  # fmt: skip
    return table


def _sizes(records: Sequence[Record]) -> Table:
    running = bool(find(records, "peak_memory"))
    more = ["peak of memory", "of it by loading it"] if running else []
    table = _table("Size", "runtime", "model", "on disk", *more)
    for r in find(records, "artifact_bytes"):
        both = [_of(records, m, r) for m in ("peak_memory", "added_memory")] if running else []
        table.add_row(
            *_names(r), human_bytes(r.value), *(human_bytes(m.value) if m else "" for m in both)
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in LEFT else "right")
    return table


def _names(r: Record) -> tuple[str, str]:
    return str(r.runtime), r.subject.get("model", "")


def _times(r: Record) -> tuple[str, str, str]:
    p95 = "" if r.p95 is None else f"{r.p95:.4f}"
    return f"{r.value:.4f}", p95, "" if r.iqr is None else f"{r.iqr:.4f}"


def _ratio(r: Record | None, missing: str) -> tuple[str, str]:
    if r is None:
        return missing, ""
    return f"{r.value:.2f}x", f"{r.ci95[0]:.2f} to {r.ci95[1]:.2f}" if r.ci95 else ""


def _of(records: Iterable[Record], metric: str, like: Record) -> Record | None:
    found = find(records, metric, runtime=like.runtime, model=like.subject.get("model"))
    return found[0] if found else None
