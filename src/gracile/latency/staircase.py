"""The staircase of widths: kernels work on blocks of channels, and time follows the blocks.

A block may also cost more when it is not full (masked stores, another kernel): then widths that
fill their last block and widths that do not are two staircases.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import numpy as np

PERIODS = (1, 2, 4, 8, 16, 32, 64)
SIMPLER = 1.25  # the simplest whose error is within this factor of the best is taken
PRICED = 1.1  # by so much a price for partial blocks has to fit better
LEAST_ERROR = 1e-3  # of the median time; closer is exact
SHORTEST = 1e-6  # ms
KEPT = 0.9  # of the widths; those that fit worst were disturbed
LEAST = 8  # widths without which no curve can be told from another
FITS = 3
STEPS = (1, 2, 3, 4, 6, 8, 12, 16)  # of blocks that are measured; then each doubled


@dataclass(frozen=True)
class Stair:
    """The period of a staircase, in channels.

    Attributes:
        period: channels of a block; 1 where every channel counts.
        tail: whether a width that leaves its last block partly empty has a time of its own.
    """

    period: int = 1
    tail: bool = False

    def full(self, width: int) -> bool:
        """Whether a width is measured as one that fills its blocks."""
        return not self.tail or width % self.period == 0

    def canonical(self, width: int) -> int:
        """The width that stands for all that cost the same.

        >>> [Stair(8).canonical(w) for w in (1, 8, 9)]
        [8, 8, 16]

        Of widths that leave a block partly empty, one just above half of it, as what is more than
        half of a vector often costs a little more than what is less.

        >>> [Stair(8, tail=True).canonical(w) for w in (1, 7, 8, 9)]
        [5, 5, 8, 13]
        """
        return self._of(-(-width // self.period), self.full(width))

    def around(self, width: int) -> tuple[int, int]:
        """The nearest widths that are measured, at most and at least this one.

        >>> Stair(8).around(40), Stair(8).around(33), Stair(8).around(32)
        ((32, 48), (32, 48), (32, 32))
        """
        full, blocks = self.full(width), -(-width // self.period)
        ladder = _ladder(blocks)
        k = bisect_left(ladder, blocks)
        low = ladder[k] if ladder[k] == blocks else ladder[k - 1]
        return self._of(low, full), self._of(ladder[k], full)

    def _of(self, blocks: int, full: bool) -> int:
        missing = 0 if full else (self.period - 1) // 2
        return blocks * self.period - missing


def _ladder(blocks: int) -> list[int]:
    steps = list(STEPS)
    while steps[-1] < blocks:
        steps += [2 * s for s in steps[-2:]]
    return steps


def detect(*sweeps: Mapping[int, float]) -> Stair:
    """The staircase in the times of a range of widths, of one unit or of several of a kind.

    Every candidate is a curve (a parabola) over what it says the time follows: the width, the
    blocks, or the blocks with a price for one that is not full. They are compared by their mean
    error, without the worst tenth and for the numbers that were free, as a share of the unit's
    median time, the mean over units. Once blocks are found, a price for those that are not full is
    taken if it fits somewhat better: missing it makes every such width too cheap, and taking it in
    vain only costs measurements.

    Args:
        sweeps: width -> ms, for each unit; widths of at least two blocks of the periods to find,
            several in each.

    >>> detect({w: float(-(-w // 8)) for w in range(1, 65)})
    Stair(period=8, tail=False)
    """
    enough = [sweep for sweep in sweeps if len(sweep) >= LEAST]
    if not enough:
        return Stair()
    span = min(max(sweep) - min(sweep) + 1 for sweep in enough)
    errors = {
        stair: sum(_error(stair, sweep) for sweep in enough) / len(enough)
        for stair in _candidates()
        if 2 * stair.period <= span
    }
    allowed = max(min(errors.values()) * SIMPLER, LEAST_ERROR)
    found = next(s for s, e in errors.items() if e <= allowed)
    priced = Stair(found.period, tail=True)
    return priced if errors.get(priced, inf) * PRICED < errors[found] > LEAST_ERROR else found


def _candidates() -> list[Stair]:
    """The simplest first; of staircases the one with the largest blocks, which asks for least."""
    stepped = [Stair(p) for p in reversed(PERIODS) if p > 1]
    return [Stair(), *stepped, *(Stair(s.period, tail=True) for s in stepped if s.period >= 4)]


def _error(stair: Stair, times: Mapping[int, float]) -> float:
    """Mean absolute error of the curve through the times that fit it best, of their median."""
    widths = np.array(sorted(times))
    ms = np.array([times[w] for w in widths.tolist()])
    blocks = -(-widths // stair.period).astype(float)
    full = np.array([stair.full(w) for w in widths.tolist()])
    columns = [np.ones_like(blocks), blocks, blocks**2]
    if not full.all():
        columns += [full.astype(float), full * blocks]
    x = np.stack(columns, axis=1)
    kept = np.full(len(widths), True)
    for _ in range(FITS):
        weights = np.linalg.lstsq(x[kept], ms[kept], rcond=None)[0]
        off = np.abs(x @ weights - ms)
        kept = off <= np.sort(off)[round(KEPT * len(off)) - 1]
    free = kept.sum() - len(columns)
    return float(off[kept].sum() / max(1, free)) / max(float(np.median(ms)), SHORTEST)
