"""Which channels can be cut, and what must go with each: the groups of a captured graph."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from gracile.graph.channels import Fixed, Flow, Free, Value
from gracile.graph.graph import Graph, Node
from gracile.graph.oprule import rule_of_module, rule_of_op


@dataclass(frozen=True)
class Slice:
    """Indices of one unit in one tensor (or channel map)."""

    at: str
    dim: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are made together: a residual stream, or one layer's output.

    Attributes:
        id: address of the first producer's weight, `layer1.0.conv1.weight`.
        units: unit u is everything that must go together; removing any subset of the units leaves
            a valid network, as long as no tensor loses its last index (`surgery.remove_edits`
            checks).
        producers: addresses of the weights that write these channels.
        consumers: addresses of the weights that read them.
        protected: why it must not be cut, or None.
        sizes: (address, dim) -> number of indices, for every tensor in `units`.
        writes: producer -> the dim of its output channels: 0, but 1 for a transposed convolution.
    """

    id: str
    units: tuple[tuple[Slice, ...], ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    protected: str | None
    sizes: Mapping[tuple[str, int], int] = field(default_factory=dict)
    writes: Mapping[str, int] = field(default_factory=dict)

    def written(self, unit: int) -> tuple[Slice, ...]:
        """The slices of the producers' weights that make this unit: its filters."""
        return tuple(s for s in self.units[unit] if self.writes.get(s.at) == s.dim)

    def removable(self, order: Iterable[int]) -> list[int]:
        """Those of these units, taken in order, that can go together.

        A unit that would take the last index of some tensor is left out: where a narrow layer feeds
        a wide stream (a padding shortcut, a concatenation), one of its channels must stay.
        """
        left = dict(self.sizes)
        gone = []
        for u in order:
            cost = {(s.at, s.dim): len(s.index) for s in self.units[u]}
            if all(left[axis] > n for axis, n in cost.items()):
                gone.append(u)
                for axis, n in cost.items():
                    left[axis] -= n
        return gone


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
    """Run every operator's rule in order."""
    canonical = canonical_addresses(model)
    flow = Flow(
        lambda at, dim: size_of(model, at, dim),
        lambda at: canonical.get(at, at),
        lambda id: graph[id].shape,
    )
    values: dict[str, Value] = {}
    for node in graph:
        values[node.id] = _step(graph, node, [values[i] for i in node.inputs], flow)
    return Following(flow, values)


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
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    value: Tensor | None = module._parameters.get(name)
    if value is None:
        value = module._buffers.get(name)
    if isinstance(value, Tensor):
        return value.shape[dim] if dim < value.ndim else None
    rule = rule_of_module(module)
    return None if rule is None else rule.attribute_size(module, name, dim)


def _step(graph: Graph, node: Node, values: list[Value], flow: Flow) -> Value:
    if node.op == "input":
        return Fixed(f"made from the model's input '{node.id}'")
    if node.op == "param":
        return Free(node.params["value"])
    if node.op == "output":
        for value in values:
            flow.protect_value(value, "it is an output of the model")
        return Fixed("an output of the model")
    if graph.how == "modules":
        _protect_unseen(node, flow, f"the forward cannot be followed ({graph.reason})")
        return Fixed("the forward cannot be followed")
    return rule_of_op(node.op).flow(node, values, flow)


def _protect_unseen(node: Node, flow: Flow, why: str) -> None:
    """Of a graph that is only a list of modules: name what the weights write, protect it all."""
    weight = node.params.get("weight")
    if weight is not None and node.op in ("conv", "conv_transpose", "linear"):
        flow.written(weight, 1 if node.op == "conv_transpose" else 0)
    for address in node.params.values():
        flow.protect_tensor(address, why)


def _groups(flow: Flow) -> list[ChannelGroup]:
    members: dict[int, dict[tuple[str, int], list[int]]] = {}
    for axis, atoms in flow.axes.items():
        for i, atom in enumerate(atoms):
            members.setdefault(flow.find(atom), {}).setdefault(axis, []).append(i)
    joined = _join_by_producer(flow)
    groups: dict[int, dict[int, None]] = {}  # first unit of the group -> its units in order
    for axis in flow.writes:
        for atom in flow.axes[axis]:
            unit = flow.find(atom)
            groups.setdefault(joined(unit), {})[unit] = None
    return [_group(list(units), members, flow) for units in groups.values()]


def _join_by_producer(flow: Flow) -> Callable[[int], int]:
    """Units that one weight writes belong to one group: union-find over units."""
    parent: dict[int, int] = {}

    def find(unit: int) -> int:
        while parent.setdefault(unit, unit) != unit:
            parent[unit] = parent[parent[unit]]
            unit = parent[unit]
        return unit

    for axis in flow.writes:
        first = find(flow.find(flow.axes[axis][0]))
        for atom in flow.axes[axis]:
            parent[find(flow.find(atom))] = first
    return find


def _group(
    units: list[int], members: Mapping[int, Mapping[tuple[str, int], list[int]]], flow: Flow
) -> ChannelGroup:
    axes = {axis: None for unit in units for axis in members[unit]}
    writes = [axis for axis in flow.writes if axis in axes]
    reads = [axis for axis in flow.reads if axis in axes]
    reasons = [r for unit in units if (r := flow.reason(unit)) is not None]
    if not reasons and len(units) == 1:
        reasons = ["all its channels depend on each other: there is nothing to choose"]
    return ChannelGroup(
        id=writes[0][0],
        units=tuple(
            tuple(Slice(at, dim, tuple(index)) for (at, dim), index in members[unit].items())
            for unit in units
        ),
        producers=tuple(dict.fromkeys(at for at, _ in writes)),
        consumers=tuple(dict.fromkeys(at for at, _ in reads)),
        protected=reasons[0] if reasons else None,
        sizes={axis: len(flow.axes[axis]) for axis in axes},
        writes=dict(writes),
    )
