"""From the sum of units to a network: one line a * sum + b, fitted on a few whole networks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPREAD = 0.10  # relative error assumed while too few networks are known to tell
ENOUGH = 3  # networks from which on the spread is that of the fit
SPAN = 1.5  # sums must differ by this factor for b to be told from a


@dataclass(frozen=True)
class Calibration:
    """The line, and how well it fits.

    Attributes:
        a, b: ms = a * sum + b.
        spread: relative standard deviation of the networks around it.
        networks: how many it was fitted on; 0 is the identity.
    """

    a: float = 1.0
    b: float = 0.0
    spread: float = SPREAD
    networks: int = 0

    def apply(self, total_ms: float) -> float:
        """The latency of a network whose units sum up to `total_ms`."""
        return self.a * total_ms + self.b


def calibrate(pairs: Sequence[tuple[float, float]]) -> Calibration:
    """Fit the line on (sum of units, measured), ms, by relative least squares with b >= 0.

    With one network, or sums that hardly differ, only the factor is fitted.

    >>> calibrate([(1.0, 2.1), (2.0, 4.1), (4.0, 8.1)]).b
    0.1
    """
    known = [(s, m) for s, m in pairs if s > 0 and m > 0]
    if not known:
        return Calibration()
    sums, measured = np.array(known).T
    a, b = _factor(sums, measured), 0.0
    if len(known) > 1 and sums.max() > SPAN * sums.min():
        rows = np.stack([sums / measured, 1 / measured], axis=1)
        slope, rest = np.linalg.lstsq(rows, np.ones(len(known)), rcond=None)[0]
        if rest > 0 and slope > 0:
            a, b = float(slope), float(rest)
    errors = (a * sums + b) / measured - 1
    free = len(known) - (2 if b else 1)
    spread = SPREAD
    if len(known) >= ENOUGH and free > 0:
        spread = float(np.sqrt((errors**2).sum() / free))
    return Calibration(round(a, 9), round(b, 9), spread, len(known))


def _factor(sums: np.ndarray, measured: np.ndarray) -> float:
    share = sums / measured
    return float(share.sum() / (share**2).sum())
