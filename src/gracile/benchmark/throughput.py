"""How many images a machine computes in a second: several streams at once, side by side.

A throughput is measured, not worked out from the latency of one stream: streams share caches,
memory and the processor's clock.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from threading import Barrier, Thread
from time import perf_counter
from typing import Any

import numpy as np

from gracile.benchmark.runtimes.base import Loaded
from gracile.benchmark.timing import (
    against,
    check_fair,
    median_interval,
    ratio_record,
    record_facts,
)
from gracile.core.record import Record
from gracile.errors import UserError


def measure_throughput(
    loaded: Mapping[str, Loaded],
    *,
    streams: int = 2,
    rounds: int = 5,
    batch: int | None = None,
    seconds: float = 0.5,
    seed: int = 0,
) -> list[Record]:
    """Images a second of several artifacts, each computed in `streams` streams at once.

    Args:
        loaded: name -> loaded artifact; the first is the baseline. All must have the same precision
            hint and number of threads.
        streams: inferences at the same time. Each has the artifact's number of threads, so
            streams x threads of them compute.
        rounds: interleaved rounds, at least 5.
        batch: batch size of each inference; None for each artifact's own.
        seconds: length of a round.
        seed: of the bootstrap.

    Returns:
        For each name the Record `throughput` in images/s (median of the rounds, with its 95 %
        interval), ``subject["streams"]``; for each but the first `throughput_ratio`.

    Raises:
        UserError: as `timing.compare`, or `streams` or `seconds` out of range.
    """
    check_fair(loaded, rounds)
    if streams < 1 or seconds <= 0:
        raise UserError(f"streams must be >= 1 and seconds > 0, got {streams} and {seconds}.")
    sizes = {name: batch or item.batch for name, item in loaded.items()}
    steps = {name: item.streams(streams, sizes[name]) for name, item in loaded.items()}
    for each in steps.values():
        count(each, 0.0)  # warm up: every stream once
    done: dict[str, list[int]] = {name: [] for name in loaded}
    rates: dict[str, list[float]] = {name: [] for name in loaded}
    for _ in range(rounds):
        for name, each in steps.items():
            n, elapsed = count(each, seconds)
            done[name].append(n)
            rates[name].append(n * sizes[name] / elapsed)
    base = next(iter(loaded))
    out = []
    for name, item in loaded.items():
        facts = record_facts(item, name, sizes[name], seed) | {"load_avg": os.getloadavg()[0]}
        facts["subject"]["streams"] = str(streams)
        mine = np.array(rates[name])
        value, interval = float(np.median(mine)), median_interval(mine, seed)
        n = sum(done[name])
        out.append(Record("throughput", value, "images/s", n=n, ci95=interval, **facts))
        if name != base:
            pair = against(facts, base)
            out.append(ratio_record("throughput_ratio", mine, np.array(rates[base]), pair, seed))
    return out


def count(steps: Sequence[Callable[[], Any]], seconds: float) -> tuple[int, float]:
    """Run every step again and again in a thread of its own.

    Args:
        steps: one for each stream.
        seconds: after which no inference is begun; each stream does at least one.

    Returns:
        Finished inferences of all streams, and the seconds until the last of them ended.
    """
    start = Barrier(len(steps) + 1)
    counts, failures = [0] * len(steps), list[BaseException]()

    def stream(k: int) -> None:
        start.wait()
        end = perf_counter() + seconds
        try:
            while True:
                steps[k]()
                counts[k] += 1
                if perf_counter() >= end:
                    return
        except BaseException as e:
            failures.append(e)

    threads = [Thread(target=stream, args=(k,), daemon=True) for k in range(len(steps))]
    for t in threads:
        t.start()
    start.wait()
    begin = perf_counter()
    for t in threads:
        t.join()
    if failures:
        raise failures[0]
    return sum(counts), perf_counter() - begin
