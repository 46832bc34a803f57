"""What each layer of a runtime's program takes, by the runtime's own counters, side by side.

Counting costs time, and what lies between two layers is in no counter: the sum of operators is a
Record of its own and never compared with the end-to-end latency.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gracile.benchmark.artifact import Artifact
from gracile.benchmark.runtimes.base import Array, CountedLayer, Loaded
from gracile.benchmark.timing import (
    against,
    check_fair,
    of_rounds,
    ratio_record,
    record_facts,
)
from gracile.core.record import Record

MAX_RUNS = 200
SEVERAL = " + "  # between units that a runtime computes as one


@dataclass(frozen=True)
class Piece:
    """What is timed as one: all layers of a runtime that work for the same units.

    Attributes:
        name: the units' ids, joined; of a file without units the runtime's name of the layer.
        layers: torch modules whose parameters it uses.
        kernels: the runtime's names of what runs, each once.
        fused: operators of the file that went into it, where the runtime says so.
        columns: which of the counted layers.
    """

    name: str
    layers: tuple[str, ...]
    kernels: tuple[str, ...]
    fused: tuple[str, ...]
    columns: tuple[int, ...]

    def subject(self) -> dict[str, str]:
        """For a Record."""
        return {
            "unit": self.name,
            "layers": ", ".join(self.layers),
            "kernels": ", ".join(self.kernels),
            "fused": ", ".join(self.fused),
        }


@dataclass
class _Counted:
    pieces: tuple[Piece, ...]
    rounds: list[Array] = field(default_factory=list)  # (inferences, counted layers), ms
    load: list[float] = field(default_factory=list)

    def of(self, piece: Piece) -> list[Array]:
        """Times of a piece, one array a round."""
        return [r[:, list(piece.columns)].sum(1) for r in self.rounds]

    @property
    def sums(self) -> list[Array]:
        """Times of all layers together, one array a round."""
        return [r.sum(1) for r in self.rounds]


def count_operators(
    loaded: Mapping[str, Loaded],
    *,
    rounds: int = 7,
    batch: int | None = None,
    warmup: int = 5,
    min_round_ms: float = 50.0,
    seed: int = 0,
) -> list[Record]:
    """Time the layers of several artifacts side by side.

    Args:
        loaded: name -> loaded artifact; the first is the baseline. All must have the same precision
            hint and number of threads.
        rounds: interleaved rounds, at least 5.
        batch: batch size; None for each artifact's own.
        warmup: inferences of each before the first round, not counted.
        min_round_ms: a round repeats the inference until it takes at least this long.
        seed: of the bootstrap.

    Returns:
        For each name `operators_ms`, the sum over its layers, and `unit_ms` for each unit (value:
        median of the rounds' medians), whose subject says which `unit`, torch `layers`, `kernels`
        and `fused` operators of the file it is. For each but the first `unit_speedup` of the units
        that the first has, too, with the 95 % interval of the ratio.

    Raises:
        UserError: as `timing.compare`, or a runtime without counters.
    """
    check_fair(loaded, rounds, warmup, min_round_ms)
    sizes = {name: batch or item.batch for name, item in loaded.items()}
    counted = _measured(loaded, sizes, rounds, warmup, min_round_ms)
    base = next(iter(loaded))
    records: list[Record] = []
    for name, item in loaded.items():
        mine = counted[name]
        facts = record_facts(item, name, sizes[name], seed)
        facts["load_avg"] = float(np.mean(mine.load))
        records.append(of_rounds("operators_ms", mine.sums, facts, seed))
        for piece in mine.pieces:
            about = {**facts, "subject": {**facts["subject"], **piece.subject()}}
            records.append(of_rounds("unit_ms", mine.of(piece), about, seed))
        if name != base:
            records += _ratios(counted[base], mine, against(facts, base), seed)
    return records


def pieces_of(artifact: Artifact, layers: tuple[CountedLayer, ...]) -> tuple[Piece, ...]:
    """Group a runtime's layers by the units they compute, in the order they first run.

    A layer whose units cannot be told, such as one that only reorders memory, is a piece of its
    own under the runtime's name for it.
    """
    modules = {u.id: u.layers for u in artifact.units}
    groups: dict[str, list[int]] = {}
    for k, layer in enumerate(layers):
        groups.setdefault(SEVERAL.join(layer.units) or layer.name, []).append(k)
    out = []
    for name, columns in groups.items():
        of = [layers[k] for k in columns]
        units = (u for layer in of for u in layer.units)
        out.append(
            Piece(
                name=name,
                layers=_once(m for u in units for m in modules.get(u, ())),
                kernels=_once(layer.type for layer in of),
                fused=_once(f for layer in of for f in layer.fused),
                columns=tuple(columns),
            )
        )
    return tuple(out)


def _measured(
    loaded: Mapping[str, Loaded],
    sizes: Mapping[str, int],
    rounds: int,
    warmup: int,
    min_round_ms: float,
) -> dict[str, _Counted]:
    counters = {name: item.counters(sizes[name]) for name, item in loaded.items()}
    out, runs = {}, {}
    for name, item in loaded.items():
        counters[name].times(max(1, warmup))
        probe = float(np.median(item.time(3, sizes[name])))
        runs[name] = int(np.clip(np.ceil(min_round_ms / max(probe, 1e-4)), 3, MAX_RUNS))
        out[name] = _Counted(pieces_of(item.artifact, counters[name].layers))
    for _ in range(rounds):
        for name, one in out.items():
            one.rounds.append(counters[name].times(runs[name]))
            one.load.append(os.getloadavg()[0])
    return out


def _ratios(base: _Counted, mine: _Counted, facts: dict[str, Any], seed: int) -> list[Record]:
    there = {p.name: _medians(base.of(p)) for p in base.pieces}
    out = []
    for piece in mine.pieces:
        a, b = there.get(piece.name), _medians(mine.of(piece))
        if a is not None and a.all() and b.all():  # a counter in steps of 1 us may say 0
            subject = {**facts["subject"], "unit": piece.name, "layers": ", ".join(piece.layers)}
            out.append(ratio_record("unit_speedup", a, b, {**facts, "subject": subject}, seed))
    return out


def _medians(rounds: list[Array]) -> Array:
    return np.array([np.median(r) for r in rounds])


def _once(names: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
