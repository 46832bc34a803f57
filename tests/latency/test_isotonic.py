"""The monotone fit against a brute force, and what it keeps."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gracile.latency.isotonic import monotone, pool_adjacent_violators

LEVELS = st.integers(0, 4)


def brute_force(values, weights):
    """The best of all ways to cut the sequence into blocks of one (weighted) mean each."""
    best, found = np.inf, None
    n = len(values)
    for cuts in product([False, True], repeat=n - 1):
        edges = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), n]
        fit = []
        for a, b in pairwise(edges):
            mean = np.average(values[a:b], weights=weights[a:b])
            fit += [mean] * (b - a)
        if all(a <= b + 1e-12 for a, b in pairwise(fit)):
            error = float(np.sum(np.array(weights) * (np.array(fit) - values) ** 2))
            if error < best - 1e-12:
                best, found = error, fit
    return found


@given(st.lists(st.tuples(LEVELS, st.integers(1, 4)), min_size=1, max_size=7))
@settings(deadline=None)
def test_equals_a_brute_force(pairs):
    values, weights = ([float(x) for x in column] for column in zip(*pairs, strict=True))
    got = pool_adjacent_violators(values, weights)
    np.testing.assert_allclose(got, brute_force(values, weights), atol=1e-9)


def test_by_hand():
    assert pool_adjacent_violators([3.0, 1.0, 2.0]) == [2.0, 2.0, 2.0]
    assert pool_adjacent_violators([2.0, 1.0], [1.0, 3.0]) == [1.25, 1.25]


@given(st.dictionaries(st.tuples(LEVELS, LEVELS), st.floats(0, 10), min_size=1, max_size=12))
@settings(deadline=None)
def test_no_width_makes_a_unit_faster(values):
    fit = monotone(values, dict.fromkeys(values, 1.0))
    for a, b in product(fit, repeat=2):
        beside = sum(x != y for x, y in zip(a, b, strict=True)) == 1
        if beside and all(x <= y for x, y in zip(a, b, strict=True)):
            assert fit[a] <= fit[b] + 1e-3


def test_what_is_monotone_is_kept():
    values = {(i, o): float(i * o) for i in (8, 16, 32) for o in (8, 24)}
    assert monotone(values, dict.fromkeys(values, 1.0)) == pytest.approx(values)


def test_a_square_by_hand():
    values = {(1, 1): 2.0, (1, 2): 1.0, (2, 1): 3.0, (2, 2): 4.0}
    fit = monotone(values, dict.fromkeys(values, 1.0))
    assert fit == pytest.approx({(1, 1): 1.5, (1, 2): 1.5, (2, 1): 3.0, (2, 2): 4.0})
