"""The monotone fit: a wider unit is not faster, so what says otherwise is noise."""

from collections.abc import Mapping, Sequence

import numpy as np

SWEEPS = 100  # of the alternating projections; they come to rest much earlier


def pool_adjacent_violators(
    values: Sequence[float], weights: Sequence[float] | None = None
) -> list[float]:
    """The non-decreasing sequence nearest to `values` in weighted least squares.

    Args:
        values: in the order in which they should not fall.
        weights: > 0, one a value; all 1 by default.

    >>> pool_adjacent_violators([1.0, 3.0, 2.0, 4.0])
    [1.0, 2.5, 2.5, 4.0]

    Source: Ayer et al. 1955; Barlow et al. 1972.
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights or [1.0] * len(values), strict=True):
        mean, total, length = float(value), float(weight), 1
        while blocks and blocks[-1][0] >= mean:
            before, mass, n = blocks.pop()
            mean = (before * mass + mean * total) / (mass + total)
            total, length = mass + total, length + n
        blocks.append((mean, total, length))
    return [mean for mean, _, length in blocks for _ in range(length)]


def monotone(
    values: Mapping[tuple[int, ...], float], weights: Mapping[tuple[int, ...], float]
) -> dict[tuple[int, ...], float]:
    """Times that do not fall along any width, nearest to those measured.

    Points lie where they were measured, not on a full grid: those that differ in one width only
    form a line, and along every line the fit does not fall. Dykstra's alternating projections.

    Args:
        values: widths -> ms; all of the same length.
        weights: widths -> how much a point counts, > 0.

    >>> monotone({(8,): 2.0, (16,): 1.0}, {(8,): 1.0, (16,): 1.0})
    {(8,): 1.5, (16,): 1.5}
    """
    lines = _lines(list(values))
    if not lines:
        return dict(values)
    fit = dict(values)
    if len({len(k) for k in values}) == 1 and len(next(iter(values))) == 1:
        rounds = 1
    else:
        rounds = SWEEPS
    moved = {(k, key): 0.0 for k, line in enumerate(lines) for key in line}
    for _ in range(rounds):
        change = 0.0
        for k, line in enumerate(lines):
            wanted = [fit[key] + moved[k, key] for key in line]
            found = pool_adjacent_violators(wanted, [weights[key] for key in line])
            for key, before, after in zip(line, wanted, found, strict=True):
                moved[k, key] = before - after
                change = max(change, abs(fit[key] - after))
                fit[key] = after
        if change < 1e-9 * max(1e-9, float(np.max(np.abs(list(values.values()))))):
            break
    return fit


def _lines(keys: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """For each axis, the points that differ along it only, in order."""
    out = []
    for axis in range(len(keys[0]) if keys else 0):
        groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for key in keys:
            groups.setdefault(key[:axis] + key[axis + 1 :], []).append(key)
        out += [sorted(g, key=lambda k: k[axis]) for g in groups.values() if len(g) > 1]
    return out
