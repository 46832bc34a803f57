"""Predictions from made-up tables: looked up, interpolated, scaled, calibrated, told apart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latency_case import HERE, conv, filled, point

from gracile.latency.calibration import Calibration, calibrate
from gracile.latency.predict import Predictor
from gracile.latency.staircase import Stair
from gracile.latency.table import Network, Times
from gracile.latency.unit import Unit

LADDER = (8, 12, 16, 24, 32, 48, 64)


def linear(i, o):
    return 0.001 * i * o


def predictor(cost=linear, widths=LADDER, stairs=None):
    times = filled(cost, widths).of(HERE)
    times.stairs |= stairs or {}
    return Predictor(times)


def test_a_measured_unit_is_looked_up():
    found = predictor().unit(conv(16, 32))
    assert (found.ms, found.how) == (pytest.approx(0.512), "measured")


@given(i=st.integers(8, 64), o=st.integers(8, 64))
def test_interpolation_is_exact_where_the_cost_is_a_product(i, o):
    found = predictor().unit(conv(i, o))
    assert found.ms == pytest.approx(linear(i, o))
    assert found.how in ("measured", "interpolated")


def test_interpolation_by_hand():
    found = predictor(lambda i, o: float(i + o)).unit(conv(20, 56))
    assert found.ms == pytest.approx(76.0)
    assert found.sigma_ms == pytest.approx(0.05 * 76.0, rel=1e-3)


def test_a_width_is_put_on_its_stair():
    stairs = {("conv", "f32", 1): Stair(16)}
    found = predictor(stairs=stairs).unit(conv(16, 17))
    assert (found.ms, found.how) == (pytest.approx(linear(16, 32)), "measured")


def test_less_than_a_block_stands_for_itself():
    stairs = {("conv", "f32", 0): Stair(8), ("conv", "f32", 1): Stair(8)}
    p = predictor(stairs=stairs)
    assert [u.widths for u in p.missing([conv(3, 17)])] == [(3, 24)]


def test_full_and_partly_filled_blocks_are_not_mixed():
    times = Times(HERE)
    times.stairs["conv", "f32", 0] = times.stairs["conv", "f32", 1] = Stair(8, tail=True)
    times.points |= {conv(8, 16): point(1.0), conv(8, 13): point(3.0)}
    p = Predictor(times)
    assert p.unit(conv(8, 16)).ms == 1.0  # a fit over both would give 2 and 2
    assert p.unit(conv(8, 11)).ms == 3.0


def test_what_is_missing_are_the_corners_each_once():
    p = predictor(widths=(32,))
    wanted = p.missing([conv(40, 32), conv(41, 32)])
    assert [u.widths for u in wanted] == [(48, 32)]
    assert [u.widths for u in p.missing([conv(40, 32)], exact=True)] == [(40, 32)]


def test_beyond_what_was_measured_it_is_scaled_and_said():
    p = predictor(widths=(16,))
    found = p.unit(conv(32, 16))
    assert (found.ms, found.how) == (pytest.approx(2 * linear(16, 16)), "scaled")
    assert found.sigma_ms == pytest.approx(found.ms / 2)
    prediction = p.network([("a", conv(32, 16))])
    assert "100 % of the time is scaled" in prediction.warnings[0]


def test_an_unknown_unit_counts_nothing_and_is_said():
    prediction = predictor().network([("a", conv(8, 8)), ("b", Unit.of("Softmax", (), {}))])
    assert prediction.counts == {"measured": 1, "unknown": 1}
    assert prediction.sum_ms == pytest.approx(0.064)
    assert "counted as 0: 1 Softmax" in prediction.warnings[0]


def test_a_prediction_is_a_record_of_its_own_kind():
    p = predictor()
    found = p.network([("a", conv(16, 16)), ("b", conv(16, 16))])
    record = found.record(p.times, subject={"model": "m"})
    assert (record.kind, record.metric, record.unit) == ("predicted", "latency_ms", "ms")
    assert record.value == pytest.approx(0.512)
    low, high = record.ci95
    assert low < record.value < high
    assert record.threads == 1


def test_the_same_unit_twice_is_off_twice():
    times = Times(HERE)
    times.points |= {conv(8, 8): point(1.0, 0.5), conv(16, 16): point(1.0, 0.5)}
    times.networks |= {f"n{k}": Network(1.0 + k, 1.0 + k, 1.0) for k in range(5)}  # spread 0
    p = Predictor(times)
    same = p.network([("a", conv(8, 8)), ("b", conv(8, 8))])
    other = p.network([("a", conv(8, 8)), ("b", conv(16, 16))])
    assert same.interval[1] - same.ms == pytest.approx(1.96 * 1.0)
    assert other.interval[1] - other.ms == pytest.approx(1.96 * 0.5 * 2**0.5)


@given(a=st.floats(0.5, 2), b=st.floats(0.01, 0.5))
def test_calibration_finds_the_line(a, b):
    found = calibrate([(s, a * s + b) for s in (0.5, 1.0, 2.0, 4.0, 8.0)])
    assert found.a == pytest.approx(a, rel=1e-4)
    assert found.b == pytest.approx(b, rel=1e-3)
    assert found.spread == pytest.approx(0, abs=1e-5)
    assert found.networks == 5


def test_calibration_never_takes_away_a_constant_and_needs_room_for_one():
    assert calibrate([(1.0, 0.9), (10.0, 10.0)]).b == 0
    one = calibrate([(2.0, 3.0)])
    assert (one.apply(4.0), one.networks) == (pytest.approx(6.0), 1)
    assert calibrate([(1.0, 2.0), (1.1, 2.2)]).b == 0
    assert calibrate([]) == Calibration()


@given(a=st.floats(0.5, 2.0), c=st.floats(0.05, 1.0))
def test_calibration_finds_the_price_of_weights(a, c):
    sums, weights = (1.0, 2.0, 4.0, 1.5, 3.0), (100_000, 4_000_000, 900_000, 9_000_000, 10_000)
    pairs = [(s, a * s + c * w / 1e6) for s, w in zip(sums, weights, strict=True)]
    found = calibrate(pairs, weights)
    assert (found.a, found.c, found.b) == (
        pytest.approx(a, rel=1e-4),
        pytest.approx(c, rel=1e-3),
        0,
    )
    assert found.apply(2.0, 3_000_000) == pytest.approx(2 * a + 3 * c, rel=1e-4)


def test_few_networks_or_equal_ones_have_no_price_of_weights():
    pairs = [(1.0, 2.1), (2.0, 4.1), (4.0, 8.1)]
    assert calibrate(pairs, [1, 10**6, 10**7]) == calibrate(pairs)
    four = [*pairs, (8.0, 16.1)]
    assert calibrate(four, [10**6] * 4) == calibrate(four)


def test_each_step_has_a_price():
    sums, steps = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0), (90, 20, 60, 25, 70, 20, 30, 120)
    held = [100_000 * k for k in range(1, 9)]
    pairs = [(s, 1.05 * s + 0.003 * n) for s, n in zip(sums, steps, strict=True)]
    found = calibrate(pairs, held, steps)
    assert (found.a, found.c, found.d) == pytest.approx((1.05, 0.0, 0.003), abs=1e-6)
    assert found.apply(2.0, 500_000, 100) == pytest.approx(2.4)
    cheaper = [(s, 1.05 * s - 0.001 * n) for s, n in zip(sums, steps, strict=True)]
    assert calibrate(cheaper, held, steps).d == 0


def test_weights_that_the_caches_keep_are_free():
    sums, held = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0], [0.1, 4.0, 0.3, 1.1, 6.0, 0.8, 2.5, 0.4]
    pairs = [(s, 1.1 * s + 0.2 * max(0.0, h - 1.0)) for s, h in zip(sums, held, strict=True)]
    found = calibrate(pairs, [round(h * 1e6) for h in held])
    assert (found.a, found.c, found.free) == pytest.approx((1.1, 0.2, 1.0))
    assert found.apply(2.0, 3_000_000) == pytest.approx(2.6)
    assert found.apply(2.0, 900_000) == pytest.approx(2.2)
    few = calibrate(pairs[:7], [round(h * 1e6) for h in held[:7]])
    assert few.free == 0


def test_spread_by_hand():
    found = calibrate([(1.0, 0.9), (1.0, 1.1), (1.0, 1.0)])
    shares = [1 / 0.9, 1 / 1.1, 1.0]
    a = sum(shares) / sum(s * s for s in shares)
    errors = [a * s - 1 for s in shares]
    assert found.spread == pytest.approx((sum(e * e for e in errors) / 2) ** 0.5)
