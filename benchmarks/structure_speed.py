"""How long it takes to halve ResNet-50: graph, groups and cut, beside Torch-Pruning.

The choice of channels is random in both and not what is measured. Every round cuts a fresh copy
with each tool in turn; copies are made outside the time.
"""

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from benchmarks.cell import Cell, Values, once, template
from gracile.errors import UserError
from gracile.graph.capture import capture
from gracile.graph.dependency import channel_groups
from gracile.graph.graph import Graph
from gracile.graph.surgery import apply, remove_edits, verified_apply

NAME = "structure_speed"
NETWORK = "resnet50"
SHAPE = (1, 3, 224, 224)
ROUNDS = 5
PEER = "torch-pruning"
NEEDS: Mapping[str, str] = {"torchvision": "torchvision", "torch_pruning": PEER}
PLAIN, VERIFIED = "gracile", "gracile, verified"
VARIANTS = (PEER, PLAIN, VERIFIED)


def cells() -> Iterator[Cell]:
    """One cell: all three in turn."""
    records = [
        template(NAME, NETWORK, metric, unit, variant, batch=1, shape=SHAPE)
        for variant in VARIANTS
        for metric, unit in (("seconds", "s"), ("params_after", "count"))
    ]
    records += [
        template(NAME, NETWORK, "ratio", "ratio", variant, batch=1, shape=SHAPE)
        for variant in VARIANTS
        if variant != PEER
    ]
    yield Cell(NAME, NETWORK, "full", tuple(records), measure)


def measure() -> Values:
    """Five interleaved rounds after one that is thrown away, on one thread.

    Raises:
        UserError: torchvision or torch-pruning is not installed.
    """
    for module, package in NEEDS.items():
        if find_spec(module) is None:
            raise UserError(f"{NAME} needs {package}: make bench-peers")
    from benchmarks.torchvision_shim import torchvision

    torch.manual_seed(0)
    model = torchvision().models.resnet50(weights=None)
    example = torch.randn(SHAPE)
    ways = {PEER: by_torch_pruning, PLAIN: by_gracile, VERIFIED: by_gracile_verified}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times, params = in_turn(model, example, ways)
    finally:
        torch.set_num_threads(before)
    base = median(times[PEER])
    return {
        **{("seconds", v): once(median(t), t) for v, t in times.items()},
        **{("params_after", v): once(n) for v, n in params.items()},
        **{("ratio", v): once(median(times[v]) / base) for v in VARIANTS if v != PEER},
    }


Way = Callable[[nn.Module, Tensor], nn.Module]


def in_turn(
    model: nn.Module, example: Tensor, ways: dict[str, Way], rounds: int = ROUNDS
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each round of each way, and the parameters it leaves."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    params = {}
    for k in range(rounds + 1):
        for name, way in ways.items():
            fresh = copy.deepcopy(model)
            start = perf_counter()
            smaller = way(fresh, example)
            seconds = perf_counter() - start
            if k > 0:
                times[name].append(seconds)
            params[name] = sum(p.numel() for p in smaller.parameters())
            smaller.eval()(example)  # outside the time: it must still run
    return times, params


def by_torch_pruning(model: nn.Module, example: Tensor) -> nn.Module:
    """Its dependency graph and its pruner, every layer by half, the classes kept."""
    import torch_pruning as tp

    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=[model.fc],
    )
    pruner.step()
    return model


def by_gracile(model: nn.Module, example: Tensor) -> nn.Module:
    """Capture, groups, random halves, cut."""
    graph = capture(model, example, check=False)
    return apply(model, _halves(model, graph), example=example, graph=graph)


def by_gracile_verified(model: nn.Module, example: Tensor) -> nn.Module:
    """The same with the proof."""
    graph = capture(model, example)
    return verified_apply(model, _halves(model, graph), examples=[example], graph=graph)[0]


def _halves(model: nn.Module, graph: Graph) -> list:
    groups = channel_groups(model, graph)
    rng = random.Random(0)
    gone = {}
    for g in groups:
        if g.protected is None:
            n = len(g.units)
            gone[g.id] = g.removable(rng.sample(range(n), n // 2))
    return remove_edits(groups, gone, by="half")
