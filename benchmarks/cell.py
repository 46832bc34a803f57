"""A cell: what is measured at one go, known by its Records before anything runs.

A Record's id hashes what is measured and with which versions on which device, not what comes out.
So a cell lists its Records with empty values first; those whose ids are in the log need not be
measured again, and a run that was killed goes on with the cell it was in.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from gracile.benchmark.processor import cpu_name
from gracile.benchmark.timing import (
    Timings,
    median_interval,
    ratio_interval,
)
from gracile.benchmark.timing import measure as measure_rounds
from gracile.core.record import Record, RecordLog
from gracile.core.state import environment

ROUNDS = 9
MANY_ROUNDS = 101  # where 7 % matter: nine rounds on a virtual machine leave as much
PACKAGES = {"litert": "ai-edge-litert", "pytorch": "torch"}  # whose names are not the runtimes'
version = lru_cache(metadata.version)  # reading it anew for each Record takes seconds
conditions = lru_cache(lambda: (cpu_name(), environment()))
Key = tuple[str, str]  # (metric, variant)
Values = Mapping[Key, Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """Things measured together, interleaved, so that they can be compared.

    Attributes:
        benchmark: the file in `results/` it belongs to.
        name: of the cell, unique in the benchmark.
        tier: "smoke" or "full".
        records: what it will measure, values nan.
        measure: does it; returns (metric, variant) -> value fields, one for each of `records`.
        notes: what `measure` has to say beyond numbers; stored beside the Records.
        anywhere: Records from another machine will do; for what takes hours, on any machine, and
            is about accuracy.
    """

    benchmark: str
    name: str
    tier: str
    records: tuple[Record, ...]
    measure: Callable[[], Values]
    notes: dict[str, Any] = field(default_factory=dict)
    anywhere: bool = False

    def done(self, log: RecordLog) -> bool:
        """Whether every Record is in the log."""
        there = {self._place(r).id for r in log}
        return all(self._place(r).id in there for r in self.records)

    def _place(self, r: Record) -> Record:
        return replace(r, device=None) if self.anywhere else r

    def run(self) -> list[Record]:
        """Measure; the Records with their values.

        Raises:
            RuntimeError: the measurement gave other Records than announced.
        """
        found = dict(self.measure())
        wanted = {(r.metric, r.subject["variant"]): r for r in self.records}
        if set(found) != set(wanted):
            raise RuntimeError(
                f"{self.benchmark}/{self.name} announced {sorted(wanted)} and measured "
                f"{sorted(found)}."
            )
        load = os.getloadavg()[0]
        return [wanted[key].about(**{"load_avg": load, **value}) for key, value in found.items()]


def template(
    benchmark: str,
    cell: str,
    metric: str,
    unit: str,
    variant: str,
    *,
    peers: Sequence[str] = (),
    **facts: Any,
) -> Record:
    """An empty Record with what all have in common: device, threads and versions.

    `peers` are further packages that are measured, whose versions count.
    """
    runtime = facts.get("runtime", "pytorch")
    versions = {name: version(name) for name in ("gracile", "torch")}
    if runtime != "pytorch":
        versions["onnx"] = version("onnx")
        versions[runtime] = version(PACKAGES.get(runtime, runtime))
    versions |= {name: version(name) for name in peers if installed(name)}
    cpu, known = conditions()
    return Record(
        metric,
        math.nan,
        unit,
        subject={"benchmark": benchmark, "cell": cell, "variant": variant},
        device=f"{cpu} ({known['cpu']})",
        **{
            "runtime": runtime,
            "runtime_version": version(PACKAGES.get(runtime, runtime)),
            "threads": 1,
            "seed": 0,
            **facts,
            "versions": {**versions, "python": known["python"]},
        },
    )


def installed(package: str) -> bool:
    """Whether a package is there; the page of results is written without the peers, too."""
    return find_spec(package) is not None


class Step:
    """A function to time, in the shape `gracile.benchmark.timing` measures."""

    def __init__(self, fn: Callable[[], Any]):
        self.fn = fn

    def time(self, n: int, batch: int | None = None) -> list[float]:
        """Milliseconds of each of n calls."""
        from time import perf_counter

        out = []
        for _ in range(n):
            start = perf_counter()
            self.fn()
            out.append(1e3 * (perf_counter() - start))
        return out


def side_by_side(
    steps: Mapping[str, Callable[[], Any]], *, rounds: int = ROUNDS, min_round_ms: float = 30.0
) -> dict[str, Timings]:
    """Time functions in interleaved rounds, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        loaded: Any = {name: Step(fn) for name, fn in steps.items()}
        return measure_rounds(
            loaded, dict.fromkeys(steps, 1), rounds=rounds, warmup=2, min_round_ms=min_round_ms
        )
    finally:
        torch.set_num_threads(before)


def latency(t: Timings) -> dict[str, Any]:
    """Value fields of a time: the median of the rounds' medians, ms."""
    every = np.concatenate([np.asarray(r) for r in t.rounds])
    low, high = np.quantile(every, [0.25, 0.75])
    return {
        "value": float(np.median(t.medians)),
        "n": len(every),
        "median": float(np.median(every)),
        "p95": float(np.quantile(every, 0.95)),
        "iqr": float(high - low),
        "ci95": median_interval(t.medians),
        "load_avg": float(np.mean(t.load)),
    }


def ratio(numerator: Timings, denominator: Timings) -> dict[str, Any]:
    """Value fields of a ratio of two times, with the bootstrap interval over paired rounds."""
    return {
        "value": float(np.median(numerator.medians) / np.median(denominator.medians)),
        "n": len(numerator.rounds),
        "ci95": ratio_interval(numerator.medians, denominator.medians),
        "load_avg": float(np.mean([*numerator.load, *denominator.load])),
    }


def value_fields(record: Record) -> dict[str, Any]:
    """What a Record of `gracile.benchmark` measured, without what it measured."""
    return {
        k: getattr(record, k) for k in ("value", "n", "median", "p95", "iqr", "ci95", "load_avg")
    }


def once(value: float, times: Sequence[float] = ()) -> dict[str, Any]:
    """Value fields of a plain number, or of the median of a few repetitions."""
    if not times:
        return {"value": float(value)}
    low, high = np.quantile(times, [0.25, 0.75])
    return {
        "value": float(value),
        "n": len(times),
        "median": float(np.median(times)),
        "iqr": float(high - low),
    }
