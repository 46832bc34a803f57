"""Speed-up and latency: measured values with their spread; predictions in a table of their own."""

import math

from gracile.core.record import Record
from gracile.report.figures import Bar, bar_chart, figure
from gracile.report.page import Absent, Block, Prose, Section
from gracile.report.provenance import record_table, runtimes
from gracile.report.run import Run
from gracile.report.texts import Table, integer, number
from gracile.report.verdict import interval, per_runtime, ratios, runtime_name, section


def speed(run: Run) -> Section | Absent:
    """Measured speed-ups with their intervals; predictions apart from them."""
    title = "Speed-up"
    speedups = per_runtime(run.result, "speedup")
    if not speedups:
        return Absent(title, "no runtime was asked for, so no time was measured.")
    old = section(run.result, "before", "latency")
    new = section(run.result, "after", "latency")
    rows = tuple(
        (runtime_name(n), number(old.get(n)), number(new.get(n)),
         number(s.get("ratio"), 2), interval(s.get("ci95"), unit=""))
        for n, s in speedups.items()
    )  # fmt: skip
    columns = (
        "Runtime", "Before (ms)", "After (ms)", "Measured (×)", "95 % interval (×)",
    )  # fmt: skip
    rounds = section(run.result, "measurement").get("rounds")
    counted = f"{rounds} interleaved rounds" if rounds else "interleaved rounds"
    note = f"Medians of {counted} with the same precision hint for both models."
    blocks: list[Block] = [Table(title, columns, rows, note=note)]
    predicted = [r for r in run.records if r.kind == "predicted"]
    if predicted:
        blocks.append(record_table("Predicted before the run", predicted))
    return Section("speed", title, (*blocks, *_no_gain(run)))


def latency(run: Run) -> Section | Absent:
    """Median and spread per runtime."""
    title = "Latency per runtime"
    names = list(
        dict.fromkeys(n for s in ("before", "after") for n in section(run.result, s, "latency"))
    )
    records = latency_records(run)
    groups: dict[str, list[Bar]] = {}
    for name in names:
        for side in ("before", "after"):
            ms = section(run.result, side, "latency").get(name)
            if ms is None:
                continue
            iqr = records[name, side].iqr if (name, side) in records else None
            spread = None if iqr is None else (ms - iqr / 2, ms + iqr / 2)
            bar = Bar(side, ms, f"{ms:.3f} ms", spread, side)
            groups.setdefault(runtime_name(name), []).append(bar)
    if not groups:
        return Absent(title, "no runtime was asked for, so no time was measured.")
    spoken = f"{title}, in ms, before and after"
    chart = figure(
        title,
        lambda w: bar_chart(spoken, groups, width=w, unit="ms"),
        "Bars are medians; the whisker is as long as the interquartile range.",
    )
    rows = tuple(
        (runtime_name(n), side, number(r.value), number(r.iqr), number(r.p95),
         integer(r.n), integer(r.threads), integer(r.batch), r.precision_hint or "–")
        for (n, side), r in records.items()
    )  # fmt: skip
    columns = (
        "Runtime", "Model", "Latency (ms)", "IQR (ms)", "p95 (ms)", "Timed runs", "Threads",
        "Batch",
        "Precision hint",
    )  # fmt: skip
    blocks: list[Block] = [chart]
    if rows:
        blocks.append(Table("Conditions", columns, rows, frozenset({0, 1, 8})))
    return Section("latency", title, tuple(blocks))


def latency_records(run: Run) -> dict[tuple[str, str], Record]:
    """(runtime, before|after) -> the Record of that side's latency.

    The result may carry it (`before.latency_records`); else it is the one with that very value.
    """
    out = {}
    for name in runtimes(run):
        for side in ("before", "after"):
            told = section(run.result, side, "latency_records").get(name)
            ms = section(run.result, side, "latency").get(name)
            found = (r for r in run.records if _is_latency(r, name, ms))
            record = Record.from_dict(told) if told else next(found, None)
            if record is not None:
                out[name, side] = record
    return out


def conditions(runtime: str, record: Record) -> str:
    """Threads, batch and hint in one short sentence."""
    facts = (
        (record.threads, "{} threads" if record.threads != 1 else "{} thread"),
        (record.batch, "batch {}"),
        (record.precision_hint, "precision hint {}"),
    )
    said = ", ".join(text.format(value) for value, text in facts if value is not None)
    return f"{runtime_name(runtime)}: {said}." if said else ""


def _no_gain(run: Run) -> tuple[Prose, ...]:
    """Say so where fewer multiply-adds brought no speed."""
    old, new = section(run.result, "before").get("macs"), section(run.result, "after").get("macs")
    if not old or not new or old / new < 1.2:
        return ()
    slow = [runtime_name(n) for n, ratio in ratios(run.result).items() if ratio < 1.05]
    if not slow:
        return ()
    return (
        Prose(
            f"Multiply-adds fell {old / new:.2f}× and yet {' and '.join(slow)} is not faster: the "
            "time there is not spent on multiply-adds. See the warnings and the kernels below."
        ),
    )


def _is_latency(record: Record, runtime: str, ms: float | None) -> bool:
    return (
        ms is not None
        and record.kind == "measured"
        and record.unit == "ms"
        and record.runtime in (runtime, runtime.partition(":")[0])
        and any(math.isclose(v, ms, rel_tol=1e-6) for v in (record.value, record.median) if v)
    )
