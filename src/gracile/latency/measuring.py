"""Fill a table with what a network needs: staircases, units, and the network as a whole."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import time

from gracile.benchmark.runtimes.base import Loaded
from gracile.latency.difference import differences, in_batches, low, quickest
from gracile.latency.lowering import builder
from gracile.latency.predict import Predictor
from gracile.latency.staircase import detect
from gracile.latency.table import Network, Times
from gracile.latency.unit import Unit

# Around the ends of blocks of 8, and inside of them: two blocks of 16, four of 8.
SWEEP = (33, 36, 39, 40, 41, 44, 47, 48, 49, 52, 55, 56, 57, 60, 63, 64)
SWEEP_ROUNDS = 10
OTHER = 32  # the width that stands still while the other is swept
NETWORK_ROUNDS = 40
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
    )
    times.points.update(found)
    return Done(len(times.points) - before, stairs, refused)


def measure_network(
    times: Times, name: str, loaded: Loaded, units: Sequence[tuple[str, Unit]]
) -> float:
    """Time a whole network for the calibration, and keep it beside the sum of its units; ms."""
    ms = undisturbed_ms(loaded, batch=times.setting.batch)
    total = Predictor(times).network(units).sum_ms
    if total > 0:
        times.networks[name] = Network(total, ms, time())
    return ms


def undisturbed_ms(loaded: Loaded, *, batch: int = 1, rounds: int = NETWORK_ROUNDS) -> float:
    """A whole network by the same clock and quantile as units are measured."""
    return low(quickest([loaded.step(batch)], rounds=rounds, threads=loaded.threads)[0])


def _sweep_missing(times: Times, units: Iterable[tuple[str, Unit]], told: Told) -> int:
    found = 0
    build = builder(times.setting)
    for unit in _largest(u for _, u in units):
        for axis in range(len(unit.widths)):
            key = (unit.kind, unit.precision, axis)
            if key in times.stairs:
                continue
            told(f"staircase of {unit.kind} {unit.precision}, width {axis + 1}")
            swept = [unit.at(_with(len(unit.widths), axis, w)) for w in SWEEP]
            points = differences([build(u) for u in swept], rounds=SWEEP_ROUNDS)
            times.stairs[key] = detect({w: p.ms for w, p in zip(SWEEP, points, strict=True)})
            found += 1
    return found


def _largest(units: Iterable[Unit]) -> list[Unit]:
    """For each kind and precision that is swept, the unit with most channels."""
    best: dict[tuple[str, str], Unit] = {}
    for u in units:
        if u.widths and not u.kind.startswith(UNSWEPT):
            key = (u.kind, u.precision)
            if key not in best or sum(u.widths) > sum(best[key].widths):
                best[key] = u
    return list(best.values())


def _with(n: int, axis: int, width: int) -> tuple[int, ...]:
    return tuple(width if k == axis else OTHER for k in range(n))
