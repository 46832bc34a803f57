"""Measure latencies side by side: interleaved rounds, medians, confidence intervals, disturbance.

Rounds go A B A B ..., so that whatever slows the machine down slows all variants down alike. The
latency of a variant is the median of its rounds' medians: one stream, from inputs to outputs. What
its layers take is in `operators`, what a machine computes in a second in `throughput`.
"""

import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gracile.benchmark.processor import cpu_name
from gracile.benchmark.runtimes.base import Loaded
from gracile.core.record import Record
from gracile.errors import UserError

MIN_ROUNDS = 5
RESAMPLES = 2000
DRIFT = 0.10  # relative change between the first and the last rounds that is reported
MAX_RUNS = 2000


@dataclass
class Timings:
    """All times of one variant.

    Attributes:
        rounds: ms of every inference, one list a round.
        load: load average after each round.
        switches: involuntary context switches of the process during each round.
    """

    rounds: list[list[float]] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    switches: list[int] = field(default_factory=list)

    @property
    def medians(self) -> np.ndarray[Any, Any]:
        """Median of each round, ms."""
        return np.array([np.median(r) for r in self.rounds])


def compare(
    loaded: Mapping[str, Loaded],
    *,
    rounds: int = 7,
    batch: int | None = None,
    warmup: int = 5,
    min_round_ms: float = 50.0,
    seed: int = 0,
    reference: str | None = None,
) -> list[Record]:
    """Time several artifacts side by side.

    Args:
        loaded: name -> loaded artifact; the first is the baseline of the speed-ups. All must have
            the same precision hint and number of threads.
        rounds: interleaved rounds, at least 5.
        batch: batch size; None for each artifact's own.
        warmup: inferences of each before the first round, not counted.
        min_round_ms: a round repeats the inference until it takes at least this long.
        seed: of the bootstrap.
        reference: name of one that is timed with the others and not compared with the first: a
            network that stays the same, so that times of another day can be set against these.

    Returns:
        For each name the Records `latency_ms` (median of the rounds' medians; n, p95 and iqr over
        all inferences, ci95 of the median), `drift` (1 if the last rounds differ by more than 10 %
        from the first, else 0) and `involuntary_switches`; for each but the first `speedup`, how
        many times faster than the first it is, with the 95 % bootstrap interval of the ratio; with
        a reference, for each other `relative_latency`, how many times the reference's time it
        takes. ``subject["model"]`` is the name.

    Raises:
        UserError: fewer than 5 rounds, nothing to time, or settings that differ.
    """
    check_fair(loaded, rounds, warmup, min_round_ms)
    if reference is not None and (reference not in loaded or len(loaded) < 2):
        raise UserError(f"the reference '{reference}' must be one of several that are timed.")
    sizes = {name: batch or item.batch for name, item in loaded.items()}
    timings = measure(loaded, sizes, rounds=rounds, warmup=warmup, min_round_ms=min_round_ms)
    base = next(name for name in loaded if name != reference)
    records: list[Record] = []
    for name, item in loaded.items():
        facts = record_facts(item, name, sizes[name], seed)
        records += _records(timings[name], facts, seed)
        mine = timings[name]
        if name not in (base, reference):
            records.append(_ratio("speedup", timings[base], mine, against(facts, base), seed))
        if reference is not None and name != reference:
            pair = against(facts, reference, "reference")
            pair["subject"]["reference_sha"] = loaded[reference].artifact.sha
            records.append(_ratio("relative_latency", mine, timings[reference], pair, seed))
    return records


def measure(
    loaded: Mapping[str, Loaded],
    sizes: Mapping[str, int],
    *,
    rounds: int,
    warmup: int,
    min_round_ms: float,
) -> dict[str, Timings]:
    """The raw times of interleaved rounds; see `compare`."""
    runs: dict[str, int] = {}
    for name, item in loaded.items():
        item.time(max(1, warmup), sizes[name])
        probe = float(np.median(item.time(3, sizes[name])))
        runs[name] = int(np.clip(np.ceil(min_round_ms / max(probe, 1e-4)), 3, MAX_RUNS))
    out = {name: Timings() for name in loaded}
    for _ in range(rounds):
        for name, item in loaded.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            out[name].rounds.append(item.time(runs[name], sizes[name]))
            after = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            out[name].switches.append(after - before)
            out[name].load.append(os.getloadavg()[0])
    return out


def ratio_interval(
    base: np.ndarray[Any, Any], other: np.ndarray[Any, Any], seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of median(base) / median(other).

    Rounds are drawn in pairs, as they were measured: a slow moment of the machine is in both.

    Args:
        base, other: one median a round, ms; same length.
        seed: of the resampling.

    >>> ratio_interval(np.full(7, 2.0), np.full(7, 1.0))
    (2.0, 2.0)
    """
    draw = np.random.default_rng(seed).integers(0, len(base), (RESAMPLES, len(base)))
    ratios = np.median(base[draw], axis=1) / np.median(other[draw], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def median_interval(rounds: np.ndarray[Any, Any], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the median of the rounds' medians."""
    draw = np.random.default_rng(seed).integers(0, len(rounds), (RESAMPLES, len(rounds)))
    low, high = np.quantile(np.median(rounds[draw], axis=1), [0.025, 0.975])
    return float(low), float(high)


def drifted(medians: np.ndarray[Any, Any]) -> bool:
    """Whether the last third of the rounds differs from the first by more than 10 %."""
    third = max(1, len(medians) // 3)
    first, last = np.median(medians[:third]), np.median(medians[-third:])
    return bool(abs(last / first - 1) > DRIFT)


def check_fair(
    loaded: Mapping[str, Loaded], rounds: int, warmup: int = 0, min_round_ms: float = 1.0
) -> None:
    """Refuse comparisons that prove nothing.

    Raises:
        UserError: fewer than 5 rounds, nothing to time, or settings that differ.
    """
    if not loaded:
        raise UserError("there is nothing to time.")
    if rounds < MIN_ROUNDS:
        raise UserError(f"rounds must be at least {MIN_ROUNDS} to give an interval, got {rounds}.")
    if warmup < 0 or min_round_ms <= 0:
        raise UserError(
            f"warmup must be >= 0 and min_round_ms > 0, got {warmup} and {min_round_ms}."
        )
    for what in ("hint", "threads"):
        values = {name: getattr(item, what) for name, item in loaded.items()}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{name}: {value}" for name, value in values.items())
            raise UserError(f"a fair comparison needs the same {what} for all ({shown}).")


def record_facts(item: Loaded, name: str, batch: int, seed: int) -> dict[str, Any]:
    """What a Record of a loaded artifact says besides its value."""
    shapes = item.artifact.inputs
    return {
        "seed": seed,
        "subject": {"model": name, "artifact_sha": item.artifact.sha},
        "runtime": item.name,
        "runtime_version": item.version,
        "precision_hint": item.hint,
        "threads": item.threads,
        "batch": batch,
        "shape": (batch, *shapes[0][1][1:]) if shapes else None,
        "device": item.device,
        "versions": {"cpu": cpu_name(), item.name: item.version},
    }


def against(facts: Mapping[str, Any], other: str, role: str = "baseline") -> dict[str, Any]:
    """The facts of a Record that compares with another network."""
    return {**facts, "subject": {**facts["subject"], role: other}}


def of_rounds(metric: str, rounds: Sequence[Any], facts: Mapping[str, Any], seed: int) -> Record:
    """A Record in ms: the median of the rounds' medians, its interval, and the spread of all.

    Args:
        rounds: the times of each round, ms.
    """
    medians = np.array([np.median(r) for r in rounds])
    every = np.concatenate([np.asarray(r) for r in rounds])
    low, high = np.quantile(every, [0.25, 0.75])
    return Record(
        metric,
        float(np.median(medians)),
        "ms",
        n=len(every),
        median=float(np.median(every)),
        p95=float(np.quantile(every, 0.95)),
        iqr=float(high - low),
        ci95=median_interval(medians, seed),
        **facts,
    )


def _records(t: Timings, facts: dict[str, Any], seed: int) -> list[Record]:
    every = {**facts, "load_avg": float(np.mean(t.load))}
    common = {**every, "n": sum(len(r) for r in t.rounds)}
    return [
        of_rounds("latency_ms", t.rounds, every, seed),
        Record("drift", float(drifted(t.medians)), "flag", **common),
        Record("involuntary_switches", float(sum(t.switches)), "count", **common),
    ]


def _ratio(metric: str, a: Timings, b: Timings, facts: dict[str, Any], seed: int) -> Record:
    load = float(np.mean(a.load + b.load))
    return ratio_record(metric, a.medians, b.medians, {**facts, "load_avg": load}, seed)


def ratio_record(
    metric: str,
    a: np.ndarray[Any, Any],
    b: np.ndarray[Any, Any],
    facts: Mapping[str, Any],
    seed: int,
) -> Record:
    """A Record of median(a) / median(b), one value a round in each, with its 95 % interval."""
    ratio = float(np.median(a) / np.median(b))
    return Record(metric, ratio, "ratio", n=len(a), ci95=ratio_interval(a, b, seed), **facts)
