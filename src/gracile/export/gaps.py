"""Where the entries of a sparse tensor are: the distance of each to the one before it.

Han et al. 2016, arXiv:1510.00149, section 2 and figure 2. A distance that does not fit is bridged
by fillers: entries that are there and are zero.
"""

import numpy as np
from numpy.typing import NDArray

MAX_BITS = 8

Ints = NDArray[np.int64]


def gaps(positions: Ints, bits: int, size: int) -> tuple[Ints, Ints]:
    """Distances in 1..2^bits, with fillers.

    Args:
        positions: rising, from 0.
        bits: of a distance.
        size: of the whole; fillers also bridge what lies behind the last position, so that less
            than 2^bits places do.

    Returns:
        Distance of each entry to the one before it (of the first to -1), and for each which
        position it stands for, -1 for a filler.

    >>> gaps(np.array([0, 3, 14]), 3, 16)  # figure 2: the distance of 11 is 8 and 3
    (array([1, 3, 8, 3]), array([ 0,  1, -1,  2]))
    """
    limit = 1 << bits
    exact = np.diff(positions, prepend=-1)
    fillers = (exact - 1) // limit
    ends = np.cumsum(fillers + 1) - 1
    count = int(ends[-1]) + 1 if len(ends) else 0
    last = int(positions[-1]) if len(positions) else -1
    count += (size - 1 - last) // limit
    out, of = np.full(count, limit, np.int64), np.full(count, -1, np.int64)
    out[ends] = exact - fillers * limit
    of[ends] = np.arange(len(positions))
    return out, of


def positions(distances: Ints) -> Ints:
    """Where each entry is, fillers included.

    >>> positions(np.array([1, 3, 8, 3]))
    array([ 0,  3, 11, 14])
    """
    return np.cumsum(distances) - 1
