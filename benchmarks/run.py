"""Run the benchmarks: `python -m benchmarks.run --tier smoke|full [--only NAME] [--results DIR]`.

Cells whose Records are there, from these versions on this device, are skipped; `--again` measures
them anew. Only one benchmark runs on a machine at a time: others wait for the slot.
"""

import argparse
import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads ruin timings

from benchmarks import capture, fakequant, hints, runtimes, session_overhead, sparsity, widths
from benchmarks.cell import Cell
from gracile.core.record import RecordLog

BENCHMARKS = {
    m.NAME: m for m in (runtimes, widths, sparsity, hints, fakequant, capture, session_overhead)
}
RESULTS = Path(__file__).parents[1] / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing; returns how many cells were measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--tier", choices=("smoke", "full"), default="smoke")
    parser.add_argument("--only", choices=sorted(BENCHMARKS), help="one benchmark")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--again", action="store_true", help="measure what is there as well")
    args = parser.parse_args(argv)
    measured = 0
    with measuring_slot():
        for name in [args.only] if args.only else BENCHMARKS:
            log = RecordLog(args.results / f"{name}.jsonl")
            for cell in chosen(name, args.tier):
                measured += run_cell(cell, log, again=args.again)
    return measured


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
    log.add(*cell.run())
    say(f"{label}: measured in {perf_counter() - start:.1f} s")
    return True


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
