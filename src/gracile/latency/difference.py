"""What a unit costs: the time of a small network with it, less that of the same network without.

Alone, a layer would pay for the call, for reading its input from the caller's layout and for
writing its output in it. In a difference these cancel. Rounds of all networks are interleaved, and
what counts is a low quantile over them: other programs can make an inference only slower. On one
thread the clock is that of the process, which stands still while another program has the core.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time, time
from typing import Any

import numpy as np

from gracile.errors import UserError

Step = Callable[[], Any]
ROUNDS = 14
ROUND_MS = 1.5  # of one network in one round
LOW = 0.05  # the quantile over rounds
TOGETHER = 150  # units whose rounds are interleaved, so that they span a while


@dataclass(frozen=True)
class Pair:
    """Two networks that differ in `copies` times the unit, and how many threads compute them."""

    whole: Step
    alone: Step
    copies: int = 1
    threads: int = 1


@dataclass(frozen=True)
class Point:
    """A measured time.

    Attributes:
        ms: of the unit.
        noise_ms: how far it may be off: the spread of the undisturbed half of the rounds.
        rounds: of both networks.
        time: when, seconds since 1970.
    """

    ms: float
    noise_ms: float
    rounds: int
    time: float


def differences(pairs: Sequence[Pair], *, rounds: int = ROUNDS) -> list[Point]:
    """Measure units side by side.

    Args:
        pairs: their networks.
        rounds: of each; the more, the likelier that some are undisturbed.

    Returns:
        One point a pair; never less than 0 ms.
    """
    threads = max((p.threads for p in pairs), default=1)
    steps = [step for p in pairs for step in (p.whole, p.alone)]
    best = quickest(steps, rounds=rounds, threads=threads)
    out = []
    for k, pair in enumerate(pairs):
        whole, alone = best[2 * k], best[2 * k + 1]
        ms = (low(whole) - low(alone)) / pair.copies
        noise = np.hypot(spread(whole), spread(alone)) / pair.copies
        out.append(Point(max(0.0, ms), float(noise), rounds, time()))
    return out


def quickest(
    steps: Sequence[Step],
    *,
    rounds: int = ROUNDS,
    round_ms: float = ROUND_MS,
    threads: int = 1,
) -> list[np.ndarray[Any, Any]]:
    """The fastest inference of each round, ms, for each network; rounds go over all of them."""
    clock = process_time if threads == 1 else perf_counter
    runs = []
    for step in steps:
        step()
        probe = min(once(step, clock) for _ in range(3))
        runs.append(int(np.clip(np.ceil(round_ms / max(probe, 1e-4)), 3, 60)))
    best: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for k, step in enumerate(steps):
            step()  # the first after another network finds cold caches
            best[k].append(min(once(step, clock) for _ in range(runs[k])))
    return [np.array(b) for b in best]


def once(step: Step, clock: Callable[[], float] = perf_counter) -> float:
    """Milliseconds of one call."""
    start = clock()
    step()
    return (clock() - start) * 1e3


def low(rounds: np.ndarray[Any, Any]) -> float:
    """The undisturbed time: a low quantile over rounds.

    >>> low(np.array([1.0, 1.0, 1.0, 5.0, 9.0]))
    1.0
    """
    return float(np.quantile(rounds, LOW))


def spread(rounds: np.ndarray[Any, Any]) -> float:
    """From the fastest to the median of the faster half of the rounds, ms.

    >>> spread(np.array([1.0, 1.5, 2.0, 7.0, 8.0, 9.0]))
    0.5
    """
    half = np.sort(rounds)[: max(1, len(rounds) // 2)]
    return float(np.median(half) - half[0])


def in_batches(
    units: Sequence[Any],
    build: Callable[[Any], Pair],
    *,
    rounds: int = ROUNDS,
    refused: dict[Any, str] | None = None,
    told: Callable[[int, int], None] = lambda done, of: None,
    size: Callable[[Any], float] = lambda unit: 0.0,
) -> Mapping[Any, Point]:
    """Measure many units, as many at a time as memory holds.

    Args:
        units: what to measure.
        build: makes the networks of one; raises UserError where it cannot.
        refused: takes those that cannot be built, and why.
        told: called with how many are done, and of how many.
        size: of the networks of one, as a share of the memory.
    """
    found: dict[Any, Point] = {}
    done = 0
    while done < len(units):
        batch, filled = [units[done]], size(units[done])
        for unit in units[done + 1 : done + TOGETHER]:
            filled += size(unit)
            if filled > 1:
                break
            batch.append(unit)
        pairs = {}
        for unit in batch:
            try:
                pairs[unit] = build(unit)
            except UserError as e:
                if refused is None:
                    raise
                refused[unit] = str(e)
        found |= zip(pairs, differences(list(pairs.values()), rounds=rounds), strict=True)
        done += len(batch)
        told(done, len(units))
    return found
