"""Sensitivity analysis: accuracy with each weight pruned alone, or rounded alone.

The scan of Han et al. 2015, arXiv:1506.02626, section 3.1, and of Distiller's `--sense`. Each image
goes once through the network; from every tensor on, a branch for each of its levels.
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from gracile import registry
from gracile.analyze.layers import LAYERS
from gracile.analyze.sensitivity import KINDS, Sensitivity, begin, scan
from gracile.core.address import select
from gracile.core.groups import group_sums
from gracile.core.kinds import check_options
from gracile.core.state import sha256
from gracile.errors import BindError, UserError
from gracile.graph.agree import same
from gracile.graph.capture import capture
from gracile.graph.fold import FoldResult, fold_batchnorm, scale_channels
from gracile.graph.fork import Trial
from gracile.graph.graph import Graph, Node
from gracile.graph.inplace import write_in_place
from gracile.nn.rounding import fake_quantize
from gracile.prune.selection import finished, lowest, removed_count
from gracile.quantize.affine import qrange, symmetric_params
from gracile.train.bind import class_names
from gracile.train.evaluate import score

SHARES = tuple(k / 10 for k in range(1, 10))
BITS = (8, 7, 6, 5, 4, 3, 2)
MOST_BITS = 16
ALIVE = 4  # activations of the largest size that are there at once, about
MOST_IMAGES = 64
By = Literal["filter", "channel", "element", "bits"]


@dataclass(frozen=True)
class Target:
    """One weight that is scanned.

    Attributes:
        address: of the weight; bias: of its bias, None without.
        groups: group id of each entry; None where it is rounded.
        order: groups, the first to go first.
        axis: of the weight's output channels.
    """

    address: str
    bias: str | None
    groups: Tensor | None
    order: Tensor
    axis: int = 0

    def removed(self, level: float) -> int:
        """Groups that go at a level."""
        return removed_count(level, len(self.order)) if self.groups is not None else 0


def sensitivity(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    by: By = "filter",
    levels: Sequence[float] | None = None,
    tensors: str | Sequence[str] | None = None,
    criterion: str = "l1",
    memory_mib: int = 64,
    state: Path | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Accuracy and loss of a network with one weight at a time pruned, or rounded, at each level.

    A filter is a whole output channel: its weights, its bias and its share of the BatchNorm that is
    folded into the layer are zero, as if it were cut (Distiller left bias and shift there). A
    channel is an input of the layer, an element one weight. Bits round the weight to a symmetric
    grid with a scale for each output channel; activations stay as they are. The least important
    groups go, floor(level * groups) of them, at least one stays; ranked within the weight.

    The model is not changed: a copy with its BatchNorms folded is scanned, in eval mode. In a loop
    of your own, `session.present()` is the model as its masks make it.

    Args:
        model: that takes one tensor and gives logits (N, C).
        batches: images and labels, on the model's device; the same at each call if it is resumed.
        by: what goes: filter, channel, element; or bits.
        levels: shares in [0, 1), default 0.1 to 0.9; or bits from 2 to 16, default 8 to 2.
        tensors: selector of the weights, default those of all convolutions and linear layers.
        criterion: registered importance that asks for nothing but the weight.
        memory_mib: bound on the activations of what runs at once, roughly.
        state: a file for counts after each batch, None for none.
        resume: go on with the counts in `state`.
        identity: facts that must be the same to resume, beside the model and the options.
        advance: called after each of `batches`.

    Returns:
        The scan; `to_csv()`, `tolerated(max_drop)` and `save(folder)` are the ways on.

    Raises:
        UserError: an option out of its range, a forward that cannot be followed, no batches.
        BindError: the selector matches nothing.
        ResumeError: `state` is of another scan.

    Source:
        Han et al. 2015, arXiv:1506.02626, section 3.1; filters: Li et al. 2017, arXiv:1608.08710,
        section 3.2.
    """
    steps = _levels(by, levels)
    first, batches = _peeked(batches)
    graph = capture(model, first)
    if graph.module is None or graph.fixed_batch is not None:
        why = graph.reason or f"it runs for batches of {graph.fixed_batch} only"
        raise UserError(f"a sensitivity scan follows the forward, which cannot be done here: {why}")
    folded = fold_batchnorm(graph.module)
    targets, left_out = _targets(model, graph, folded, by, tensors, criterion)
    module, channels_last = _quickened(folded.module, first)
    workers = torch.get_num_threads() if first.device.type == "cpu" else 1
    rows, images = _sizes(graph, memory_mib, workers)
    facts = {
        "by": by,
        "levels": steps,
        "criterion": criterion,
        "tensors": [t.address for t in targets],
        "weights": _sha(model),
        "images at once": images,
        **(identity or {}),
    }
    sums = begin(facts, {"": 1, **{t.address: len(steps) for t in targets}}, state, resume=resume)
    named = dict(model.named_parameters(remove_duplicate=False))
    trials = {
        t.address: Trial(
            tuple(a for a in (t.address, t.bias) if a is not None),
            lambda t=t: _values(t, named[t.address].detach(), steps, folded, module),  # type: ignore[misc]
        )
        for t in targets
    }
    clock = _Clock()

    def done() -> None:
        sums.seconds += clock.lap()
        if state is not None:
            sums.save(state)

    modules = [copy.deepcopy(module) for _ in range(workers)]
    with _one_thread_each():
        scan(
            modules,
            _in_parts(batches, images, channels_last, advance),
            trials,
            _judged,
            sums,
            rows=rows,
            done=done,
        )
    return Sensitivity(
        by=by,
        criterion=None if by == "bits" else criterion,
        base=sums.row("", 0, 32.0 if by == "bits" else 0.0, 0, 0),
        rows=tuple(
            sums.row(
                t.address, k, level, t.removed(level), len(t.order) if t.groups is not None else 0
            )
            for t in targets
            for k, level in enumerate(steps)
        ),
        left_out=left_out,
        seconds=sums.seconds,
    )


def _levels(by: str, levels: Sequence[float] | None) -> list[float]:
    if by not in KINDS:
        raise UserError(f"by must be one of {', '.join(KINDS)}, got '{by}'.")
    if levels is None:
        return [float(v) for v in (BITS if by == "bits" else SHARES)]
    if not levels:
        raise UserError("levels must name at least one level.")
    for v in levels:
        if by == "bits" and not (v == int(v) and 2 <= v <= MOST_BITS):
            raise UserError(f"levels by bits must be whole numbers, 2 to {MOST_BITS}, got {v:g}.")
        if by != "bits" and not 0 <= v < 1:
            raise UserError(f"levels must be shares in [0, 1), got {v:g}. For 20 % write 0.2.")
    return list(dict.fromkeys(float(v) for v in levels))


def _peeked(
    batches: Iterable[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Iterable[tuple[Tensor, Tensor]]]:
    """Two images of the first batch, and all batches."""
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise UserError("a sensitivity scan needs at least one batch of images and labels.")
    two = torch.cat([first[0], first[0]])[:2]
    return two, chain([first], rest)


def _targets(
    model: nn.Module, graph: Graph, folded: FoldResult, by: By, tensors: Any, criterion: str
) -> tuple[list[Target], dict[str, str]]:
    nodes: dict[str, Node] = {}
    for n in graph.of_op(*LAYERS):
        if "weight" in n.params:
            nodes.setdefault(n.params["weight"], n)
    named = dict(model.named_parameters(remove_duplicate=False))
    there = set(dict(folded.module.named_parameters(remove_duplicate=False)))
    known = [a for a in nodes if a in named and a in there]
    if not known:
        raise BindError("the model has no convolution or linear layer that could be scanned.")
    chosen = known if tensors is None else select(tensors, known, class_names(model), what="weight")
    left_out, out = {}, []
    for address in chosen:
        weight, bias = named[address].detach(), _bias(nodes[address], address, there)
        axis = int(nodes[address].op == "conv_transpose")
        if by == "bits":
            out.append(Target(address, None, None, torch.empty(0), axis))
            continue
        why = _unfit(nodes[address], weight, by)
        if why is not None:
            left_out[address] = why
            continue
        groups: Tensor = registry.get("granularity", by).obj(tuple(weight.shape))
        sums = group_sums(_scores(criterion, weight), groups.to(weight.device)).cpu()
        after = registry.get("criterion", criterion).meta["after"]
        order = lowest(finished(sums, after), len(sums))
        out.append(Target(address, bias if by == "filter" else None, groups, order, axis))
    if not out:
        raise BindError(f"no weight can lose a {by}: {next(iter(left_out.values()))}.")
    return out, left_out


def _bias(node: Node, address: str, there: set[str]) -> str | None:
    """Address of the layer's bias in the folded network."""
    found = node.params.get("bias") or f"{address.rpartition('.')[0]}.bias".lstrip(".")
    return found if found in there else None


def _unfit(node: Node, weight: Tensor, by: str) -> str | None:
    """Why a weight has nothing of this kind to lose."""
    if by == "element":
        return None
    if node.op == "conv_transpose":
        return "filters and channels of transposed convolutions are not scanned"
    size = weight.shape[0 if by == "filter" else 1]
    return f"it has only one {by}" if size < 2 else None


def _scores(criterion: str, weight: Tensor) -> Tensor:
    entry = registry.get("criterion", criterion)
    check_options("criterion", criterion, {})
    if needs := entry.meta["needs"]:
        simple = [e.name for e in registry.entries("criterion") if not e.meta["needs"]]
        raise UserError(
            f"criterion '{criterion}' needs {', '.join(needs)}; a scan ranks by weights alone: "
            f"{', '.join(simple)}."
        )
    scores: Tensor = entry.obj(weight)
    return scores


def _values(
    target: Target,
    weight: Tensor,
    steps: Sequence[float],
    folded: FoldResult,
    module: fx.GraphModule,
) -> Iterator[Mapping[str, Tensor]]:
    """The weight, and its bias, at each level, as the folded network holds them."""
    factor = folded.scaled.get(target.address)
    for level in steps:
        if target.groups is None:
            changed, stays = rounded(weight, int(level)), None
        else:
            keep = torch.ones(len(target.order), dtype=torch.bool)
            keep[target.order[: target.removed(level)]] = False
            stays = keep.to(weight.device)
            changed = weight * stays[target.groups.to(weight.device)]
        if factor is not None:
            changed = scale_channels(changed.double(), factor, target.axis).to(weight.dtype)
        if changed.dim() == 4:
            changed = changed.contiguous(memory_format=_format_of(module, target.address))
        values = {target.address: changed}
        if target.bias is not None and stays is not None:
            values[target.bias] = folded.module.get_parameter(target.bias).detach() * stays
        yield values


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A weight on the symmetric grid of so many bits, a scale for each index of dim 0.

    >>> rounded(torch.tensor([[1.0, 0.3], [3.0, -1.2]]), 2)
    tensor([[1., 0.],
            [3., 0.]])
    """
    flat = weight.flatten(1)
    scale, zero = symmetric_params(flat.amin(1), flat.amax(1), bits, True, True)
    return fake_quantize(weight, scale, zero, *qrange(bits, True, True), 0)


def _format_of(module: nn.Module, address: str) -> torch.memory_format:
    held = module.get_parameter(address)
    last = held.is_contiguous(memory_format=torch.channels_last) and not held.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _quickened(module: fx.GraphModule, x: Tensor) -> tuple[fx.GraphModule, bool]:
    """What computes the same in less time, and whether it wants channels last in memory."""
    last = x.dim() == 4 and x.device.type == "cpu"
    quick = copy.deepcopy(module)
    write_in_place(quick)
    try:
        with torch.no_grad():
            expected = module(x)
            if last:
                quick.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                x = x.contiguous(memory_format=torch.channels_last)
            if same(expected, quick(x.clone())):
                return quick, last
    except RuntimeError:  # a view that needs the usual order, an addition of unequal shapes
        pass
    return module, False


def _sizes(graph: Graph, memory_mib: int, workers: int) -> tuple[int, int]:
    """Samples that run at once in each worker, and images of a part."""
    if memory_mib < 1:
        raise UserError(f"memory_mib must be at least 1, got {memory_mib}.")
    batch = next((n.shape[0] for n in graph.of_op("input") if n.shape), 1)
    largest = max((torch.Size(n.shape).numel() for n in graph if n.shape), default=1)
    a_sample = ALIVE * 4 * max(1, largest) // batch
    rows = max(1, (memory_mib << 20) // (max(1, a_sample) * workers))
    return rows, min(rows, MOST_IMAGES)


def _in_parts(
    batches: Iterable[tuple[Tensor, Tensor]],
    size: int,
    channels_last: bool,
    advance: Callable[[], None],
) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in batches:
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        yield from zip(x.split(size), y.split(size), strict=True)
        advance()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Networks side by side use the cores better than each operator on all of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _judged(logits: Tensor, labels: Tensor) -> tuple[int, int | None, float]:
    """Hits, hits among the first five (None below 6 classes), and the sum of the loss."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UserError("a sensitivity scan needs a model that gives logits (N, classes).")
    found = score(logits.float(), labels)
    five = None if found.top5 is None else round(found.top5 * found.n)
    return round(found.top1 * found.n), five, found.loss * found.n


def _sha(model: nn.Module) -> str:
    tensors = (t.detach().cpu().contiguous() for t in model.state_dict().values())
    return sha256("".join(sha256(t.view(-1).view(torch.uint8).numpy().tobytes()) for t in tensors))


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def lap(self) -> float:
        now = time.monotonic()
        took, self.last = now - self.last, now
        return took
