"""Fill a table with what a network needs: staircases, units, and the network as a whole."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log
from time import time
from typing import Any

import numpy as np

from gracile.benchmark.runtimes.base import Loaded
from gracile.latency.difference import Pair, differences, in_batches, low, quickest
from gracile.latency.lowering import builder
from gracile.latency.predict import Predictor
from gracile.latency.staircase import detect
from gracile.latency.table import Network, Times
from gracile.latency.unit import Unit

# Around the ends of blocks of 8, and inside of them: two blocks of 16, four of 8.
SWEEP = (33, 36, 39, 40, 41, 44, 47, 48, 49, 52, 55, 56, 57, 60, 63, 64)
SWEEP_ROUNDS = 40
SWEPT_MS = 0.3  # about what a swept unit should take: well above the clock, within the caches
SWEPT_UNITS = 3  # of a kind; one alone is misread where something else runs meanwhile
PROBED, PROBE_ROUNDS = 12, 3  # units of a kind from which the one to be swept is chosen
OTHER = 32  # the width that stands still while the other is swept
NETWORK_ROUNDS = 100
NOTHING = 1e-4  # ms
MOST_WEIGHTS = 40e6  # of the units that are measured side by side
# Kinds whose program holds whole blocks already, and kinds in which a block cannot be seen.
UNSWEPT = ("nchwc.", "elementwise", "mean", "reorder", "Add", "Relu", "QLinearAdd", "Quantize",
           "Dequantize", "MaxPool", "AveragePool", "Global", "QLinearGlobal", "Clip", "linear",
           "Gemm", "FusedGemm", "QGemm", "MatMul")  # fmt: skip
Told = Callable[[str], None]


@dataclass(frozen=True)
class Done:
    """What measuring added.

    Attributes:
        units: new units.
        stairs: new staircases.
        refused: units that could not be built alone, and why.
        network_ms: the network as a whole; None if it was not measured.
    """

    units: int
    stairs: int
    refused: dict[Unit, str]
    network_ms: float | None = None


def measure(
    times: Times,
    units: Sequence[tuple[str, Unit]],
    *,
    exact: bool = False,
    told: Told = lambda text: None,
) -> Done:
    """Measure what is missing so that a network can be predicted, and nothing else.

    Args:
        times: of the setting; filled in place.
        units: of the network, see `lowering.units_of`.
        exact: measure the network's own widths rather than those that serve all networks.
        told: called with lines of progress.
    """
    stairs = _sweep_missing(times, units, told)
    wanted = Predictor(times).missing((u for _, u in units), exact=exact)
    before = len(times.points)
    refused: dict[Unit, str] = {}
    found = in_batches(
        wanted,
        builder(times.setting),
        refused=refused,
        told=lambda done, of: told(f"{done} of {of} units"),
        size=lambda unit: unit.weights / MOST_WEIGHTS,
    )
    times.points.update(found)
    return Done(len(times.points) - before, stairs, refused)


def measure_network(
    times: Times, name: str, loaded: Loaded, units: Sequence[tuple[str, Unit]]
) -> float:
    """Time a whole network for the calibration, and keep it beside the sum of its units; ms."""
    ms = undisturbed_ms(loaded, batch=times.setting.batch)
    remember(times, name, ms, units)
    return ms


def remember(times: Times, name: str, ms: float, units: Sequence[tuple[str, Unit]]) -> None:
    """Keep a network's time for the calibration, beside the sum of its units as it is now."""
    total = Predictor(times).network(units).sum_ms
    if total > 0:
        weights = sum(u.weights for _, u in units)
        times.networks[name] = Network(total, ms, time(), weights, len(units))


def undisturbed_ms(loaded: Loaded, *, batch: int = 1, rounds: int = NETWORK_ROUNDS) -> float:
    """A whole network by the same clock and quantile as units are measured."""
    return low(side_by_side([loaded], batch=batch, rounds=rounds)[0])


def side_by_side(
    loaded: Sequence[Loaded], *, batch: int = 1, rounds: int = NETWORK_ROUNDS
) -> list[np.ndarray[Any, Any]]:
    """The fastest inference of each round, ms, for each network; rounds go over all of them."""
    threads = max(one.threads for one in loaded)
    return quickest([one.step(batch) for one in loaded], rounds=rounds, threads=threads)


def _sweep_missing(times: Times, units: Iterable[tuple[str, Unit]], told: Told) -> int:
    found = 0
    build = builder(times.setting)
    kinds: dict[tuple[str, str], dict[tuple[str, str], Unit]] = {}
    for _, u in units:
        if u.widths and not u.kind.startswith(UNSWEPT):
            kinds.setdefault((u.kind, u.precision), {})[u.family] = u
    for (kind, precision), families in kinds.items():
        axes = range(len(next(iter(families.values())).widths))
        missing = [a for a in axes if (kind, precision, a) not in times.stairs]
        if not missing:
            continue
        told(f"staircase of {kind} {precision}")
        some = _fit_to_sweep(list(families.values()), build)
        for axis in missing:
            sweeps = [_swept(unit, axis, build) for unit in some]
            times.stairs[kind, precision, axis] = detect(*sweeps)
            found += 1
    return found


def _swept(unit: Unit, axis: int, build: Callable[[Unit], Pair]) -> dict[int, float]:
    swept = [unit.at(_with(len(unit.widths), axis, w)) for w in SWEEP]
    points = differences([build(u) for u in swept], rounds=SWEEP_ROUNDS)
    return {w: p.ms for w, p in zip(SWEEP, points, strict=True)}


def _fit_to_sweep(units: Sequence[Unit], build: Callable[[Unit], Pair]) -> list[Unit]:
    """The units whose times are nearest to what can be told apart."""
    some = units[:: -(-len(units) // PROBED)]
    pairs = [build(u.at((OTHER,) * len(u.widths))) for u in some]
    points = differences(pairs, rounds=PROBE_ROUNDS)
    off = [abs(log(max(p.ms, NOTHING) / SWEPT_MS)) for p in points]
    return [some[k] for k in np.argsort(off)[:SWEPT_UNITS]]


def _with(n: int, axis: int, width: int) -> tuple[int, ...]:
    return tuple(width if k == axis else OTHER for k in range(n))
