"""From the sum of units to a network: a * sum + c * weights, fitted on a few whole networks.

A unit measured by itself finds its weights in the caches. In a network the weights of all others
come between, so that what a network holds has a price of its own. Where weights cannot be told
apart the second term is a constant: a * sum + b.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPREAD = 0.10  # relative error assumed while too few networks are known to tell
ENOUGH = 3  # networks from which on the spread is that of the fit
SPAN = 1.5  # sums, or weights, must differ by this factor for their terms to be told apart
MILLION = 1e6


@dataclass(frozen=True)
class Calibration:
    """The line, and how well it fits.

    Attributes:
        a, b, c: ms = a * sum + b + c * millions of weights.
        spread: relative standard deviation of the networks around it.
        networks: how many it was fitted on; 0 is the identity.
    """

    a: float = 1.0
    b: float = 0.0
    spread: float = SPREAD
    networks: int = 0
    c: float = 0.0

    def apply(self, total_ms: float, weights: int = 0) -> float:
        """The latency of a network whose units sum up to `total_ms` and hold so many weights."""
        return self.a * total_ms + self.b + self.c * weights / MILLION


def calibrate(
    pairs: Sequence[tuple[float, float]], weights: Sequence[int] | None = None
) -> Calibration:
    """Fit on (sum of units, measured), ms, by relative least squares; no term is negative.

    Weights are priced from four networks on, if these differ in them. With one network, or sums
    that hardly differ, only the factor is fitted.

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
    terms = [sums, np.ones_like(sums), held / MILLION]
    priced = len(known) > ENOUGH and _differ(held)
    told = [True, not priced and len(known) > 1 and _differ(sums), priced]
    rows = np.stack([t / measured for t, on in zip(terms, told, strict=True) if on], axis=1)
    found = np.zeros(3)
    found[np.array(told)] = np.linalg.lstsq(rows, np.ones(len(known)), rcond=None)[0]
    if found.min() < 0:  # a term that takes away is noise; the sum must count
        share = sums / measured
        found = np.array([share.sum() / (share**2).sum(), 0.0, 0.0])
    errors = sum(f * t for f, t in zip(found, terms, strict=True)) / measured - 1
    free = len(known) - int((found > 0).sum())
    spread = SPREAD
    if len(known) >= ENOUGH and free > 0:
        spread = float(np.sqrt((errors**2).sum() / free))
    a, b, c = (round(float(f), 9) for f in found)
    return Calibration(a, b, spread, len(known), c)


def _differ(values: np.ndarray) -> bool:
    return bool(values.max() > SPAN * max(values.min(), 1e-9))
