"""What looking at a network costs: capture, channel groups, and a cut that is proven."""

import copy
from collections.abc import Iterator
from functools import partial
from statistics import median
from time import perf_counter

import torch

from benchmarks.cell import Cell, Values, once, template
from benchmarks.networks import fresh, inputs
from gracile import capture, channel_groups
from gracile.graph.surgery import remove_edits, verified_apply

NAME = "capture"
NETWORKS = {
    "resnet56_cifar_a": ((3, 32, 32), "smoke"),
    "resnet50": ((3, 224, 224), "full"),
}
REPEATS = 3
STAGES = ("capture", "channel groups", "verified surgery")


def cells() -> Iterator[Cell]:
    """A cell for each network."""
    for network, (shape, tier) in NETWORKS.items():
        records = tuple(
            template(NAME, network, "seconds", "s", stage, batch=2, shape=(2, *shape))
            for stage in STAGES
        )
        yield Cell(NAME, network, tier, records, partial(measure, network))


def measure(network: str) -> Values:
    """Median of three, each from a model of its own; half of every group is cut."""
    x = inputs(NETWORKS[network][0], 2)
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        original = fresh(network)
        for _ in range(REPEATS):
            model = copy.deepcopy(original)
            start = perf_counter()
            graph = capture(model, x)
            times["capture"].append(perf_counter() - start)
            start = perf_counter()
            groups = channel_groups(model, graph)
            times["channel groups"].append(perf_counter() - start)
            free = [g for g in groups if g.protected is None]
            gone = {g.id: g.removable(range(len(g.units) // 2)) for g in free}
            edits = remove_edits(free, gone, by="benchmark")
            start = perf_counter()
            verified_apply(model, edits, examples=[x])
            times["verified surgery"].append(perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return {("seconds", stage): once(median(t), t) for stage, t in times.items()}
