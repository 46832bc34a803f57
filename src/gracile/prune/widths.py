"""How narrow a group of channels may become: minimum widths, and the multiples a runtime likes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import TypeVar

from gracile.graph.dependency import ChannelGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How narrow a group may become.

    Attributes:
        multiple_of: cut only down to a multiple of so many channels; 16 suits AVX-512.
        min_keep: units that stay.
        min_width: channels that stay.
        max_ratio: largest share of its original units that a group may lose.
    """

    multiple_of: int = 1
    min_keep: int = 1
    min_width: int = 1
    max_ratio: float = 1.0


def stops(group: ChannelGroup, limits: Limits, original: int) -> list[int]:
    """Numbers of units a group may keep, from all it has downwards.

    Widths are counted in channels of the widest weight that makes them: one head of 64 channels is
    a multiple of 16 by itself. The width in each head is counted in units.
    """
    n = len(group.units)
    fixed, each = _channels(group)
    least = max(
        limits.min_keep,
        ceil((limits.min_width - fixed) / each),
        original - int(limits.max_ratio * original + 1e-6),
    )
    fits = (k for k in range(n - 1, least - 1, -1) if (fixed + k * each) % limits.multiple_of == 0)
    return [n, *fits]


def steps(units: Sequence[T], allowed: Sequence[int]) -> list[Sequence[T]]:
    """Cut a group's units, in order of removal, where an allowed number stays.

    What is left over stays.

    Args:
        units: those that may go, first things first.
        allowed: see `stops`.

    >>> steps("abcdef", [8, 6, 4, 0])
    ['ab', 'cd']
    """
    ends = [allowed[0] - k for k in allowed]
    return [units[a:b] for a, b in pairwise(ends) if b <= len(units)]


def _channels(group: ChannelGroup) -> tuple[int, int]:
    """(channels that must stay, channels of each unit) of the widest weight that is written."""
    axes = [axis for axis in group.writes.items() if axis in group.sizes]
    if group.kind == "inner" or not axes:
        return 0, 1
    widest = max(axes, key=lambda axis: group.sizes[axis])
    each = [sum(len(p.index) for p in u if (p.at, p.dim) == widest) for u in group.units]
    if min(each) != max(each):  # a part of the units has no channel there
        return 0, 1
    return group.sizes[widest] - sum(each), each[0]
