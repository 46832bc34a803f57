"""Powell's direction set method: the minimum of a function that has no gradient, in few trials.

Powell 1964, doi:10.1093/comjnl/7.2.155, with its rule for when a direction is replaced. A line is
searched by steps that double until it rises, then by one parabola, so that it costs three to five
trials: each trial here is a pass over data.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


class _Spent(Exception):
    """All trials are used up."""


def powell(
    f: Callable[[Vector], float],
    start: Sequence[float] | Vector,
    *,
    first: Sequence[Sequence[float] | Vector] = (),
    step: float = 0.25,
    low: float = -np.inf,
    high: float = np.inf,
    evaluations: int = 300,
    tolerance: float = 1e-4,
) -> tuple[Vector, float]:
    """Minimize a function of several numbers.

    Args:
        f: the function; the same numbers give the same value.
        start: where to begin.
        first: directions to go along once, before each number by itself.
        step: first step along a line, in units of the numbers.
        low, high: of each number.
        evaluations: trials at most, 1 or more.
        tolerance: it ends after a round over all directions that gains less than this share.

    Returns:
        The best point tried, and f there: never worse than f(start).

    >>> powell(lambda x: (x[0] - 1) ** 2 + 3, [0.0])[0].round(3)
    array([1.])
    """
    search = _Search(f, np.asarray(start, dtype=np.float64), low, high, evaluations)
    directions = list(np.eye(len(start)))
    try:
        search.begin()
        for way in first:
            search.line(np.asarray(way, dtype=np.float64), step)
        while True:
            origin, before = search.x, search.value
            gains = []
            for d in directions:
                value = search.value
                search.line(d, step)
                gains.append(value - search.value)
            if before - search.value <= tolerance * abs(before):
                break
            _renew(directions, search, origin, before, gains, step)
    except _Spent:
        pass
    return search.x, search.value


def _renew(
    directions: list[Vector],
    search: "_Search",
    origin: Vector,
    before: float,
    gains: list[float],
    step: float,
) -> None:
    """Put the way of a round in the place of its best direction, if that way leads on."""
    way, now, most = search.x - origin, search.value, max(gains)
    beyond = search.at(search.x + way)
    test = 2 * (before - 2 * now + beyond) * (before - now - most) ** 2
    if beyond < before and test < most * (before - beyond) ** 2:
        length = float(np.abs(way).max())
        search.line(way / length, step)
        directions.pop(gains.index(most))
        directions.append(way / length)


class _Search:
    """The best point so far, and how many trials are left."""

    def __init__(
        self, f: Callable[[Vector], float], x: Vector, low: float, high: float, trials: int
    ):
        self.f, self.x, self.low, self.high, self.left = f, x, low, high, trials
        self.value = float("inf")

    def begin(self) -> None:
        self.value = self.at(self.x)

    def at(self, x: Vector) -> float:
        """f there; keeps the point if it is the best."""
        if self.left == 0:
            raise _Spent
        self.left -= 1
        x = x.clip(self.low, self.high)
        value = float(self.f(x))
        value = value if np.isfinite(value) else float("inf")
        if value < self.value:
            self.x, self.value = x, value
        return value

    def line(self, d: Vector, step: float) -> None:
        """Go along a direction: doubling steps while it falls, then the parabola's lowest point."""
        x, middle = self.x, self.value
        points = {0.0: middle}
        side = 1.0
        points[step] = self.at(x + step * d)
        if points[step] >= middle:
            side = -1.0
            points[-step] = self.at(x - step * d)
        t = side * step
        while points[t] < points[t / 2 if t / 2 in points else 0.0]:
            points[2 * t] = self.at(x + 2 * t * d)
            t *= 2
        best = min(points, key=points.__getitem__)
        below = max((p for p in points if p < best), default=None)
        above = min((p for p in points if p > best), default=None)
        if below is not None and above is not None:
            t = _lowest((below, points[below]), (best, points[best]), (above, points[above]))
            if abs(t - best) > 0.05 * step:
                self.at(x + t * d)


def _lowest(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Where the parabola through three points is lowest; b's place if it is none."""
    (x, fx), (y, fy), (z, fz) = a, b, c
    p, q = (y - x) * (fy - fz), (y - z) * (fy - fx)
    if not np.isfinite(p - q) or p == q:
        return y
    return y - 0.5 * ((y - x) * p - (y - z) * q) / (p - q)
