"""From the sum of units to a network: a * sum + c * weights, fitted on a few whole networks.

A unit measured by itself finds its weights in the caches. In a network the weights of all others
come between, so that what a network holds, beyond what the caches keep of it, has a price of its
own. Where weights cannot be told apart the second term is a constant: a * sum + b.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
        a, b, c: ms = a * sum + b + c * millions of weights that are not free.
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

    def apply(self, total_ms: float, weights: int = 0) -> float:
        """The latency of a network whose units sum up to `total_ms` and hold so many weights."""
        priced = max(0.0, weights / MILLION - self.free)
        return self.a * total_ms + self.b + self.c * priced


def calibrate(
    pairs: Sequence[tuple[float, float]], weights: Sequence[int] | None = None
) -> Calibration:
    """Fit on (sum of units, measured), ms, by relative least squares; no term is negative.

    Weights are priced from four networks on, if these differ in them, and from eight on those that
    are free are found: the number with which it fits best. With one network, or sums that hardly
    differ, only the factor is fitted.

    Args:
        pairs: one a network.
        weights: what each holds; None leaves them out.

    >>> calibrate([(1.0, 2.1), (2.0, 4.1), (4.0, 8.1)]).b
    0.1
    """
    counts = weights or [0] * len(pairs)
    known = [(s, m, w) for (s, m), w in zip(pairs, counts, strict=True) if s > 0 and m > 0]
    if not known:
        return Calibration()
    sums, measured, held = np.array(known).T
    priced = len(known) > ENOUGH and _differ(held)
    told = np.array([True, not priced and len(known) > 1 and _differ(sums), priced])
    frees = FREE if priced and len(known) >= TELLING else FREE[:1]
    fits = [_fit(sums, measured, held, told, free) for free in frees]
    errors, found, free = min(fits, key=lambda fit: float((fit[0] ** 2).sum()))
    left = len(known) - int((found > 0).sum()) - (free > 0)
    spread = SPREAD
    if len(known) >= ENOUGH and left > 0:
        spread = float(np.sqrt((errors**2).sum() / left))
    a, b, c = (round(float(f), 9) for f in found)
    return Calibration(a, b, spread, len(known), c, free if c > 0 else 0.0)


def _fit(
    sums: Numbers, measured: Numbers, held: Numbers, told: Numbers, free: float
) -> tuple[Numbers, Numbers, float]:
    """Relative errors, the three factors, and the free weights they are for."""
    terms = [sums, np.ones_like(sums), np.maximum(0.0, held / MILLION - free)]
    rows = np.stack([t / measured for t, on in zip(terms, told, strict=True) if on], axis=1)
    found = np.zeros(3)
    found[told] = np.linalg.lstsq(rows, np.ones(len(sums)), rcond=None)[0]
    if found.min() < 0:  # a term that takes away is noise; the sum must count
        share = sums / measured
        found = np.array([share.sum() / (share**2).sum(), 0.0, 0.0])
    errors = sum(f * t for f, t in zip(found, terms, strict=True)) / measured - 1
    return errors, found, free


def _differ(values: Numbers) -> bool:
    return bool(values.max() > SPAN * max(values.min(), 1e-9))
