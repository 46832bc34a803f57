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
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.structure_zoo import Example, architectures
from gracile.analyze.cost import totals
from gracile.errors import GracileError
from gracile.graph.capture import capture
from gracile.graph.dependency import ChannelGroup, channel_groups
from gracile.graph.oprule import rule_of_op
from gracile.graph.surgery import apply, remove_edits, verified_apply

MEMORY = 20 * 2**30  # of addresses, bytes
SHARE = 0.5
OUTPUT = "output of the model"
ALLOWED = 1e-6  # of the output's magnitude, in float64: only the order of sums differs


@dataclass
class Outcome:
    """What came out for one part, or summed over all parts of an architecture.

    Attributes:
        status: ok; refused (the proof did not hold, nothing was cut); wrong (proven, and yet it
            computes something else than zeros do); or an error.
        reasons: why parameters cannot be cut -> how many, in elements.
        written, written_gone: channels that weights make (outputs of the model left out).
        heads, heads_gone: units of `outer` groups; widths: of `inner` ones.
        max_error: largest difference of masked and sliced model, as a share of the magnitude.
    """

    status: str = "ok"
    text: str = ""
    how: list[str] = field(default_factory=list)
    groups: int = 0
    free: int = 0
    written: int = 0
    written_gone: int = 0
    heads: int = 0
    heads_gone: int = 0
    widths: int = 0
    widths_gone: int = 0
    macs: int = 0
    macs_after: int = 0
    params: int = 0
    params_after: int = 0
    protected: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    capture_s: float = 0.0
    analysis_s: float = 0.0
    surgery_s: float = 0.0
    proof_s: float = 0.0
    max_error: float = 0.0

    def protect(self, why: str, params: int) -> None:
        """Count parameters that cannot be cut."""
        self.reasons[why] = self.reasons.get(why, 0) + params

    def add(self, other: "Outcome", part: str) -> None:
        """Sum up; the worst status and the largest error stay."""
        if other.status != "ok":
            self.status, self.text = other.status, f"{part}: {other.text}"
        self.max_error = max(self.max_error, other.max_error)
        self.how += other.how
        for why, n in other.reasons.items():
            self.protect(why, n)
        for name in SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))


SUMMED = (
    "groups", "free", "written", "written_gone", "heads", "heads_gone", "widths", "widths_gone",
    "macs", "macs_after", "params", "params_after", "protected", "capture_s", "analysis_s",
    "surgery_s", "proof_s",
)  # fmt: skip


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
        _count(out, model, groups, gone)
        if not gone:
            return out
        statistics = any(rule_of_op(node.op).statistic for node in graph)
        del graph
        _cut(out, model, example, groups, gone, statistics)
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
        if g.kind == "inner" and any(free[o].kind == "outer" for o in g.overlaps if o in free):
            continue
        n = len(g.units)
        if units := g.removable(rng.sample(range(n), max(1, int(SHARE * n)))):
            gone[g.id] = units
    return gone


def _count(
    out: Outcome, model: nn.Module, groups: Sequence[ChannelGroup], gone: dict[str, list[int]]
) -> None:
    out.groups, out.free = len(groups), sum(g.protected is None for g in groups)
    axes: dict[tuple[str, int], set[int]] = {}
    outputs: set[tuple[str, int]] = set()
    for g in groups:
        units = gone.get(g.id, [])
        if g.kind == "outer":
            out.heads, out.heads_gone = out.heads + len(g.units), out.heads_gone + len(units)
        elif g.kind == "inner":
            out.widths, out.widths_gone = out.widths + len(g.units), out.widths_gone + len(units)
        for axis in g.writes.items():
            axes.setdefault(axis, set()).update(
                i for u in units for s in g.units[u] if (s.at, s.dim) == axis for i in s.index
            )
            if OUTPUT in (g.protected or ""):
                outputs.add(axis)
    sizes = {axis: size for g in groups for axis, size in g.sizes.items()}
    out.written = sum(sizes[axis] for axis in axes if axis not in outputs)
    out.written_gone = sum(len(lost) for axis, lost in axes.items() if axis not in outputs)
    _count_protected(out, model, groups)


def _count_protected(out: Outcome, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """Parameters of which no dim can be cut, by reason."""
    free = {s.at for g in groups if g.protected is None for unit in g.units for s in unit}
    reasons: dict[str, str] = {}
    for g in groups:
        if g.protected is not None:
            for at, _ in g.sizes:
                reasons.setdefault(at, g.protected.split(" ('")[0])
    for name, p in model.named_parameters():
        if name not in free:
            out.protected += p.numel()
            out.protect(reasons.get(name, "in no group of channels"), p.numel())


def _cut(
    out: Outcome,
    model: nn.Module,
    example: Example,
    groups: Sequence[ChannelGroup],
    gone: dict[str, list[int]],
    statistics: bool,
) -> None:
    edits = remove_edits(groups, gone, by="half")
    twin = copy.deepcopy(model)
    start = perf_counter()
    apply(twin, edits, example=example)
    out.surgery_s = perf_counter() - start
    del twin
    original = copy.deepcopy(model)
    start = perf_counter()
    smaller, report = verified_apply(model, edits, examples=[example])
    out.proof_s = perf_counter() - start - out.surgery_s
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
