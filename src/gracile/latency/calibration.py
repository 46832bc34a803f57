"""From the sum of units to a network: a * sum + c * weights + d * steps, fitted on a few of them.

A unit measured by itself finds its weights in the caches, and the step before it was its like. In a
network the weights of all others come between, so that what a network holds, beyond what the caches
keep of it, has a price of its own, as has each step of its program. Where weights cannot be told
apart the second term is a constant: a * sum + b.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, NamedTuple

import numpy as np

Numbers = np.ndarray[Any, Any]

SPREAD = 0.10  # relative error assumed while too few networks are known to tell
ENOUGH = 3  # networks from which on the spread is that of the fit
SPAN = 1.5  # sums, or weights, must differ by this factor for their terms to be told apart
MILLION = 1e6
# Millions of weights that may be free, and networks from which on that is told.
FREE, TELLING = (0.0, *(2 ** (k / 2) / 8 for k in range(15))), 8


@dataclass(frozen=True)
class Calibration:
    """The line, and how well it fits.

    Attributes:
        a, b, c, d: ms = a * sum + b + c * millions of weights that are not free + d * steps.
        spread: relative standard deviation of the networks around it.
        networks: how many it was fitted on; 0 is the identity.
        free: millions of weights that cost nothing, as the caches keep them.
    """

    a: float = 1.0
    b: float = 0.0
    spread: float = SPREAD
    networks: int = 0
    c: float = 0.0
    free: float = 0.0
    d: float = 0.0

    @property
    def text(self) -> str:
        """The line in words.

        >>> Calibration(a=1.05, c=0.2, free=1.0, d=0.003).text
        '1.050 x sum + 0.2000 ms x (million weights - 1.00) + 0.0030 ms x steps'
        """
        weights = f"(million weights - {self.free:.2f})" if self.free else "million weights"
        terms = [(self.b, "ms"), (self.c, f"ms x {weights}"), (self.d, "ms x steps")]
        told = [f"{factor:.4f} {what}" for factor, what in terms if factor]
        return " + ".join([f"{self.a:.3f} x sum", *told])

    def apply(self, total_ms: float, weights: int = 0, steps: int = 0) -> float:
        """The latency of a network of so many units, which sum up and hold weights."""
        priced = max(0.0, weights / MILLION - self.free)
        return self.a * total_ms + self.b + self.c * priced + self.d * steps


def calibrate(
    pairs: Sequence[tuple[float, float]],
    weights: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Calibration:
    """Fit on (sum of units, measured), ms, by relative least squares; no term is negative.

    Weights are priced from four networks on, if these differ in them. From eight on steps are, too,
    and the weights that are free are found; of all forms the one with the least spread is taken,
    each number counted that it took. With one network, or sums that hardly differ, only the factor
    is fitted.

    Args:
        pairs: one a network.
        weights, steps: what each holds, and units it has; None leaves them out.

    >>> calibrate([(1.0, 2.1), (2.0, 4.1), (4.0, 8.1)]).b
    0.1
    """
    held, units = weights or [0] * len(pairs), steps or [0] * len(pairs)
    every = zip(pairs, held, units, strict=True)
    known = np.array([(s, m, w / MILLION, n) for (s, m), w, n in every if s > 0 and m > 0])
    if not len(known):
        return Calibration()
    fits = [_fit(known, form) for form in _forms(known)]
    likely = [fit for fit in fits if fit.least >= 0] or fits[-1:]  # what takes away is noise
    best = min(likely, key=lambda fit: fit.spread) if len(known) >= TELLING else likely[0]
    told = len(known) >= ENOUGH and isfinite(best.spread)
    a, b, c, d = (round(float(f), 9) for f in best.factors)
    free = best.free if c > 0 else 0.0
    return Calibration(a, b, best.spread if told else SPREAD, len(known), c, free, d)


class _Fit(NamedTuple):
    spread: float  # infinite where there are as many factors as networks
    least: float  # of the factors that were fitted
    factors: Numbers
    free: float


Form = tuple[tuple[bool, bool, bool, bool], float]  # which of a, b, c, d; free weights
ALONE: Form = ((True, False, False, False), 0.0)


def _forms(known: Numbers) -> list[Form]:
    sums, _, held, steps = known.T
    n = len(known)
    weighed = n > ENOUGH and _differ(held)
    if not weighed or n < TELLING:
        constant = not weighed and n > 1 and _differ(sums)
        return [((True, constant, weighed, False), 0.0), ALONE]
    counted = _differ(steps)
    steps_alone = [((True, False, False, True), 0.0)] if counted else []
    weights = [((True, False, True, d), f) for d in sorted({False, counted}) for f in FREE]
    return [*weights, *steps_alone, ALONE]


def _fit(known: Numbers, form: Form) -> _Fit:
    (told, free), (sums, measured, held, steps) = form, known.T
    terms = np.stack([sums, np.ones_like(sums), np.maximum(0.0, held - free), steps])
    on = np.array(told)
    found = np.zeros(len(terms))
    found[on] = np.linalg.lstsq((terms[on] / measured).T, np.ones(len(known)), rcond=None)[0]
    errors = found @ terms / measured - 1
    left = len(known) - int(on.sum()) - (free > 0)
    spread = float(np.sqrt((errors**2).sum() / left)) if left > 0 else inf
    return _Fit(spread, float(found[on].min()), found, free)


def _differ(values: Numbers) -> bool:
    return bool(values.max() > SPAN * max(values.min(), 1e-9))
