"""Staircases: found on made-up times with noise, and the widths that stand for others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gracile.latency.measuring import SWEEP
from gracile.latency.staircase import Stair, detect


def blocks(width, period, tail=0.0):
    """So many blocks; a block that is not full costs `tail` more."""
    return -(-width // period) + (tail if width % period else 0.0)


def noisy(times, share, seed):
    rng = np.random.default_rng(seed)
    return {w: t * (1 + share * abs(rng.standard_normal())) for w, t in times.items()}


@pytest.mark.parametrize("period", [8, 16])
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.005, 0.01]))
@settings(max_examples=30, deadline=None)
def test_the_period_is_found_in_noise(period, seed, share):
    times = {w: 0.5 + blocks(w, period) for w in range(17, 97)}
    assert detect(noisy(times, share, seed)) == Stair(period)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_partly_filled_blocks_that_cost_more_are_seen(seed):
    times = {w: blocks(w, 8, tail=2.0) for w in range(17, 97)}
    assert detect(noisy(times, 0.01, seed)) == Stair(8, tail=True)


def test_the_widths_that_are_swept_show_the_periods_of_avx():
    assert detect({w: blocks(w, 8) for w in SWEEP}) == Stair(8)
    assert detect({w: blocks(w, 16) for w in SWEEP}) == Stair(16)
    assert detect({w: blocks(w, 8, tail=2.0) for w in SWEEP}) == Stair(8, tail=True)
    assert detect({w: float(w) for w in SWEEP}).period == 1


def test_a_straight_line_has_no_steps():
    assert detect({w: float(w) for w in range(17, 97)}) == Stair(1)


def test_single_disturbed_times_do_not_hide_the_steps():
    times = {w: blocks(w, 8) for w in range(17, 65)}
    assert detect(times | {20: 50.0, 44: 30.0}) == Stair(8)


def test_too_few_widths_are_no_staircase():
    assert detect({8: 1.0, 16: 2.0}) == Stair()


@given(width=st.integers(1, 5000), period=st.sampled_from([1, 4, 8, 16]), tail=st.booleans())
def test_the_measured_neighbours_enclose_a_width_and_are_of_its_kind(width, period, tail):
    stair = Stair(period, tail and period >= 4)
    low, high = stair.around(width)
    mine = stair.canonical(width)
    assert low <= mine <= high
    assert mine >= width - stair.period // 2
    assert stair.full(low) == stair.full(high) == stair.full(mine) == stair.full(width)
    assert stair.around(low) == (low, low)
    assert stair.around(high) == (high, high)
    assert high + stair.period <= 2 * (low + stair.period)  # never further apart than a factor of 2


def test_neighbours_by_hand():
    assert Stair(8).around(33) == (32, 48)
    assert Stair(8, tail=True).around(33) == (29, 45)
    assert Stair(8, tail=True).around(40) == (32, 48)
    assert Stair().around(100) == (96, 128)


def test_of_several_units_one_may_be_disturbed():
    clear = {w: blocks(w, 8, tail=0.3) for w in SWEEP}
    rng = np.random.default_rng(0)
    loud = {w: t * (1 + 0.15 * rng.standard_normal()) for w, t in clear.items()}
    assert detect(loud) != Stair(8, tail=True)
    assert detect(clear, {w: 5 * t for w, t in clear.items()}, loud) == Stair(8, tail=True)
    assert detect({8: 1.0}, clear) == detect(clear)
