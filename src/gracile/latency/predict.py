"""A network's latency from a table: units looked up or interpolated, summed, calibrated.

Widths are put on their stair; what was measured there is taken, else what lies between the four
measured neighbours. A prediction says which was which, and how far off it may be.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import hypot, log
from typing import Any, Literal

from gracile.core.record import Record
from gracile.latency.calibration import Calibration, calibrate
from gracile.latency.isotonic import monotone
from gracile.latency.staircase import Stair
from gracile.latency.table import Times
from gracile.latency.unit import Unit, volume

How = Literal["measured", "interpolated", "scaled", "unknown"]
INTERPOLATION = 0.05  # relative standard deviation of what lies between measured widths
SCALING = 0.5  # of what is scaled from another width of its family
NOISE_FLOOR = 1e-4  # ms; no point is believed more than this
FEW = 4  # channels
Z95 = 1.96
Widths = tuple[int, ...]


@dataclass(frozen=True)
class Estimate:
    """A unit's time.

    Attributes:
        ms: 0 if nothing is known.
        sigma_ms: standard deviation.
        how: from the unit's own stair, from its neighbours, scaled from any width, or not at all.
    """

    ms: float
    sigma_ms: float
    how: How


@dataclass(frozen=True)
class Prediction:
    """A network's latency, predicted.

    Attributes:
        ms: the latency.
        interval: where 95 % of networks should lie.
        sum_ms: of the units, before calibration.
        calibration: what was applied to it.
        units: (name, unit, estimate) in execution order.
    """

    ms: float
    interval: tuple[float, float]
    sum_ms: float
    calibration: Calibration
    units: tuple[tuple[str, Unit, Estimate], ...] = field(repr=False)

    @property
    def counts(self) -> dict[str, int]:
        """How many units were measured, interpolated, scaled or unknown."""
        return dict(Counter(e.how for _, _, e in self.units))

    @property
    def shares(self) -> dict[str, float]:
        """The part of the sum that comes from each of these."""
        total = self.sum_ms or 1.0
        out: dict[str, float] = {}
        for _, _, e in self.units:
            out[e.how] = out.get(e.how, 0.0) + e.ms / total
        return out

    @property
    def warnings(self) -> list[str]:
        """What makes this prediction weak, if anything does."""
        out = []
        unknown = Counter(u.kind for _, u, e in self.units if e.how == "unknown")
        if unknown:
            kinds = ", ".join(f"{n} {kind}" for kind, n in unknown.items())
            n = sum(unknown.values())
            out.append(f"nothing is known of {n} unit(s), counted as 0: {kinds}")
        scaled = self.shares.get("scaled", 0.0)
        if scaled > 0.01:
            share = f"{100 * scaled:.0f} %"
            out.append(f"{share} of the time is scaled from other widths: measure them")
        if self.calibration.networks == 0:
            out.append("not calibrated: the table holds no whole network of this setting")
        return out

    def record(self, times: Times, **facts: Any) -> Record:
        """A Record of kind predicted; never to stand in one column with a measured one."""
        s = times.setting
        return Record(
            "latency_ms", self.ms, "ms", kind="predicted", ci95=self.interval, runtime=s.runtime,
            runtime_version=s.version, precision_hint=s.hint, threads=s.threads, batch=s.batch,
            device=f"{s.runtime}:{s.device}", **facts,
        )  # fmt: skip


class Predictor:
    """Predicts from the times of one setting.

    Args:
        times: see `Table.of`. What is added to them later is not seen.
    """

    def __init__(self, times: Times):
        self.times = times
        self._fitted = {f: _fitted(p, _stairs(times, f)) for f, p in times.families().items()}
        known = list(times.networks.values())
        pairs = [(n.sum_ms, n.ms) for n in known]
        counts = [n.weights for n in known], [n.steps for n in known]
        self.calibration = calibrate(pairs, *counts)

    def missing(self, units: Iterable[Unit], *, exact: bool = False) -> list[Unit]:
        """What to measure so that these units are measured or interpolated; each once.

        Args:
            units: of any networks.
            exact: the units' own stairs, rather than the few widths that serve all networks.
        """
        wanted = dict.fromkeys(
            w for u in units for w in ([self._canonical(u)] if exact else self._corners(u))
        )
        return [w for w in wanted if w not in self.times.points]

    def unit(self, unit: Unit) -> Estimate:
        """One unit's time."""
        known = self._fitted.get(unit.family, {})
        mine = self._canonical(unit).widths
        if mine in known:
            return Estimate(*known[mine], "measured")
        if not known:
            return Estimate(0.0, 0.0, "unknown")
        corners = [c.widths for c in self._corners(unit)]
        if all(c in known for c in corners):
            return _between(mine, {c: known[c] for c in corners})
        nearest = min(known, key=lambda w: _distance(w, mine))
        ms = known[nearest][0] * volume(unit) / volume(unit.at(nearest))
        return Estimate(ms, SCALING * ms, "scaled")

    def network(self, units: Sequence[tuple[str, Unit]]) -> Prediction:
        """A whole network, from its units as `lowering.units_of` gives them."""
        found = {u: self.unit(u) for _, u in units}
        rows = tuple((name, u, found[u]) for name, u in units)
        total = sum(e.ms for _, _, e in rows)
        times = Counter(u for _, u in units)  # the same unit twice is off by the same twice
        sigma = hypot(0.0, *(times[u] * e.sigma_ms for u, e in found.items()))
        ms = self.calibration.apply(total, sum(u.weights for _, u in units), len(units))
        off = Z95 * hypot(self.calibration.a * sigma, self.calibration.spread * ms)
        return Prediction(ms, (max(0.0, ms - off), ms + off), total, self.calibration, rows)

    def _canonical(self, unit: Unit) -> Unit:
        if unit in self.times.points:
            return unit
        pairs = zip(self._stairs(unit), unit.widths, strict=True)
        return unit.at(tuple(s.canonical(w) for s, w in pairs))

    def _corners(self, unit: Unit) -> list[Unit]:
        if unit in self.times.points:
            return [unit]
        pairs = zip(self._stairs(unit), unit.widths, strict=True)
        sides = [dict.fromkeys(s.around(w)) for s, w in pairs]
        return [unit.at(corner) for corner in product(*sides)]

    def _stairs(self, unit: Unit) -> list[Stair]:
        """Of each width; few channels (an image's 3) stand for themselves."""
        found = _stairs(self.times, unit.family)
        pairs = zip(found, unit.widths, strict=False)
        return [s if w >= s.period or (s.tail and w > FEW) else Stair() for s, w in pairs]


def precision_of(family: tuple[str, str]) -> str:
    """The arithmetic of a family."""
    return Unit(family[0], (), family[1]).precision


def _stairs(times: Times, family: tuple[str, str]) -> list[Stair]:
    kind, precision = family[0], precision_of(family)
    return [times.stairs.get((kind, precision, axis), Stair()) for axis in range(2)]


def _fitted(
    points: Mapping[Widths, Any], stairs: Sequence[Stair]
) -> dict[Widths, tuple[float, float]]:
    """Widths -> (ms, sigma) after the monotone fit, full and partly filled blocks apart."""
    classes: dict[tuple[bool, ...], list[Widths]] = {}
    for widths in points:
        full = tuple(s.full(w) for s, w in zip(stairs, widths, strict=False))
        classes.setdefault(full, []).append(widths)
    out: dict[Widths, tuple[float, float]] = {}
    for members in classes.values():
        sigma = {w: max(points[w].noise_ms, NOISE_FLOOR) for w in members}
        fit = monotone({w: points[w].ms for w in members}, {w: 1 / sigma[w] ** 2 for w in members})
        out |= {w: (fit[w], hypot(sigma[w], fit[w] - points[w].ms)) for w in members}
    return out


def _between(at: Widths, corners: Mapping[Widths, tuple[float, float]]) -> Estimate:
    """Linear along each width."""
    ms, variance = 0.0, 0.0
    low = [min(c[k] for c in corners) for k in range(len(at))]
    high = [max(c[k] for c in corners) for k in range(len(at))]
    for corner, (value, sigma) in corners.items():
        share = 1.0
        for x, a, b, c in zip(at, low, high, corner, strict=True):
            if a != b:
                share *= (x - a) / (b - a) if c == b else (b - x) / (b - a)
        ms += share * value
        variance += (share * sigma) ** 2
    return Estimate(ms, hypot(variance**0.5, INTERPOLATION * ms), "interpolated")


def _distance(a: Widths, b: Widths) -> float:
    return sum(abs(log(x / y)) for x, y in zip(a, b, strict=True))
