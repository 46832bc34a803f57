"""ResNet-56 by joint recipes: how much faster it gets, and what that costs in accuracy.

ResNet-56 (`resnet56-cifar10jpeg`), data `cifar10-jpeg`, two epochs each, seed 0; thresholds and
ladders look at test rows 5,000 to 9,999, top-1 is of rows 0 to 4,999. Each row leaves so many of
the 27 blocks out, cuts channels until that share of all MACs is gone, learns from the network as
it came, gets INT8 for the last third of training, and climbs the recovery ladder. Referees: INT8
alone, and ResNet-20 (`resnet20-cifar10jpeg`) with INT8, trained for as long. Times of one image,
one thread, f32 for what is not INT8, beside ResNet-56 as it came, in the same rounds.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from benchmarks.cell import Cell
from benchmarks.compressing import Start, by_row, columns, heads, outcome, reasons, templates
from benchmarks.pruning import TRAIN
from benchmarks.pruning_methods import START, TEACHER
from gracile.core.record import Record

NAME = "joint"
LAST_THIRD = {"start": "1.33ep"}
INT8 = {"int8": {"quantize": "qat", "when": LAST_THIRD}}
LADDER = {"ladder": {"recover": "ladder", "max_drop": 1.0, "images": 300}}
RESNET56 = Start("resnet56_cifar_a", "resnet56-cifar10jpeg.safetensors", {**TRAIN, "epochs": 2})
SMALL = "ResNet-20, INT8"
RESNET20 = Start(train=RESNET56.train, beside=(RESNET56.network, RESNET56.weights))
# Blocks that go, share of the MACs that goes in all.
CURVE = ((0, 0.4), (6, 0.5), (9, 0.6), (12, 0.7), (15, 0.8), (18, 0.88))


def joint(blocks: int, share: float) -> Mapping[str, Any]:
    """A recipe: blocks, channels, a teacher, INT8, the ladder."""
    depth = {"depth": {"prune": "depth", "count": blocks, "when": START}} if blocks else {}
    cut = {
        "cut": {
            "prune": "structure", "ratio": share, "target": "macs", "criterion": "l1",
            "scope": "layer", "when": START,
        }
    }  # fmt: skip
    return {**depth, **cut, **TEACHER, **INT8, **LADDER}


def rows() -> dict[str, Mapping[str, Any]]:
    """Referees, then the curve."""
    curve = {f"{b} blocks, {100 * s:.0f} % of the MACs": joint(b, s) for b, s in CURVE}
    alone = {**TEACHER, **INT8}
    return {"trained on": {}, "INT8": alone, SMALL: alone, **curve}


def cells() -> Iterator[Cell]:
    """A cell for each row."""
    for row, methods in rows().items():
        notes: dict[str, Any] = {}
        run = partial(outcome, row, methods, notes, RESNET20 if row == SMALL else RESNET56)
        yield Cell(NAME, row, "full", templates(NAME, row, RESNET56), run, notes, anywhere=True)


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: the rows, then the rungs of each ladder."""
    found = by_row(records)
    lines = heads("what")
    lines += [f"| {' | '.join((r, *columns(found[r])))} |" for r in rows() if r in found]
    lines += reasons(texts)
    rungs = [
        f"| {row} | {rung['rung']} | {_points(rung['before'])} | {_points(rung['after'])} | "
        f"{'yes' if rung['kept'] else 'no'} | {rung['seconds']:.0f} | {rung['images']:,} |"
        for row in rows()
        for climb in texts.get(row, {}).get("ladder", [])
        for rung in climb["rungs"]
    ]
    if rungs:
        lines += ["", "| recipe | rung | before (%) | after (%) | kept | s | images |"]
        lines += ["|---|---|---:|---:|---|---:|---:|", *rungs]
    return lines


def _points(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"
