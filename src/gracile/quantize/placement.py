"""Where quantizers go: from the captured graph and a runtime's profile, which is data.

A runtime computes an operator in integers only if all its inputs and its output are quantized, so
quantizers stand on the last node of each fused pattern (convolution or linear, batch norm,
activation; addition, activation) and on whatever an integer operator reads. Operators that only
move values keep their input's scale and zero point, with a quantizer of their own behind them:
without it ONNX Runtime falls back to float there.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from gracile.errors import BindError
from gracile.graph.graph import Graph, Node
from gracile.quantize.patterns import WEIGHT_OPS, View, never_negative
from gracile.quantize.profile import Profile


@dataclass(frozen=True)
class WeightSpec:
    """The grid of one weight; `axis` is its output-channel axis, None for one scale.

    With `group` there is a scale for each so many inputs in a row of one output.
    """

    address: str
    bits: int
    signed: bool
    symmetric: bool
    axis: int | None
    narrow: bool
    group: int | None = None


@dataclass(frozen=True)
class ActivationSpec:
    """The grid behind one node.

    Attributes:
        id: node whose output is quantized.
        role: "input" for a model input, else "output".
        nonnegative: the values cannot be negative, the zero point is the grid's lower end.
        shares_scale_with: id of the node whose scale and zero point it takes; None for its own.
        observed: whether its values widen the (shared) range; False where they only move.
        narrow: without the most negative integer.
    """

    id: str
    role: Literal["input", "output"]
    bits: int
    signed: bool
    symmetric: bool
    nonnegative: bool
    shares_scale_with: str | None
    observed: bool
    narrow: bool = False

    @property
    def leader(self) -> str:
        """Id of the node whose scale it has: another's, or its own."""
        return self.shares_scale_with or self.id


class Skipped(NamedTuple):
    """An operator or weight that stays in float; `reason` is one of the ledger's."""

    name: str
    why: str
    reason: Literal["not_asked", "sensitive", "unsupported"] = "unsupported"


@dataclass(frozen=True)
class Placement:
    """All quantizers of a model, and what stays in float with the reason.

    Attributes:
        operators: ids of those that run in integers.
    """

    weights: tuple[WeightSpec, ...]
    activations: tuple[ActivationSpec, ...]
    skipped: tuple[Skipped, ...]
    operators: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Placement":
        """Inverse of `to_dict`."""
        return cls(
            tuple(WeightSpec(**w) for w in data["weights"]),
            tuple(ActivationSpec(**a) for a in data["activations"]),
            tuple(Skipped(*s) for s in data["skipped"]),
            tuple(data["operators"]),
        )


def place(
    graph: Graph,
    profile: Profile,
    *,
    weights: Sequence[str],
    activations: bool = True,
    bits: int | None = None,
    weight_bits: int | None = None,
    symmetric: bool | None = None,
    weight_symmetric: bool | None = None,
    per_channel: bool | None = None,
    floats: Mapping[str, str] = MappingProxyType({}),
) -> Placement:
    """Decide which weights and which node outputs are quantized, and how.

    Args:
        graph: the captured model; quantizers that are already in it are looked through.
        profile: the runtime's abilities.
        weights: addresses that may be quantized; an operator with another weight stays in float.
        activations: False quantizes weights only.
        bits, symmetric: of activations; None as the profile says.
        weight_bits, weight_symmetric, per_channel: of weights; None as the profile says.
        floats: ids of operators that stay in float -> why.

    Raises:
        BindError: nothing is left to quantize, or activations are wanted and the graph was not
            captured in a form that can be rewritten.
    """
    if activations:
        refuse_unwritable(graph, "quantize only the weights with activations: false")
    view = View(graph, profile, weights, not activations, floats)
    chosen, skipped_weights = _weights(view, weights)
    if not chosen:
        raise BindError(
            "no selected weight can be quantized: "
            + "; ".join(f"'{s.name}' {s.why}" for s in skipped_weights[:3])
            + "."
        )
    grid = profile.weights
    each = grid.axis is not None if per_channel is None else per_channel
    even = grid.symmetric if weight_symmetric is None else weight_symmetric
    weight_specs = tuple(
        WeightSpec(
            address=address,
            bits=weight_bits or grid.bits,
            signed=grid.signed,
            symmetric=even,
            axis=axis if each else None,
            narrow=grid.narrow and grid.signed and even,
        )
        for address, axis in chosen.items()
    )
    operators = tuple(n.id for n in view.integer if n.op in WEIGHT_OPS or activations)
    if not activations:
        return Placement(weight_specs, (), tuple(skipped_weights), operators)
    specs = _activations(view, bits, symmetric)
    skipped_nodes = [Skipped(id, why, _reason(view, id)) for id, why in view.why_float.items()]
    return Placement(weight_specs, specs, (*skipped_weights, *skipped_nodes), operators)


def refuse_unwritable(graph: Graph, way: str) -> None:
    """Refuse a graph in which no quantizer can be laid; `way` is what else can be done.

    Raises:
        BindError: with the reason.
    """
    if graph.how != "fx" and graph.module is None:
        raise BindError(
            "activation quantization needs a graph that can be rewritten, and this model was "
            f"captured by '{graph.how}': {graph.reason} Change the forward, or {way}."
        )


def _reason(view: View, id: str) -> Literal["not_asked", "sensitive", "unsupported"]:
    if id in view.not_asked:
        return "not_asked"
    return "sensitive" if id in view.floats else "unsupported"


def _weights(view: View, weights: Iterable[str]) -> tuple[dict[str, int | None], list[Skipped]]:
    integer = {n.id for n in view.integer}
    chosen: dict[str, int | None] = {}
    skipped: list[Skipped] = []
    for address in weights:
        same = view.key(address)
        users = [
            n for n in view.nodes.values() if any(view.key(a) == same for a in n.params.values())
        ]
        good = [n for n in users if n.id in integer and view.weight_of(n) is not None]
        if good:
            chosen[address] = _output_axis(good[0])
        elif any(n.op == "embedding" for n in users):
            chosen[address] = 0  # a scale for each row
        elif not users:
            skipped.append(Skipped(address, "is read by no operator of the captured graph"))
        else:
            n = users[0]
            why = view.why_float.get(n.id) or f"'{n.op}' has no weight that runs in integers"
            skipped.append(Skipped(address, f"belongs to '{n.id}': {why}", _reason(view, n.id)))
    return chosen, skipped


def _output_axis(n: Node) -> int | None:
    if n.op != "conv_transpose":
        return 0
    return 1 if int(n.attrs.get("groups", 1)) == 1 else None  # (I, O / groups, kH, kW)


def _activations(
    view: View, bits: int | None, symmetric: bool | None
) -> tuple[ActivationSpec, ...]:
    need = _closed(view, _needed(view))
    if not view.profile.quantize_outputs:
        need = {id for id in need if not _only_returned(view, id)}
    leaders = _leaders(view, need)
    positive = never_negative(view)
    tuples = {id for id in need if view.nodes[id].shape is None}
    group_positive = {
        leader: all(positive[id] for id in need if leaders[id] == leader and id not in tuples)
        for leader in set(leaders.values())
    }
    grid = view.profile.activations
    even = grid.symmetric if symmetric is None else symmetric
    specs = []
    for n in view.nodes.values():
        if n.id not in need or n.id in tuples:
            continue
        nonnegative = group_positive[leaders[n.id]]
        signed = grid.signed or even  # zero point 0 needs a sign where values are negative
        if nonnegative and view.profile.unsigned and not (grid.signed and not even):
            signed = False
        specs.append(
            ActivationSpec(
                id=n.id,
                role="input" if n.op == "input" else "output",
                bits=bits or grid.bits,
                signed=signed,
                symmetric=even or (nonnegative and not signed),
                nonnegative=nonnegative,
                shares_scale_with=None if leaders[n.id] == n.id else leaders[n.id],
                observed=n.id not in view.same,
                narrow=grid.narrow and signed and even,
            )
        )
    for n in view.nodes.values():
        if n.id in view.same and n.id not in need and n.id not in view.transparent:
            view.why_float[n.id] = "what it moves is not quantized"
    return tuple(specs)


def _needed(view: View) -> set[str]:
    """Outputs of integer operators (at the end of their pattern) and all they read."""
    need = set()
    for n in view.integer:
        step_in_float = n.id in view.place and not view.profile.quantize_steps
        if view.profile.quantize_results and not step_in_float:
            need.add(view.tails.get(n.id, n.id))
        need.update(view.owner(i) for i in view.inputs[n.id])
    return need - view.summed


def _closed(view: View, need: set[str]) -> set[str]:
    """Where one end of an operator that only moves values is quantized, all its ends are."""
    while True:
        more = set(need)
        for id in view.same:
            ends = {id, *(view.owner(i) for i in view.inputs[id])}
            if ends & more:
                more |= ends
        if more == need:
            return need
        need = more


def _only_returned(view: View, id: str) -> bool:
    return all(
        r.op in ("output", "exits")
        or ((r.id in view.same or r.id in view.transparent) and _only_returned(view, r.id))
        for r in view.readers[id]
    )


def _leaders(view: View, need: set[str]) -> dict[str, str]:
    """Node -> first node of those that share its scale."""
    order = {id: k for k, id in enumerate(view.nodes)}
    leader = {id: id for id in need}

    def find(id: str) -> str:
        while leader[id] != id:
            id = leader[id]
        return id

    together = [[id, *(view.owner(i) for i in view.inputs[id])] for id in view.same]
    together += [[id for id in view.place if view.place[id] == p] for p in {*view.place.values()}]
    for ends in together:
        roots = sorted({find(e) for e in ends if e in need}, key=order.__getitem__)
        for root in roots[1:]:
            leader[root] = roots[0]
    groups: dict[str, list[str]] = {}
    for id in sorted(need, key=order.__getitem__):
        if view.nodes[id].shape is not None:  # a tuple has no quantizer and cannot lead
            groups.setdefault(find(id), []).append(id)
    return {id: members[0] for members in groups.values() for id in members} | {
        id: id for id in need if view.nodes[id].shape is None
    }
