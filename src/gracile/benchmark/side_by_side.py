"""All that is measured of several artifacts: latency, layers, throughput, memory, size on disk.

They are kinds of Records of their own and none is worked out from another.
"""

from collections.abc import Mapping
from typing import Any

from gracile.benchmark.memory import peak_memory
from gracile.benchmark.operators import count_operators
from gracile.benchmark.runtimes.base import Loaded
from gracile.benchmark.throughput import measure_throughput
from gracile.benchmark.timing import compare, record_facts
from gracile.core.record import Record


def side_by_side(
    loaded: Mapping[str, Loaded],
    *,
    rounds: int = 9,
    batch: int | None = None,
    layers: bool = False,
    streams: int | None = None,
    memory: bool = False,
    reference: str | None = None,
    seed: int = 0,
) -> list[Record]:
    """Measure several artifacts, one thing after the other, each in interleaved rounds.

    Args:
        loaded: name -> loaded artifact; the first is what the others are compared with.
        rounds: at least 5.
        batch: images of an inference; None for each artifact's own.
        layers: also what each layer takes by the runtime's own counters, see `count_operators`.
        streams: also the throughput of so many at once, see `measure_throughput`; None: not.
        memory: also the peak of memory, in a process of its own for each, see `peak_memory`.
        reference: see `timing.compare`; it is timed and nothing else.
        seed: of the bootstraps.

    Returns:
        The Records of `timing.compare`, `artifact_bytes` (size on disk) of each, and what else was
        asked for; `peak_memory` and `added_memory` in bytes.

    Raises:
        UserError: as these functions.
    """
    out = compare(loaded, rounds=rounds, batch=batch, seed=seed, reference=reference)
    mine = {name: item for name, item in loaded.items() if name != reference}
    for name, item in mine.items():
        out += _sizes(item, name, batch or item.batch, seed, memory)
    if layers:
        out += count_operators(mine, rounds=rounds, batch=batch, seed=seed)
    if streams is not None:
        out += measure_throughput(mine, streams=streams, rounds=rounds, batch=batch, seed=seed)
    return out


def _sizes(item: Loaded, name: str, batch: int, seed: int, memory: bool) -> list[Record]:
    facts: dict[str, Any] = record_facts(item, name, batch, seed)
    out = [Record("artifact_bytes", float(item.size_bytes), "bytes", **facts)]
    if memory:
        found = peak_memory(
            item.artifact,
            threads=item.threads,
            hint=item.hint,
            batch=batch,
            device=item.device.partition(":")[2],
        )
        out += [
            Record("peak_memory", float(found.peak_bytes), "bytes", n=1, **facts),
            Record("added_memory", float(found.added_bytes), "bytes", n=1, **facts),
        ]
    return out
