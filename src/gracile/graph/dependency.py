"""Which channels can be cut, and what must go with each: the groups of a captured graph."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gracile.graph.graph import Graph, Node
from gracile.graph.labels import Axis, Fixed, Flow, Labels, Shape, Value, unlabelled
from gracile.graph.oprule import rule_of_module, rule_of_op
from gracile.graph.ops.select import shuffled
from gracile.graph.shuffle import shuffles


class Slice(NamedTuple):
    """Indices of one unit in one tensor (or channel map)."""

    at: str
    dim: int
    index: tuple[int, ...]  # type: ignore[assignment]


class Units(Sequence[tuple[Slice, ...]]):
    """The units of a group, made from the unit number of each index when they are first asked for.

    Args:
        size: number of units.
        layout: axis -> the unit each of its indices belongs to, -1 for none of this group.
    """

    def __init__(self, size: int, layout: Mapping[Axis, Labels]):
        self.size, self.layout = size, dict(layout)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: Any) -> Any:
        """The slices of a unit."""
        return self._all[key]

    @cached_property
    def _all(self) -> tuple[tuple[Slice, ...], ...]:
        out: list[list[Slice]] = [[] for _ in range(self.size)]
        for (at, dim), layout in self.layout.items():
            order = np.argsort(layout, kind="stable")
            numbers, starts = np.unique(layout[order], return_index=True)
            for u, part in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
                if u >= 0:
                    out[u].append(Slice(at, dim, tuple(part.tolist())))
        return tuple(tuple(slices) for slices in out)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are made together: a residual stream, or one layer's output.

    Attributes:
        id: address of the first producer's weight, `layer1.0.conv1.weight`; with `:outer` or
            `:inner` where the channels are (heads, width) or (groups, channels of a group).
        units: unit u is everything that must go together; removing any subset of the units leaves
            a valid network, as long as no tensor loses its last index (`surgery.remove_edits`
            checks).
        producers: addresses of the weights that write these channels.
        consumers: addresses of the weights that read them.
        protected: why it must not be cut, or None.
        sizes: (address, dim) -> number of indices, for every tensor in `units`.
        writes: producer -> the dim of its output channels: 0, but 1 for a transposed convolution.
        kind: "channels"; "outer": whole heads or groups; "inner": the width within each.
        overlaps: ids of the groups whose units lie on the same indices (outer and inner).
    """

    id: str
    units: Sequence[tuple[Slice, ...]]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    protected: str | None
    sizes: Mapping[tuple[str, int], int] = field(default_factory=dict)
    writes: Mapping[str, int] = field(default_factory=dict)
    kind: str = "channels"
    overlaps: tuple[str, ...] = ()

    @cached_property
    def layout(self) -> Mapping[Axis, Labels]:
        """Axis -> the unit each of its indices belongs to, -1 for none of this group."""
        if isinstance(self.units, Units):
            return self.units.layout
        out = {axis: np.full(n, -1, dtype=np.int64) for axis, n in self.sizes.items()}
        for u, unit in enumerate(self.units):
            for s in unit:
                out[s.at, s.dim][list(s.index)] = u
        return out

    def written(self, unit: int) -> tuple[Slice, ...]:
        """The slices of the producers' weights that make this unit: its filters."""
        return tuple(s for s in self.units[unit] if self.writes.get(s.at) == s.dim)

    def removable(self, order: Iterable[int]) -> list[int]:
        """Those of these units, taken in order, that can go together.

        A unit that would take the last index of some tensor is left out: where a narrow layer feeds
        a wide stream (a padding shortcut, a concatenation), one of its channels must stay.
        """
        return removable_together([self], {self.id: order}).get(self.id, [])


def removable_together(
    groups: Sequence[ChannelGroup], wanted: Mapping[str, Iterable[int]]
) -> dict[str, list[int]]:
    """Of these units of several groups, those that can go together, in the order given.

    A tensor may hold channels of several groups (a concatenation, a part of a `chunk`); a unit
    that would take its last index is left out.

    Args:
        groups: all groups of the model.
        wanted: group id -> units, most wanted first.
    """
    stays: dict[Axis, npt.NDArray[np.bool_]] = {}
    out: dict[str, list[int]] = {}
    for group in groups:
        if group.id not in wanted:
            continue
        for axis, layout in group.layout.items():
            stays.setdefault(axis, np.ones(len(layout), dtype=bool))
        order = list(wanted[group.id])
        asked = np.zeros(len(group.units), dtype=bool)
        asked[order] = True
        last = [
            axis for axis, layout in group.layout.items() if _all_go(layout, asked, stays[axis])
        ]
        taken = [] if last else order
        for u in order if last else ():
            hit = {axis: group.layout[axis] == u for axis in last}
            if any(h.any() and not (stays[axis] & ~h).any() for axis, h in hit.items()):
                continue
            taken.append(u)
            for axis, h in hit.items():
                stays[axis] &= ~h
        if taken:
            out[group.id] = taken
        gone = np.zeros(len(group.units), dtype=bool)
        gone[taken] = True
        for axis, layout in group.layout.items():
            stays[axis] &= ~(gone[layout] & (layout >= 0))
    return out


def mask_units(
    masks: dict[str, Tensor], group: ChannelGroup, units: Iterable[int], shapes: Mapping[str, Shape]
) -> None:
    """Mask all that cutting these units would remove: False in keep-masks of parameters.

    Args:
        masks: address -> keep-mask; one that is not there begins as all True.
        group: of channels.
        units: of the group.
        shapes: of the parameters; buffers are cut by surgery, not masked.
    """
    for part in (p for u in units for p in group.units[u] if p.at in shapes):
        if part.at not in masks:
            masks[part.at] = torch.ones(shapes[part.at], dtype=torch.bool)
        masks[part.at].index_fill_(part.dim, torch.tensor(part.index), False)


def _all_go(layout: Labels, units: npt.NDArray[np.bool_], stays: npt.NDArray[np.bool_]) -> bool:
    """Whether these units would take all that is left of an axis."""
    return not (stays & ~(units[layout] & (layout >= 0))).any()


@dataclass
class Following:
    """What following the channels through a graph found: the ties, and each output's channels."""

    flow: Flow
    values: dict[str, Value]


def channel_groups(model: nn.Module, graph: Graph) -> list[ChannelGroup]:
    """All groups of channels that some weight writes, in the order they are first written.

    Inputs, outputs, whatever an unknown operator touches and channel counts that are written in the
    forward as numbers are protected, with the reason. Nothing is guessed.

    Args:
        model: the model the graph was captured from.
        graph: see `graph.capture`.
    """
    return _groups(follow(model, graph).flow)


def follow(model: nn.Module, graph: Graph) -> Following:
    """Run every operator's rule in order; once for a graph, of a model that is not cut since."""
    known: Following | None = graph.__dict__.get("_found")
    if known is not None:
        return known
    canonical = canonical_addresses(model)
    flow = Flow(
        lambda at, dim: size_of(model, at, dim),
        lambda at: canonical.get(at, at),
        lambda id: graph[id].shape,
    )
    values: dict[str, Value] = {}
    found = shuffles(graph)
    inside = {id for run in found.values() for id in run.inside}
    live = _live(graph)
    for node in graph:
        if node.op == "param" or (node.inputs and flow.constant.issuperset(node.inputs)):
            flow.constant.add(node.id)
        if node.id in inside:
            values[node.id] = unlabelled(node.shape, "it is inside a channel shuffle")
        elif node.id not in live and not node.params:
            values[node.id] = unlabelled(node.shape, "nobody reads it")
        elif (run := found.get(node.id)) is not None:
            fed = graph[run.source]
            values[node.id] = shuffled(node, values[fed.id], fed, run.dim, list(run.order), flow)
        else:
            values[node.id] = _step(graph, node, [values[i] for i in node.inputs], flow)
    found_here = Following(flow, values)
    graph.__dict__["_found"] = found_here
    return found_here


def canonical_addresses(model: nn.Module) -> dict[str, str]:
    """Every parameter's and buffer's address -> the first address of the same tensor."""
    first: dict[int, str] = {}
    out: dict[str, str] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            out[name] = first.setdefault(id(tensor), name)
    return out


def size_of(model: nn.Module, address: str, dim: int) -> int | None:
    """Indices along a dim of a parameter, a buffer or a module's channel map; None if none such."""
    path, _, name = address.rpartition(".")
    module = model
    for step in path.split(".") if path else ():  # `get_submodule` takes several times as long
        inner = module._modules.get(step)
        if inner is None:
            return None
        module = inner
    value: Tensor | None = module._parameters.get(name)
    if value is None:
        value = module._buffers.get(name)
    if isinstance(value, Tensor):
        return value.shape[dim] if dim < value.ndim else None
    rule = rule_of_module(module)
    return None if rule is None else rule.attribute_size(module, name, dim)


def _live(graph: Graph) -> set[str]:
    """Nodes that an output depends on; all of them where it is not known what depends on what."""
    if graph.how == "modules":
        return set(graph.nodes)
    live: set[str] = set()
    for node in reversed(list(graph)):
        if node.op == "output" or node.id in live or _in_place(node):
            live.update((node.id, *node.inputs))
    return live


def _in_place(node: Node) -> bool:
    """Whether a call may change its input: by torch's naming, a trailing underscore."""
    target = getattr(node.fx, "target", None)
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return str(name).split(".")[0].endswith("_") and not str(name).startswith("__")


def _step(graph: Graph, node: Node, values: list[Value], flow: Flow) -> Value:
    if node.op == "input":
        return unlabelled(node.shape, f"it is made from the model's input '{node.id}'")
    if node.op == "param":
        return _read_by_itself(node, flow)
    if node.op == "output":
        for value in values:
            flow.protect_value(value, "it is an output of the model")
        return Fixed("an output of the model")
    if graph.how == "modules":
        _protect_unseen(node, flow, f"the forward cannot be followed ({graph.reason})")
        return Fixed("the forward cannot be followed")
    if any(flow.size_of(a, 0) is None for a in node.params.values()):
        return flow.give_up(node, values, f"'{node.op}' reads a constant of the forward")
    return rule_of_op(node.op).flow(node, values, flow)


def _read_by_itself(node: Node, flow: Flow) -> Value:
    address = node.params["value"]
    if node.shape is None or flow.size_of(address, 0) is None:
        return unlabelled(node.shape, f"'{address}' is a constant of the forward")
    return flow.free(address, node.shape)


def _protect_unseen(node: Node, flow: Flow, why: str) -> None:
    """Of a graph that is only a list of modules: name what the weights write, protect it all."""
    weight = node.params.get("weight")
    if weight is not None and node.op in ("conv", "conv_transpose", "linear"):
        flow.written(weight, 1 if node.op == "conv_transpose" else 0)
    for address in node.params.values():
        flow.protect_tensor(address, why)


def _groups(flow: Flow) -> list[ChannelGroup]:
    tables = {axis: flow.table(labels) for axis, labels in flow.axes.items()}
    written = [tables[axis] for axis in flow.writes]
    if not written:
        return []
    family = _families(flow, written)
    number = np.full(flow.count, -1, dtype=np.int64)
    units: dict[int, Labels] = {}
    for table in written:
        for column in table.T:
            for f in _distinct(family[column[column >= 0]]):
                atoms = column[(column >= 0) & (family[column] == f)]
                fresh = _in_order(atoms[number[atoms] < 0])
                known = units.get(f, np.empty(0, dtype=np.int64))
                number[fresh] = np.arange(len(known), len(known) + len(fresh))
                units[f] = np.concatenate([known, fresh])
    layouts: dict[int, dict[Axis, Labels]] = {f: {} for f in units}
    for axis, table in tables.items():
        _lay(axis, table, family, number, layouts)
    alone = np.zeros(flow.count, dtype=bool)
    for table in written:
        alone[table[:, 0][(table >= 0).sum(1) == 1]] = True
    groups = [_group(atoms, layouts[f], flow, alone) for f, atoms in units.items()]
    return _named(groups)


def _families(flow: Flow, written: Sequence[Labels]) -> Labels:
    """For each atom a number: those that one weight writes, or one split made, share it."""
    parent = np.arange(flow.count, dtype=np.int64)

    def find(atoms: Labels) -> Labels:
        root = parent[atoms]
        while (parent[root] != root).any():
            root = parent[root]
        return root

    def join(atoms: Labels) -> None:
        if len(atoms):
            roots = np.unique(find(atoms))
            parent[roots] = roots[0]

    for table in written:
        places = (table >= 0).sum(1)
        for places_here in np.unique(places[places > 0]).tolist():
            rows = table[places == places_here]
            for k in range(places_here):
                join(rows[:, k][flow.plain(rows[:, k])])
    for atoms in flow.made:
        join(flow.whole(atoms))
    return find(np.arange(flow.count, dtype=np.int64))


def _distinct(families: Labels) -> list[int]:
    """Each once; nearly always there is one, and then nothing need be sorted."""
    if not len(families):
        return []
    first = families[0]
    return [int(first)] if (families == first).all() else np.unique(families).tolist()


def _in_order(atoms: Labels) -> Labels:
    """Each once, in the order of first appearance."""
    values, first = np.unique(atoms, return_index=True)
    return values[np.argsort(first)]


def _lay(
    axis: Axis,
    table: Labels,
    family: Labels,
    number: Labels,
    layouts: dict[int, dict[Axis, Labels]],
) -> None:
    """Note in the layout of each family which of its units the indices of an axis belong to."""
    for column in table.T:
        here = (column >= 0) & (number[column] >= 0)
        for f in _distinct(family[column[here]]):
            mine = here & (family[column] == f)
            layout = layouts[f].setdefault(axis, np.full(len(table), -1, dtype=np.int64))
            layout[mine] = number[column[mine]]


def _named(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Ids made unique, and which groups lie on the same axes."""
    names: dict[str, int] = {}
    named = []
    by_axis: dict[Axis, list[str]] = {}
    for group in groups:
        n = names[group.id] = names.get(group.id, 0) + 1
        named.append(group if n == 1 else replace(group, id=f"{group.id}{n}"))
        for axis in group.writes.items():
            by_axis.setdefault(axis, []).append(named[-1].id)
    return [
        replace(
            g,
            overlaps=tuple(
                dict.fromkeys(o for w in g.writes.items() for o in by_axis[w] if o != g.id)
            ),
        )
        for g in named
    ]


def _group(
    atoms: Labels, layout: Mapping[Axis, Labels], flow: Flow, alone: npt.NDArray[np.bool_]
) -> ChannelGroup:
    """A group; `alone` are the atoms that are whole channels somewhere."""
    writes = [axis for axis in flow.writes if axis in layout]
    reads = [axis for axis in flow.reads if axis in layout]
    reasons = flow.reasons(atoms.tolist())
    if not reasons and len(atoms) == 1:
        reasons = ["all its channels depend on each other: there is nothing to choose"]
    kind = "channels" if alone[atoms[0]] else flow.level(int(atoms[0]))
    return ChannelGroup(
        id=writes[0][0] if kind == "channels" else f"{writes[0][0]}:{kind}",
        units=Units(len(atoms), layout),
        producers=tuple(dict.fromkeys(at for at, _ in writes)),
        consumers=tuple(dict.fromkeys(at for at, _ in reads)),
        protected=reasons[0] if reasons else None,
        sizes={axis: len(flow.axes[axis]) for axis in layout},
        writes=dict(writes),
        kind=kind,
    )
