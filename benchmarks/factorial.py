"""Pruning, low rank, bits and distillation on ResNet-20, each on and off, and in other orders.

ResNet-20 (`resnet20-cifar10jpeg`), data `cifar10-jpeg`, one epoch each, seed 0, scored on test rows
0 to 4,999. "Prune": a third of the MACs, whole channels by L1; "rank": Tucker-2 to two thirds of
the MACs of each layer; "bits": INT8 learned from the last third on; "distil": answers of the
network as it came. Both cuts are made before training, in the order that the row names; where bits
come first, cuts are made a third of the way, with quantizers in place. Times of one image, one
thread, beside the network that nothing was done to, in the same rounds. What a recipe is refused
for stands below.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import product
from math import nan
from typing import Any

from benchmarks.cell import Cell, Values, once
from benchmarks.compressing import by_row, columns, heads, outcome, reasons, templates
from benchmarks.pruning_methods import INT8, START, TEACHER, THIRD, cut
from gracile.core.record import Record
from gracile.errors import GracileError

NAME = "factorial"
SHARE = 1 / 3  # of the MACs that a cut takes


def _prune(when: Any = START) -> Mapping[str, Any]:
    return cut("l1", when, SHARE, scope="layer")


def _rank(when: Any = START) -> Mapping[str, Any]:
    rank = {"name": "macs", "ratio": 1 - SHARE}
    return {
        "rank": {
            "lowrank": "factorize",
            "weights": ["type:Conv2d", "!conv1.weight"],
            "scheme": "tucker2",
            "rank": rank,
            "when": when,
        }
    }


EARLY = {"int8": {"quantize": "qat", "when": {"start": "0ep"}}}
FACTORS = {"prune": _prune(), "rank": _rank(), "distil": TEACHER, "bits": INT8}
ORDERS: Mapping[str, Mapping[str, Any]] = {
    "rank, then prune": {**_rank(), **_prune()},
    "rank, then prune, distil, bits": {**_rank(), **_prune(), **TEACHER, **INT8},
    "bits, then prune": {**EARLY, **_prune(THIRD)},
    "bits, then rank": {**EARLY, **_rank(THIRD)},
}


def rows() -> dict[str, Mapping[str, Any]]:
    """Every subset of the factors, then the orders."""
    out: dict[str, Mapping[str, Any]] = {}
    for on in product((False, True), repeat=len(FACTORS)):
        names = [n for n, chosen in zip(FACTORS, on, strict=True) if chosen]
        methods: dict[str, Any] = {}
        for n in names:
            methods |= FACTORS[n]
        out[", ".join(names) or "nothing"] = methods
    return {**out, **ORDERS}


def cells() -> Iterator[Cell]:
    """A cell for each row."""
    for row, methods in rows().items():
        notes: dict[str, Any] = {}
        run = partial(measure, row, methods, notes)
        yield Cell(NAME, row, "full", templates(NAME, row), run, notes, anywhere=True)


def measure(row: str, methods: Mapping[str, Any], notes: dict[str, Any]) -> Values:
    """The outcome of a row; what is refused has no numbers, and its reason in the notes."""
    try:
        return outcome(row, methods, notes)
    except GracileError as e:
        notes["refused"] = str(e)
        return {(r.metric, row): once(nan) for r in templates(NAME, row)}


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: subsets first, then other orders of the same."""
    found = by_row(records)
    lines = heads("what")
    for row in (r for r in rows() if r in found):
        refused = found[row]["top1"].value != found[row]["top1"].value
        cells = ["refused"] if refused else columns(found[row])
        lines.append(f"| {' | '.join((row, *cells))} |")
    return [*lines, *reasons(texts)]
