"""The staircase of widths: kernels work on blocks of channels, and time follows the blocks.

A block may also cost more when it is not full (masked stores, another kernel): then widths that
fill their last block and widths that do not are two staircases.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

PERIODS = (1, 2, 4, 8, 16, 32, 64)
BETTER = 1.5  # the largest period whose error is within this factor of the best is taken
TAIL = 1.5  # a separate staircase must pay by this factor
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
        >>> [Stair(8, tail=True).canonical(w) for w in (1, 7, 8, 9)]
        [7, 7, 8, 15]
        """
        blocks = -(-width // self.period)
        return blocks * self.period - (0 if self.full(width) else 1)

    def around(self, width: int) -> tuple[int, int]:
        """The nearest widths that are measured, at most and at least this one.

        >>> Stair(8).around(40), Stair(8).around(33), Stair(8).around(32)
        ((32, 48), (32, 48), (32, 32))
        """
        missing = 0 if self.full(width) else 1
        blocks = -(-width // self.period)
        ladder = _ladder(blocks)
        k = bisect_left(ladder, blocks)
        low = ladder[k] if ladder[k] == blocks else ladder[k - 1]
        return low * self.period - missing, ladder[k] * self.period - missing


def _ladder(blocks: int) -> list[int]:
    steps = list(STEPS)
    while steps[-1] < blocks:
        steps += [2 * s for s in steps[-2:]]
    return steps


def detect(times: Mapping[int, float]) -> Stair:
    """The staircase in the times of a range of widths.

    Every candidate predicts each time from the others: the median of the widths it calls equal, or,
    if there are none, the straight line between its neighbours of the same kind (full or not). The
    mean error without the worst tenth decides, so that single disturbed times do not.

    Args:
        times: width -> ms; widths of at least two blocks of the periods to find, several in each.

    >>> detect({w: float(-(-w // 8)) for w in range(1, 65)})
    Stair(period=8, tail=False)
    """
    widths = sorted(times)
    if len(widths) < 4:
        return Stair()
    errors = {}
    for period in PERIODS:
        for tail in (False, True):
            if 2 * period <= widths[-1] - widths[0] + 1 and not (tail and period < 4):
                errors[Stair(period, tail)] = _error(Stair(period, tail), widths, times)
    if not errors:
        return Stair()
    scale = median(times[w] for w in widths)
    best = min(errors.values())
    allowed = max(best * BETTER, 1e-3 * scale)
    one = [s for s, e in errors.items() if not s.tail and e <= allowed]
    plain = max(one, key=lambda s: s.period, default=None)
    two = [s for s, e in errors.items() if s.tail and e <= allowed]
    split = max(two, key=lambda s: s.period, default=None)
    if plain is None:
        return split or Stair()
    if split is not None and errors[split] * TAIL < errors[plain] and split.period > plain.period:
        return split
    return plain


def _error(stair: Stair, widths: list[int], times: Mapping[int, float]) -> float:
    groups: dict[int, list[float]] = {}
    for w in widths:
        groups.setdefault(stair.canonical(w), []).append(times[w])
    level = {w: median(found) for w, found in groups.items()}
    errors = []
    for w in widths:
        others = list(groups[stair.canonical(w)])
        others.remove(times[w])
        guess = median(others) if others else _between(stair, stair.canonical(w), level)
        errors.append(abs(times[w] - guess))
    kept = sorted(errors)[: max(1, round(0.9 * len(errors)))]
    return sum(kept) / len(kept)


def _between(stair: Stair, mine: int, level: Mapping[int, float]) -> float:
    """What a width's neighbours of the same kind say about it; beyond the last, the last two."""
    same = [w for w in level if w != mine and stair.full(w) == stair.full(mine)]
    below = max((w for w in same if w < mine), default=None)
    above = min((w for w in same if w > mine), default=None)
    if below is None or above is None:
        edge = sorted(same, key=lambda w: abs(w - mine))[:2]
        if len(edge) < 2:
            return level[edge[0]] if edge else 0.0
        below, above = edge
    share = (mine - below) / (above - below)
    return level[below] + share * (level[above] - level[below])
