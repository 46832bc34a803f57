"""Run the benchmarks: `python -m benchmarks.run --tier smoke|full [--only NAME] [--results DIR]`.

Cells whose Records are there, from these versions on this device, are skipped; `--again` measures
them anew. Only one benchmark runs on a machine at a time: others wait for the slot. A benchmark
whose packages are not installed is skipped and said so; with `--only` that is an error.
"""

import argparse
import fcntl
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads ruin timings

from benchmarks import (
    capture,
    csr,
    distillation,
    dynamic,
    early_exit,
    factorial,
    fakequant,
    hints,
    integer_proof,
    joint,
    latency_model,
    lowrank,
    one_bit,
    oneshot,
    pipeline,
    pruning,
    ptq,
    qat,
    qat_step,
    runtimes,
    session_overhead,
    sparsity,
    structure,
    structure_speed,
    techniques,
    widths,
)
from benchmarks.cell import Cell
from gracile.core.record import RecordLog
from gracile.core.state import write_atomic
from gracile.errors import UserError

BENCHMARKS: dict[str, Any] = {
    m.NAME: m
    for m in (
        runtimes,
        widths,
        latency_model,
        sparsity,
        csr,
        hints,
        integer_proof,
        dynamic,
        fakequant,
        capture,
        session_overhead,
        structure,
        structure_speed,
        pipeline,
        pruning,
        one_bit,
        oneshot,
        ptq,
        qat,
        qat_step,
        techniques,
        factorial,
        joint,
        lowrank,
        distillation,
        early_exit,
    )
}
RESULTS = Path(__file__).parents[1] / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing; returns how many cells were measured.

    Raises:
        UserError: the benchmark named by `--only` needs packages that are not installed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--tier", choices=("smoke", "full"), default="smoke")
    parser.add_argument("--only", choices=sorted(BENCHMARKS), help="one benchmark")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--again", action="store_true", help="measure what is there as well")
    args = parser.parse_args(argv)
    measured = 0
    with measuring_slot():
        for name in [args.only] if args.only else BENCHMARKS:
            if packages := missing(name):
                text = f"{name}: needs {', '.join(packages)}: make bench-peers"
                if args.only:
                    raise UserError(text)
                say(f"{text}; skipped")
                continue
            log = RecordLog(args.results / f"{name}.jsonl")
            for cell in chosen(name, args.tier):
                measured += run_cell(cell, log, again=args.again)
    return measured


def missing(name: str) -> list[str]:
    """Packages a benchmark needs and this environment has not."""
    needs = getattr(BENCHMARKS[name], "NEEDS", {})
    return [package for module, package in needs.items() if find_spec(module) is None]


def chosen(name: str, tier: str) -> Iterator[Cell]:
    """The cells of a benchmark in a tier; full contains smoke."""
    for cell in BENCHMARKS[name].cells():
        if tier == "full" or cell.tier == "smoke":
            yield cell


def run_cell(cell: Cell, log: RecordLog, *, again: bool = False) -> bool:
    """Measure a cell and store its Records, unless they are there."""
    label = f"{cell.benchmark}: {cell.name}"
    if cell.done(log) and not again:
        say(f"{label}: there")
        return False
    start = perf_counter()
    records = cell.run()
    if cell.notes:
        keep_notes(notes_file(log.path), cell)
    log.add(*records)
    say(f"{label}: measured in {perf_counter() - start:.1f} s")
    return True


def notes_file(results: Path) -> Path:
    """Where the notes stand that belong to a file of Records."""
    return results.with_suffix(".texts.json")


def notes(file: Path) -> dict[str, Any]:
    """Cell -> what it had to say beyond numbers."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def keep_notes(file: Path, cell: Cell) -> None:
    """Store the notes of a cell."""
    every = {**notes(file), cell.name: cell.notes}
    write_atomic(file, (json.dumps(every, indent=1, sort_keys=True) + "\n").encode())


@contextmanager
def measuring_slot(path: Path | None = None) -> Iterator[None]:
    """Hold this machine's one measuring slot; waits until it is free."""
    if path is None:
        path = Path(tempfile.gettempdir()) / f"gracile-measuring-{os.getuid()}.lock"
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting: another benchmark is measuring on this machine")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
