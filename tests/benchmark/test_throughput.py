"""Throughput is counted, by several threads at once."""

from threading import Barrier
from time import sleep

import pytest
from test_timing import Clock, by

from gracile.benchmark.throughput import count, measure_throughput
from gracile.errors import UserError


class Streams(Clock):
    """Whose inference sleeps for a known time."""

    def __init__(self, seconds, **settings):
        super().__init__(1.0, **settings)
        self.seconds = seconds

    def streams(self, n, batch=None):
        """Each sleeps."""
        return [lambda: sleep(self.seconds)] * n


def test_streams_are_counted_together():
    records = measure_throughput(
        {"slow": Streams(0.02), "fast": Streams(0.01)}, streams=4, batch=8, seconds=0.06
    )
    slow = by(records, "throughput", "slow")
    assert slow.unit == "images/s"
    assert slow.subject["streams"] == "4"
    assert slow.value <= 4 * 8 / 0.02  # a sleep is never shorter
    assert slow.value > 4 * 8 / 0.02 / 3
    assert slow.n >= 4 * 5
    ratio = by(records, "throughput_ratio", "fast")
    assert ratio.subject["baseline"] == "slow"
    assert ratio.value > 1


def test_every_stream_has_a_thread_of_its_own():
    together = Barrier(3)
    assert count([lambda: together.wait(5)] * 3, 0.0)[0] == 3


def test_a_failing_inference_is_the_error_of_the_measurement():
    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        count([lambda: None, fail], 0.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"streams": 0}, "streams must be >= 1"), ({"seconds": 0}, "seconds > 0"),
     ({"rounds": 3}, "rounds must be at least 5")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(options, text):
    with pytest.raises(UserError, match=text):
        measure_throughput({"a": Streams(0.001)}, **options)
