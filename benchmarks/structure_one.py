"""Prune half of every group of one architecture: `python -m benchmarks.structure_one NAME FILE`.

Runs in a process of its own, with a limit of memory, and writes what came out as JSON.
"""

import copy
import json
import random
import resource
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.structure_outcome import Outcome, count, count_protected
from benchmarks.structure_zoo import Example, architectures
from gracile.analyze.cost import totals
from gracile.errors import GracileError
from gracile.graph.capture import capture
from gracile.graph.dependency import ChannelGroup, channel_groups, follow
from gracile.graph.graph import Graph
from gracile.graph.oprule import rule_of_op
from gracile.graph.surgery import apply, remove_edits, verified_apply

MEMORY = 20 * 2**30  # of addresses, bytes
SHARE = 0.5
ALLOWED = 1e-6  # of the output's magnitude, in float64: only the order of sums differs


def main(name: str, file: Path) -> None:
    """Measure one architecture and write its Outcome."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")  # of the architectures' own packages
    torch.set_num_threads(1)
    torch.manual_seed(0)
    file.write_text(json.dumps(asdict(measure(name))), encoding="utf-8")


def measure(name: str) -> Outcome:
    """All parts of one architecture; what is in no part is protected."""
    total = Outcome()
    model, parts = architectures()[name].build()
    whole = sum(p.numel() for p in model.parameters())
    for part, module, example in parts:
        total.add(prune(module, example), part)
    if whole > total.params:
        total.protect("post-processing that is not traced", whole - total.params)
        total.protected += whole - total.params
    total.params_after += whole - total.params
    total.params = whole
    return total


def prune(model: nn.Module, example: Example) -> Outcome:
    """Half of the units of every group that can be cut, proven, and checked by itself."""
    out = Outcome(params=sum(p.numel() for p in model.parameters()))
    out.params_after = out.params
    try:
        start = perf_counter()
        graph = capture(model, example)
        out.capture_s = perf_counter() - start
        out.how = [graph.how if graph.reason is None else f"{graph.how} ({graph.reason})"]
        start = perf_counter()
        groups = channel_groups(model, graph)
        out.analysis_s = perf_counter() - start
        out.macs = out.macs_after = totals(model, graph).macs
        gone = chosen(groups)
        count(out, groups, gone)
        count_protected(out, model, graph, groups)
        if not gone:
            return out
        _cut(out, model, graph, example, groups, gone)
    except GracileError as e:
        out.status, out.text = "refused", str(e)
    except MemoryError as e:
        out.status, out.text = "error", f"memory: {e}"
    except Exception as e:
        out.status, out.text = "error", f"{type(e).__name__}: {str(e).strip()[:300]}"
    return out


def chosen(groups: Sequence[ChannelGroup]) -> dict[str, list[int]]:
    """Random halves of what can be cut; of groups on the same axes only the outer ones."""
    free = {g.id: g for g in groups if g.protected is None}
    rng = random.Random(0)
    gone = {}
    for g in free.values():
        if g.kind == "inner" and any(free[o].kind != "inner" for o in g.overlaps if o in free):
            continue
        n = len(g.units)
        if units := g.removable(rng.sample(range(n), max(1, round(SHARE * n)))):
            gone[g.id] = units
    return gone


def _cut(
    out: Outcome,
    model: nn.Module,
    graph: Graph,
    example: Example,
    groups: Sequence[ChannelGroup],
    gone: dict[str, list[int]],
) -> None:
    edits = remove_edits(groups, gone, by="half")
    twin = copy.deepcopy(model)
    seen = capture(twin, example)
    follow(twin, seen)
    start = perf_counter()
    apply(twin, edits, example=example, graph=seen)
    out.surgery_s = perf_counter() - start
    del twin, seen
    original = copy.deepcopy(model)
    start = perf_counter()
    smaller, report = verified_apply(model, edits, examples=[example], graph=graph)
    out.proof_s = max(0.0, perf_counter() - start - out.surgery_s)
    noted = follow(original, graph).flow.statistics
    statistics = bool(noted) or any(rule_of_op(node.op).statistic for node in graph)
    out.max_error = report.proof.max_error if report.proof is not None else 0.0
    out.params_after = report.params_after
    out.macs_after = totals(smaller, capture(smaller, example)).macs
    expected = _left(original, groups, gone)
    if expected != report.params_after:
        out.status, out.text = "wrong", f"{report.params_after} parameters instead of {expected}"
    elif (
        not statistics
        and (gap := _against_zeros(original, smaller, example, groups, gone)) > ALLOWED
    ):
        out.status, out.text = "wrong", f"differs by {gap:.1e} from zeros in the removed channels"


def _lost(
    groups: Sequence[ChannelGroup], gone: dict[str, list[int]]
) -> dict[tuple[str, int], set[int]]:
    lost: dict[tuple[str, int], set[int]] = {}
    for g in groups:
        for u in gone.get(g.id, ()):
            for s in g.units[u]:
                lost.setdefault((s.at, s.dim), set()).update(s.index)
    return lost


def _left(model: nn.Module, groups: Sequence[ChannelGroup], gone: dict[str, list[int]]) -> int:
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    for (at, dim), indices in _lost(groups, gone).items():
        if at in shapes:
            shapes[at][dim] -= len(indices)
    return sum(prod(shape) for shape in shapes.values())


@torch.no_grad()
def _against_zeros(
    original: nn.Module,
    smaller: nn.Module,
    example: Example,
    groups: Sequence[ChannelGroup],
    gone: dict[str, list[int]],
) -> float:
    """Largest difference of the outputs in eval mode, as a share of their magnitude."""
    parameters = dict(original.named_parameters())
    for (at, dim), indices in _lost(groups, gone).items():
        if at in parameters:
            parameters[at].index_fill_(dim, torch.tensor(sorted(indices)), 0)
    inputs = [x.double() if x.is_floating_point() else x for x in example]
    left = _tensors(original.double().eval()(*inputs))
    del original
    right = _tensors(copy.deepcopy(smaller).double().eval()(*inputs))
    gaps = [
        (a - b).abs().max() / a.abs().max().clamp(min=1e-12)
        if a.shape == b.shape
        else torch.tensor(torch.inf)
        for a, b in zip(left, right, strict=True)
    ]
    return max(float(g) for g in gaps)


def _tensors(output: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor)]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
