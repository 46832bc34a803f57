"""Where quantizers go: from the captured graph and a runtime's profile, which is data.

A runtime computes an operator in integers only if all its inputs and its output are quantized, so
quantizers stand on the last node of each fused pattern (convolution or linear, batch norm,
activation; addition, activation) and on whatever an integer operator reads. Operators that only
move values keep their input's scale and zero point, with a quantizer of their own behind them:
without it ONNX Runtime falls back to float there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gracile.errors import BindError, UserError, nearest
from gracile.graph.graph import Graph, Node

WEIGHT_OPS = ("conv", "conv_transpose", "linear")
ACTIVATION_OPS = ("relu", "relu6", "hardtanh")  # become a clamp of the integers before them
TRANSPARENT_OPS = ("identity", "dropout")  # nothing is left of them in a runtime
PAIR_OPS = ("add", "sub", "mul", "div", "matmul")  # integer only with two tensors as operands
NOT_NEGATIVE = ("relu", "relu6", "sigmoid", "hardsigmoid", "softmax")
KEEPS_SIGN = (
    "max_pool", "avg_pool", "adaptive_avg_pool", "mean", "flatten", "reshape", "permute", "getitem",
    "channel_pad", "identity", "dropout", "cat", "chunk", "split", "add", "mul",
)  # fmt: skip
NO_COMPUTE = ("input", "output", "param", "quantize")


class Grid(BaseModel):
    """An integer format: how a profile wants activations or weights stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(default=8, ge=2, le=16)
    signed: bool = False
    symmetric: bool = False
    axis: int | None = None
    narrow: bool = False


class Profile(BaseModel):
    """What one runtime computes in integers, as measured; a file in `quantize/profiles`.

    Attributes:
        activations: format of activations that may be negative. Those that cannot be get zero
            point 0 on an unsigned grid, unless this is signed and asymmetric.
        weights: format of weights; `axis: null` is per tensor, any number per output channel.
        quantize_inputs: put a quantizer on the model's inputs.
        quantize_outputs: put one on what the model returns.
        ops_integer: operators with integer kernels.
        ops_same_scale: operators that move values: inputs and output share one scale.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    activations: Grid
    weights: Grid
    quantize_inputs: bool = True
    quantize_outputs: bool = False
    ops_integer: tuple[str, ...]
    ops_same_scale: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightSpec:
    """The grid of one weight; `axis` is its output-channel axis, None for one scale."""

    address: str
    bits: int
    signed: bool
    symmetric: bool
    axis: int | None
    narrow: bool


@dataclass(frozen=True)
class ActivationSpec:
    """The grid behind one node.

    Attributes:
        id: node whose output is quantized.
        role: "input" for a model input, else "output".
        nonnegative: the values cannot be negative, the zero point is the grid's lower end.
        shares_scale_with: id of the node whose scale and zero point it takes; None for its own.
        observed: whether its values widen the (shared) range; False where they only move.
    """

    id: str
    role: Literal["input", "output"]
    bits: int
    signed: bool
    symmetric: bool
    nonnegative: bool
    shares_scale_with: str | None
    observed: bool


class Skipped(NamedTuple):
    """An operator or weight that stays in float; `reason` is one of the ledger's."""

    name: str
    why: str
    reason: Literal["not_asked", "unsupported"] = "unsupported"


@dataclass(frozen=True)
class Placement:
    """All quantizers of a model, and what stays in float with the reason."""

    weights: tuple[WeightSpec, ...]
    activations: tuple[ActivationSpec, ...]
    skipped: tuple[Skipped, ...]

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
        )


def load_profile(name: str) -> Profile:
    """Read a profile by name.

    Raises:
        UserError: no such profile, or the file breaks the schema.
    """
    folder = resources.files("gracile.quantize.profiles")
    known = sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))
    if name not in known:
        raise UserError(f"no quantization profile '{name}'.{nearest(name, known)}")
    data = yaml.safe_load((folder / f"{name}.yaml").read_text())
    try:
        return Profile.model_validate({"name": name, **data})
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise UserError(f"profile '{name}': {place}: {first['msg']}.") from None


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
) -> Placement:
    """Decide which weights and which node outputs are quantized, and how.

    Args:
        graph: the captured model; quantizers that are already in it are looked through.
        profile: the runtime's abilities.
        weights: addresses that may be quantized; an operator with another weight stays in float.
        activations: False quantizes weights only.
        bits, symmetric: of activations; None as the profile says.
        weight_bits, weight_symmetric, per_channel: of weights; None as the profile says.

    Raises:
        BindError: nothing is left to quantize, or activations are wanted and the graph was not
            captured in a form that can be rewritten.
    """
    if activations and graph.how != "fx":
        raise BindError(
            "activation quantization needs a graph that can be rewritten, and this model was "
            f"captured by '{graph.how}': {graph.reason} Change the forward, or quantize only the "
            "weights with activations: false."
        )
    view = _View(graph, profile, weights, not activations)
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
    if not activations:
        return Placement(weight_specs, (), tuple(skipped_weights))
    specs = _activations(view, bits, symmetric)
    return Placement(weight_specs, specs, (*skipped_weights, *view.skipped_nodes()))


class _View:
    """The graph without quantizers, cut into fused patterns."""

    def __init__(self, graph: Graph, profile: Profile, weights: Sequence[str], weights_only: bool):
        self.graph, self.profile, self.weights_only = graph, profile, weights_only
        self.nodes = {n.id: n for n in graph if n.op != "quantize"}
        self.inputs = {n.id: self._tensors_read(n) for n in self.nodes.values()}
        self.readers: dict[str, list[Node]] = {id: [] for id in self.nodes}
        for n in self.nodes.values():
            for i in dict.fromkeys(self.inputs[n.id]):
                self.readers[i].append(n)
        self.same = {n.id for n in self.nodes.values() if self._moves(n)}
        self.tails: dict[str, str] = {}  # anchor -> last node of its pattern
        self.fused: dict[str, str] = {}  # any other node of a pattern -> anchor
        for n in self.nodes.values():
            if n.op in (*WEIGHT_OPS, "add") and n.id not in self.fused:
                self._fuse(n)
        allowed = {self.key(w) for w in weights}
        self.why_float: dict[str, str] = {}
        self.not_asked: set[str] = set()
        self.integer: list[Node] = []
        for n in self.nodes.values():
            why = self._refusal(n, allowed)
            if why is None:
                self.integer.append(n)
            elif why:
                self.why_float[n.id] = why

    def owner(self, id: str) -> str:
        """The node that computes this value: looks through identity and dropout."""
        while self.nodes[id].op in TRANSPARENT_OPS and self.inputs[id]:
            id = self.inputs[id][0]
        return id

    def weight_of(self, node: Node) -> str | None:
        """Address of the weight of a convolution or linear node."""
        return node.params.get("weight") if node.op in WEIGHT_OPS else None

    def key(self, address: str) -> int | str:
        """Identity of a parameter, so that tied names compare equal."""
        module = self.graph.module
        if module is None:
            return address
        try:
            return id(module.get_parameter(address))
        except AttributeError:
            return address

    def skipped_nodes(self) -> list[Skipped]:
        """Operators that stay in float, with the reason."""
        return [
            Skipped(id, why, "not_asked" if id in self.not_asked else "unsupported")
            for id, why in self.why_float.items()
        ]

    def _tensors_read(self, n: Node) -> tuple[str, ...]:
        ids = [self._through(i) for i in n.inputs]
        moved = self.profile.ops_same_scale  # may hand on a tuple of tensors: chunk, split
        return tuple(i for i in ids if self.graph[i].shape is not None or self.graph[i].op in moved)

    def _through(self, id: str) -> str:
        while self.graph[id].op == "quantize":
            id = self.graph[id].inputs[0]
        return id

    def _moves(self, n: Node) -> bool:
        if n.op not in self.profile.ops_same_scale or n.op in TRANSPARENT_OPS:
            return False
        if n.op == "pad" and n.attrs.get("mode", "constant") == "constant":
            return n.attrs.get("value") in (None, 0)
        return bool(self.inputs[n.id])

    def _fuse(self, anchor: Node) -> None:
        last, members, rest = anchor, [anchor.id], list(ACTIVATION_OPS)
        if anchor.op in WEIGHT_OPS:
            rest.append("batch_norm")
        at = anchor
        while len(self.readers[at.id]) == 1:
            at = self.readers[at.id][0]
            if at.op in TRANSPARENT_OPS:
                members.append(at.id)
                continue
            if at.op not in rest:
                break
            members.append(at.id)
            last = at
            rest = [] if at.op in ACTIVATION_OPS else list(ACTIVATION_OPS)
        self.tails[anchor.id] = last.id
        for id in members[1 : members.index(last.id) + 1]:
            self.fused[id] = anchor.id

    def _refusal(self, n: Node, allowed: set[int | str]) -> str | None:
        """None: computed in integers. "": nothing to say. Otherwise why it stays in float."""
        if n.op in (*NO_COMPUTE, *TRANSPARENT_OPS) or n.id in self.fused or n.id in self.same:
            return ""
        if n.op not in self.profile.ops_integer:
            return f"profile '{self.profile.name}' has no integer kernel for '{n.op}'"
        if n.op in WEIGHT_OPS:
            address = self.weight_of(n)
            if address is None:
                return "its weight is computed in the forward"
            if self.key(address) not in allowed:
                self.not_asked.add(n.id)
                return f"its weight '{address}' is not selected"
        if self.weights_only:
            return None
        if n.op in PAIR_OPS and len(self.inputs[n.id]) < 2:
            return "one operand is a constant"
        if n.shape is None or any(self.nodes[i].shape is None for i in self.inputs[n.id]):
            return "it does not map tensors to one tensor"
        if not self.profile.quantize_inputs and any(
            self.nodes[self._root(i)].op == "input" for i in self.inputs[n.id]
        ):
            return f"profile '{self.profile.name}' leaves the model's input in float"
        return None

    def _root(self, id: str) -> str:
        while (id in self.same or self.nodes[id].op in TRANSPARENT_OPS) and self.inputs[id]:
            id = self.inputs[id][0]
        return id


def _weights(view: _View, weights: Iterable[str]) -> tuple[dict[str, int | None], list[Skipped]]:
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
        elif not users:
            skipped.append(Skipped(address, "is read by no operator of the captured graph"))
        else:
            n = users[0]
            why = view.why_float.get(n.id) or f"'{n.op}' has no weight that runs in integers"
            skipped.append(Skipped(address, f"belongs to '{n.id}': {why}"))
    return chosen, skipped


def _output_axis(n: Node) -> int | None:
    if n.op != "conv_transpose":
        return 0
    return 1 if int(n.attrs.get("groups", 1)) == 1 else None  # (I, O / groups, kH, kW)


def _activations(
    view: _View, bits: int | None, symmetric: bool | None
) -> tuple[ActivationSpec, ...]:
    need = _closed(view, _needed(view))
    if not view.profile.quantize_outputs:
        need = {id for id in need if not _only_returned(view, id)}
    leaders = _leaders(view, need)
    positive = _nonnegative(view)
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
        if nonnegative and not (grid.signed and not even):
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
            )
        )
    for n in view.nodes.values():
        if n.id in view.same and n.id not in need and n.op not in TRANSPARENT_OPS:
            view.why_float[n.id] = "what it moves is not quantized"
    return tuple(specs)


def _needed(view: _View) -> set[str]:
    """Outputs of integer operators (at the end of their pattern) and all they read."""
    need = set()
    for n in view.integer:
        need.add(view.tails.get(n.id, n.id))
        need.update(view.owner(i) for i in view.inputs[n.id])
    return need


def _closed(view: _View, need: set[str]) -> set[str]:
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


def _only_returned(view: _View, id: str) -> bool:
    return all(
        r.op == "output"
        or ((r.id in view.same or r.op in TRANSPARENT_OPS) and _only_returned(view, r.id))
        for r in view.readers[id]
    )


def _leaders(view: _View, need: set[str]) -> dict[str, str]:
    """Node -> first node of those that share its scale."""
    order = {id: k for k, id in enumerate(view.nodes)}
    leader = {id: id for id in need}

    def find(id: str) -> str:
        while leader[id] != id:
            id = leader[id]
        return id

    for id in view.same:
        ends = [id, *(view.owner(i) for i in view.inputs[id])]
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


def _nonnegative(view: _View) -> dict[str, bool]:
    out: dict[str, bool] = {}
    for n in view.nodes.values():
        inputs = [out[i] for i in view.inputs[n.id]]
        if n.op in NOT_NEGATIVE:
            out[n.id] = True
        elif n.op == "hardtanh":
            out[n.id] = float(n.attrs.get("min_val", -1.0)) >= 0
        elif n.op == "pad":
            constant = n.attrs.get("mode", "constant") == "constant"
            fill = n.attrs.get("value") or 0
            out[n.id] = all(inputs) and bool(inputs) and (not constant or fill >= 0)
        elif n.op in PAIR_OPS and len(inputs) < 2:
            out[n.id] = False  # the constant may be negative
        else:
            out[n.id] = n.op in KEEPS_SIGN and bool(inputs) and all(inputs)
    return out
