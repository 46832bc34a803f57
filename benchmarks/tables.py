"""Write docs/benchmarks.md from results/*.jsonl: every number in it is a Record.

python -m benchmarks.tables [--results DIR] [--out FILE]
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.run import BENCHMARKS, RESULTS, notes, notes_file
from gracile.core.record import Record, RecordLog
from gracile.core.state import write_atomic
from gracile.units import human_bytes, human_count

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
INTRO = """# Benchmarks

Measured by `python -m benchmarks.run` and written by `python -m benchmarks.tables` from the Records
in `results/`; no number here was typed. What stands in one table was measured together, in
interleaved rounds, and only those numbers should be compared with each other: absolute times move
with the machine and with whatever else runs on it, which is why the load average is given.
A value in brackets is the 95 % bootstrap interval over rounds. Weights are random, so nothing here
speaks about accuracy, unless a section names its data and weights.
"""
EMPTY = "\nThere are no results here yet: run `make bench`.\n"


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the page and return its path."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE")
    args = parser.parse_args(argv)
    write_atomic(args.out, page(args.results).encode())
    return Path(args.out)


def page(results: Path) -> str:
    """The whole page."""
    parts = [INTRO]
    for name, module in BENCHMARKS.items():
        log = RecordLog(results / f"{name}.jsonl")
        if len(log):
            texts = notes(notes_file(log.path))
            parts.append(section(name, (module.__doc__ or "").strip(), list(log), texts))
    return "\n".join(parts) if len(parts) > 1 else INTRO + EMPTY


def section(
    name: str, what: str, records: Sequence[Record], texts: Mapping[str, Any] | None = None
) -> str:
    """One benchmark: a table for each cell and device; of several versions, the newest."""
    out = [f"## {name}", "", what, ""]
    newest: dict[tuple[str, str], list[Record]] = {}
    cells = list(BENCHMARKS[name].cells())
    anywhere = {r.subject["cell"] for c in cells if c.anywhere for r in c.records}
    for (cell, device, _), group in sorted(groups(records).items(), key=lambda g: _age(g[1])):
        if cell in anywhere:
            newest[cell, ""] = merged(newest.get((cell, ""), []), group)
        else:
            newest.setdefault((cell, device), group)
    places = [r.subject["cell"] for c in cells for r in c.records]
    for cell, device in sorted(newest, key=lambda g: (_place(places, g[0]), g)):
        group = newest[cell, device]
        out += [f"### {cell}", "", *table_of(name, group, texts or {}), "", caption(group), ""]
    return "\n".join(out)


def table_of(name: str, records: Sequence[Record], texts: Mapping[str, Any]) -> list[str]:
    """The table of a benchmark: its own where it has one."""
    own = getattr(BENCHMARKS[name], "table", None)
    lines: list[str] = table(records) if own is None else own(records, texts)
    return lines


def groups(records: Iterable[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """What was measured together: (cell, device, versions) -> its Records."""
    out: dict[tuple[str, str, str], list[Record]] = {}
    for r in records:
        key = (r.subject["cell"], str(r.device), str(sorted(r.versions.items())))
        out.setdefault(key, []).append(r)
    return out


def merged(newer: Sequence[Record], older: Iterable[Record]) -> list[Record]:
    """Records of several machines as one table; of the same value the newer ones."""

    def which(r: Record) -> tuple[str, int | None, str]:
        return r.subject["variant"], r.seed, r.metric

    there = set(map(which, newer))
    return [*newer, *(r for r in older if which(r) not in there)]


def _age(records: Iterable[Record]) -> float:
    return -max(r.time for r in records)


def table(records: Iterable[Record]) -> list[str]:
    """Variants down, metrics across; columns and rows without a value are left out."""
    cells: dict[str, dict[str, Record]] = {}
    for r in records:
        cells.setdefault(r.subject["variant"], {})[r.metric] = r
    metrics = [m for m in COLUMNS if any(m in row for row in cells.values())]
    unknown = {m for row in cells.values() for m in row} - set(COLUMNS)
    if unknown:
        raise ValueError(f"tables.COLUMNS has no title for {sorted(unknown)}.")
    titles = [COLUMNS[m] for m in metrics]
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---:|' * len(titles)}"]
    for variant in order(cells):
        row = cells[variant]
        lines.append(f"| {variant} | {' | '.join(shown(row.get(m)) for m in metrics)} |")
    return lines


COLUMNS: Mapping[str, str] = {
    "latency_ms": "latency (ms)",
    "step_ms": "training step (ms)",
    "seconds": "time (s)",
    "speedup": "speed-up",
    "ratio": "ratio",
    "macs": "multiply-adds",
    "artifact_bytes": "artifact",
    "convolutions": "convolutions",
    "convolutions_integer": "in integers",
    "drift": "drifted",
    "params_after": "parameters left",
}


def order(variants: Iterable[str]) -> list[str]:
    """As the benchmarks announce them."""
    known = [
        r.subject["variant"] for m in BENCHMARKS.values() for c in m.cells() for r in c.records
    ]
    return sorted(variants, key=lambda v: (_place(known, v), v))


def _place(known: Sequence[str], name: str) -> int:
    return known.index(name) if name in known else len(known)


def shown(r: Record | None) -> str:
    """A value with its unit and interval."""
    if r is None:
        return ""
    if r.unit == "count":
        return human_count(r.value)
    if r.unit == "bytes":
        return human_bytes(r.value)
    if r.unit == "flag":
        return "yes" if r.value else "no"
    text = f"{r.value:.3g}x" if r.unit == "ratio" else f"{r.value:.3g}"
    return text if r.ci95 is None else f"{text} [{r.ci95[0]:.3g}, {r.ci95[1]:.3g}]"


def caption(records: Sequence[Record]) -> str:
    """Device, conditions and versions of a table."""
    r = records[0]
    loads = [round(x.load_avg, 1) for x in records if x.load_avg is not None]
    hints = sorted(
        {x.precision_hint for x in records if x.precision_hint and "," not in x.precision_hint}
    )
    day = datetime.fromtimestamp(max(x.time for x in records), UTC).date()
    facts = [
        " and ".join(sorted({str(x.device) for x in records})),
        f"{r.threads} thread" + ("s" if r.threads != 1 else ""),
        f"batch {r.batch}" if r.batch else "",
        f"precision hint {' and '.join(hints)}" if hints else "",
        f"load average {' to '.join(map(str, sorted({min(loads), max(loads)})))}" if loads else "",
        ", ".join(f"{k} {v}" for k, v in sorted(r.versions.items())),
        f"measured {day}",
    ]
    return "*" + " · ".join(f for f in facts if f) + "*"


if __name__ == "__main__":
    main()
