"""What can be said of a network's speed before any training: obstacles, and where the work is."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gracile.analyze.cost import cost
from gracile.analyze.layers import LAYERS
from gracile.core.csv_text import csv_text
from gracile.core.state import write_atomic, write_json
from gracile.graph.dependency import ChannelGroup
from gracile.graph.graph import Graph, Node

FORMAT = 1
FLOAT = 4  # bytes
COLUMNS = (
    "layer", "op", "width", "share_of_macs", "macs", "bytes", "macs_per_byte", "padded",
    "can_be_cut", "integer",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing to know before starting.

    Attributes:
        code: short name.
        text: what, how much, and the way out.
        where: operators, tensors or groups.
    """

    code: str
    text: str
    where: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer, for one sample in float.

    Attributes:
        layer, op: id and operator.
        width: output channels.
        macs, share_of_macs: multiply-adds, and their share of the network's.
        bytes: of what it reads (weight included) and writes.
        padded: width rounded up to the period.
        can_be_cut: "yes", or why its outputs are protected.
        integer: "yes", or why it stays in float; "" if that is not known.
    """

    layer: str
    op: str
    width: int
    macs: int
    share_of_macs: float
    bytes: int
    padded: int
    can_be_cut: str
    integer: str = ""

    @property
    def macs_per_byte(self) -> float:
        """Arithmetic intensity."""
        return self.macs / self.bytes


@dataclass(frozen=True)
class Bound:
    """The largest speed-up that one way of compressing could bring.

    Attributes:
        what: "channels" or "integers".
        ratio: how many times faster, at most; infinite where nothing would be left.
        kind: "measured" in the runtime, or "arithmetic": from shares of multiply-adds.
        text: how it was found.
    """

    what: str
    ratio: float
    kind: str
    text: str


@dataclass(frozen=True)
class Preflight:
    """What `gracile preflight` found."""

    runtime: str
    findings: tuple[Finding, ...]
    layers: tuple[Layer, ...]
    bounds: tuple[Bound, ...]
    notes: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; an infinite ratio is null."""
        bounds = [
            {**asdict(b), "ratio": b.ratio if math.isfinite(b.ratio) else None} for b in self.bounds
        ]
        layers = [{**asdict(n), "macs_per_byte": n.macs_per_byte} for n in self.layers]
        return {"format": FORMAT, **asdict(self), "bounds": bounds, "layers": layers}

    def to_csv(self) -> str:
        """One line a layer under `COLUMNS`."""
        lines = (
            (n.layer, n.op, n.width, f"{n.share_of_macs:.6f}", n.macs, n.bytes,
             f"{n.macs_per_byte:.3f}", n.padded, n.can_be_cut, n.integer)
            for n in self.layers
        )  # fmt: skip
        return csv_text(COLUMNS, lines)

    def save(self, folder: Path) -> None:
        """Write `preflight.json` and `preflight.csv`."""
        write_json(folder / "preflight.json", self.to_dict())
        write_atomic(folder / "preflight.csv", self.to_csv().encode())


def layers_of(
    model: nn.Module,
    graph: Graph,
    groups: Iterable[ChannelGroup],
    *,
    period: int,
    integer: Callable[[str], str],
) -> list[Layer]:
    """Every convolution and linear layer, in the order they run.

    Args:
        model: the model the graph was captured from.
        graph: with shapes.
        groups: all channel groups.
        period: widths that are multiples of it fill the runtime's vectors.
        integer: id of an operator -> "yes", or why it stays in float.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    rows = cost(model, graph)
    whole = sum(r.macs for r in rows) or 1
    cuttable: dict[str, str] = {}
    for g in groups:
        for address in g.producers:
            if cuttable.get(address) != "yes":
                cuttable[address] = "yes" if g.protected is None else g.protected
    out = []
    for r in rows:
        if r.op not in LAYERS or r.weight not in named:
            continue
        node, weight = graph[r.id], named[r.weight]
        width = weight.shape[0]
        if r.op == "conv_transpose":
            width = weight.shape[1] * int(node.attrs.get("groups", 1))
        out.append(
            Layer(
                r.id, r.op, width, r.macs, r.macs / whole, _bytes(graph, node, weight),
                -(-width // period) * period, cuttable.get(r.weight, "in no group"), integer(r.id),
            )
        )  # fmt: skip
    return out


def dead_filters(model: nn.Module, graph: Graph) -> dict[str, list[int]]:
    """Layer -> its outputs that are the same whatever comes in.

    All weights of the filter are zero, or the scale of the BatchNorm that alone reads it.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    out = {}
    for node in graph.of_op("conv", "linear"):
        weight = named.get(node.params.get("weight", ""))
        if weight is None:
            continue
        dead = (weight.detach() == 0).flatten(1).all(1)
        readers = graph.consumers(node.id)
        if len(readers) == 1 and readers[0].op == "batch_norm":
            scale = named.get(readers[0].params.get("weight", ""))
            if scale is not None and len(scale) == len(dead):
                dead |= scale.detach() == 0
        if bool(dead.any()):
            out[node.id] = torch.nonzero(dead).flatten().tolist()
    return out


def found_in(
    layers: Sequence[Layer],
    groups: Sequence[ChannelGroup],
    dead: Mapping[str, Collection[int]],
    *,
    period: int,
    balance: float,
) -> list[Finding]:
    """Dead filters, widths off the period, layers bound by memory, protected groups, float layers.

    Args:
        layers: see `layers_of`.
        groups: all channel groups.
        dead: see `dead_filters`.
        period: see `layers_of`.
        balance: multiply-adds a byte below which a layer is bound by memory.
    """
    out = []
    if dead:
        n = sum(len(v) for v in dead.values())
        out.append(
            Finding(
                "dead-channels",
                f"{n} filters of {len(dead)} layers give the same output whatever they read: all "
                "weights, or the BatchNorm's scale, are zero. prune: keep_zeros and thin cut them "
                "at no cost.",
                tuple(dead),
            )
        )
    uneven = [n for n in layers if n.padded != n.width and n.can_be_cut == "yes"]
    if uneven:
        lost = sum(n.share_of_macs * (1 - n.width / n.padded) for n in uneven)
        out.append(
            Finding(
                "uneven-widths",
                f"{len(uneven)} layers have a width that is no multiple of {period}: up to "
                f"{100 * lost:.0f} % of the multiply-adds' time is spent on lanes that are empty. "
                f"Cut to multiples (multiple_of: {period}).",
                tuple(n.layer for n in uneven),
            )
        )
    bound = [n for n in layers if n.macs and n.macs_per_byte < balance]
    if bound:
        share = sum(n.share_of_macs for n in bound)
        out.append(
            Finding(
                "memory-bound",
                f"{len(bound)} layers with {100 * share:.1f} % of the multiply-adds make fewer "
                f"than {balance:g} of them for each byte they move: they wait for memory, and get "
                "faster by moving less (fewer channels on both sides, fewer bits), not by zeros.",
                tuple(n.layer for n in bound),
            )
        )
    held = [n for n in layers if n.can_be_cut != "yes"]
    if held:
        share = sum(n.share_of_macs for n in held)
        reasons = dict.fromkeys(n.can_be_cut for n in held)
        out.append(
            Finding(
                "protected",
                f"the outputs of {len(held)} layers with {100 * share:.1f} % of the multiply-adds "
                f"cannot be cut: {'; '.join([*reasons][:3])}. gracile groups names all groups.",
                tuple(n.layer for n in held),
            )
        )
    floats = [n for n in layers if n.integer not in ("", "yes")]
    if floats:
        share = sum(n.share_of_macs for n in floats)
        why = dict.fromkeys(n.integer for n in floats)
        out.append(
            Finding(
                "no-integer-kernel",
                f"{len(floats)} layers with {100 * share:.1f} % of the multiply-adds stay in "
                f"float: {'; '.join([*why][:3])}.",
                tuple(n.layer for n in floats),
            )
        )
    return out


def amdahl(share: float, factor: float = math.inf) -> float:
    """How many times faster all becomes if a share of it becomes `factor` times faster.

    >>> amdahl(0.5), amdahl(0.9, 4.0)
    (2.0, 3.0769230769230766)
    """
    left = 1 - share + share / factor
    return 1 / left if left > 0 else math.inf


def _bytes(graph: Graph, node: Node, weight: Tensor) -> int:
    """Bytes one sample moves through a layer."""
    batch = next((n.shape[0] for n in graph.of_op("input") if n.shape), 1)
    shapes = [graph[i].shape for i in node.inputs if graph[i].op != "param"]
    if not node.inputs:
        shapes = list(node.attrs.get("input_shapes", ()))
    moved = sum(math.prod(s) for s in (*shapes, node.shape) if s is not None)
    return FLOAT * (moved // batch + weight.numel())
