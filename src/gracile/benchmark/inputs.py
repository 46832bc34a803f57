"""Latency over real inputs, one by one: for networks that take longer for some than for others.

Every round goes through all inputs; at each one all networks run it before the next one comes, so
that whatever slows the machine down slows all of them down alike.
"""

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from gracile.benchmark.runtimes.base import Array, Loaded
from gracile.benchmark.runtimes.cascade import Cascade
from gracile.benchmark.timing import RESAMPLES, against, check_fair, record_facts
from gracile.core.record import Record
from gracile.errors import UserError


def measure_inputs(
    loaded: Mapping[str, Loaded],
    inputs: Sequence[Array],
    *,
    rounds: int = 5,
    seed: int = 0,
) -> list[Record]:
    """Time several networks on the same inputs.

    Args:
        loaded: name -> loaded artifact; the first is the baseline of the speed-ups. All must have
            the same precision hint and number of threads.
        inputs: real ones, each a batch of one, (1, ...).
        rounds: through all inputs, at least 5.
        seed: of the bootstrap.

    Returns:
        For each name the Record `mean_latency_ms`: the mean over the inputs, with median and p95
        over them, each input's time being the median of its rounds; intervals are bootstrapped over
        the rounds. For each but the first `mean_speedup`, the ratio of the means. For a cascade
        `exit_rate` of each exit, the share of the inputs that leave there; ``subject["exit"]`` is
        its number, and the last one the end.

    Raises:
        UserError: fewer than 5 rounds, nothing to time, no inputs, or settings that differ.
    """
    check_fair(loaded, rounds)
    if not len(inputs):
        raise UserError("there are no inputs to time the networks on.")
    for item in loaded.values():
        item.run(inputs[0])
    times = {name: np.zeros((rounds, len(inputs))) for name in loaded}
    for r in range(rounds):
        for k, x in enumerate(inputs):
            for name, item in loaded.items():
                start = perf_counter()
                item.run(x)
                times[name][r, k] = (perf_counter() - start) * 1e3
    draw = np.random.default_rng(seed).integers(0, rounds, (RESAMPLES, rounds))
    drawn = {name: np.array([_mean(t[rows]) for rows in draw]) for name, t in times.items()}
    base = next(iter(loaded))
    out = []
    for name, item in loaded.items():
        facts = record_facts(item, name, 1, seed)
        out.append(_latency(times[name], drawn[name], facts))
        if name != base:
            ratio = _mean(times[base]) / _mean(times[name])
            ends = _interval(drawn[base] / drawn[name])
            pair = against(facts, base)
            out.append(Record("mean_speedup", ratio, "ratio", n=rounds, ci95=ends, **pair))
        if isinstance(item, Cascade):
            out += _rates(item, inputs, facts)
    return out


def _mean(times: Array) -> float:
    """Mean over inputs of the median over rounds, of (rounds, inputs)."""
    return float(np.median(times, axis=0).mean())


def _interval(drawn: Array) -> tuple[float, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _latency(times: Array, drawn: Array, facts: Mapping[str, Any]) -> Record:
    each = np.median(times, axis=0)
    low, high = np.quantile(each, [0.25, 0.75])
    return Record(
        "mean_latency_ms",
        _mean(times),
        "ms",
        n=len(each),
        median=float(np.median(each)),
        p95=float(np.quantile(each, 0.95)),
        iqr=float(high - low),
        ci95=_interval(drawn),
        **facts,
    )


def _rates(item: Cascade, inputs: Sequence[Array], facts: Mapping[str, Any]) -> list[Record]:
    taken = np.concatenate([item.answer(x)[1] for x in inputs])
    return [
        Record(
            "exit_rate",
            float((taken == k).mean()),
            "share",
            n=len(taken),
            **{**facts, "subject": {**facts["subject"], "exit": str(k)}},
        )
        for k in range(len(item.steps))
    ]
