"""Timing arithmetic on made-up clocks: medians, ratios, intervals, drift, fairness."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gracile.benchmark.timing import compare, drifted, median_interval, ratio_interval
from gracile.errors import UserError


class Clock:
    """A loaded artifact whose latency is known: `ms`, or `ms(call)`."""

    name, version, device, batch = "fake", "1.0", "fake:CPU", 1

    def __init__(self, ms, log=None, label="", **settings):
        self.ms = ms if callable(ms) else lambda _: ms
        self.calls, self.log, self.label = 0, log, label
        self.hint = settings.get("hint", "f32")
        self.threads = settings.get("threads", 1)
        inputs = (("x", (1, 3, 8, 8)),)
        self.artifact = SimpleNamespace(sha=f"sha-{label}", inputs=inputs, path=Path("m.onnx"))

    def time(self, n, batch=None):
        """n times the known latency."""
        if self.log is not None:
            self.log.append((self.label, n))
        self.calls += 1
        return [self.ms(self.calls)] * n


def by(records, metric, model):
    (found,) = [r for r in records if r.metric == metric and r.subject["model"] == model]
    return found


def test_latency_and_speedup_of_known_clocks():
    records = compare({"slow": Clock(4.0), "fast": Clock(2.0)}, rounds=5, batch=8)
    latency = by(records, "latency_ms", "slow")
    assert (latency.value, latency.median, latency.p95, latency.iqr) == (4.0, 4.0, 4.0, 0.0)
    assert (latency.unit, latency.kind, latency.batch, latency.shape) == (
        "ms", "measured", 8, (8, 3, 8, 8),
    )  # fmt: skip
    assert {r.metric for r in records} == {
        "latency_ms", "drift", "involuntary_switches", "speedup",
    }  # fmt: skip
    speedup = by(records, "speedup", "fast")
    assert (speedup.value, speedup.ci95, speedup.n) == (2.0, (2.0, 2.0), 5)
    assert speedup.subject["baseline"] == "slow"
    assert not [r for r in records if r.metric == "speedup" and r.subject["model"] == "slow"]


def test_rounds_are_interleaved():
    log = []
    loaded = {"a": Clock(10.0, log, "a"), "b": Clock(10.0, log, "b")}
    compare(loaded, rounds=5, warmup=2, min_round_ms=50)
    assert log[:4] == [("a", 2), ("a", 3), ("b", 2), ("b", 3)]  # warm-up and a probe
    assert log[4:] == [("a", 5), ("b", 5)] * 5  # 50 ms a round


def test_the_median_of_rounds_ignores_a_disturbed_round():
    disturbed = Clock(lambda call: 100.0 if call == 5 else 1.0)
    records = compare({"a": disturbed}, rounds=7)
    assert by(records, "latency_ms", "a").value == 1.0


def test_drift_is_flagged():
    records = compare({"a": Clock(lambda call: 1.0 + 0.1 * call), "b": Clock(1.0)}, rounds=9)
    assert by(records, "drift", "a").value == 1.0
    assert by(records, "drift", "b").value == 0.0


def test_load_and_context_switches_are_recorded():
    record = by(compare({"a": Clock(1.0)}, rounds=5), "involuntary_switches", "a")
    assert record.value >= 0
    assert record.load_avg >= 0
    assert set(record.versions) == {"cpu", "fake"}


@given(st.floats(0.2, 5), st.integers(0, 1000))
def test_the_interval_holds_the_ratio_and_follows_its_scale(factor, seed):
    g = np.random.default_rng(seed)
    base, other = 2 + 0.1 * g.standard_normal(7), 1 + 0.1 * g.standard_normal(7)
    low, high = ratio_interval(base, other)
    assert low <= np.median(base) / np.median(other) <= high
    assert ratio_interval(base, other) == (low, high)  # same seed
    np.testing.assert_allclose(ratio_interval(factor * base, other), (factor * low, factor * high))


def test_pairs_cancel_what_slows_both_down():
    slow = np.array([1, 1, 1, 3, 3, 3, 1.0])  # a busy machine in three rounds
    assert ratio_interval(2 * slow, slow) == (2.0, 2.0)
    low, high = median_interval(slow)
    assert low < high


def test_a_reference_is_timed_with_the_others_and_compared_with_none():
    log = []
    clocks = {"ref": Clock(10.0, log, "ref"), "a": Clock(4.0, log, "a"), "b": Clock(2.0, log, "b")}
    records = compare(clocks, rounds=5, reference="ref")
    relative = by(records, "relative_latency", "a")
    assert (relative.value, relative.ci95, relative.unit) == (0.4, (0.4, 0.4), "ratio")
    assert relative.subject["reference_sha"] == "sha-ref"
    speedup = by(records, "speedup", "b")
    assert (speedup.value, speedup.subject["baseline"]) == (2.0, "a")
    assert not [r for r in records if r.subject["model"] == "ref" and r.unit == "ratio"]
    assert [label for label, _ in log[6:9]] == ["ref", "a", "b"]
    with pytest.raises(UserError, match="reference 'x' must be one of several"):
        compare(clocks, reference="x")


def test_drifted_compares_the_first_and_the_last_third():
    assert not drifted(np.array([1, 1, 1, 5, 1, 1, 1.0]))
    assert drifted(np.array([1, 1, 1, 1, 1.2, 1.2, 1.2]))


@pytest.mark.parametrize(
    ("loaded", "options", "text"),
    [
        ({}, {}, "nothing to time"),
        ({"a": Clock(1.0)}, {"rounds": 4}, "rounds must be at least 5"),
        ({"a": Clock(1.0)}, {"warmup": -1}, "warmup must be >= 0"),
        ({"a": Clock(1.0), "b": Clock(1.0, hint="bf16")}, {}, "same hint for all"),
        ({"a": Clock(1.0), "b": Clock(1.0, threads=2)}, {}, r"same threads for all \(a: 1, b: 2\)"),
    ],
)
def test_unfair_or_empty_comparisons_are_refused(loaded, options, text):
    with pytest.raises(UserError, match=text):
        compare(loaded, **options)
