"""A captured graph as an integer runtime sees it: fused patterns, moved values, the rest float."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from gracile.graph.decompose import PLACE
from gracile.graph.graph import Graph, Node
from gracile.quantize.profile import Profile

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


class View:
    """The graph without quantizers, cut into fused patterns.

    Attributes:
        nodes: id -> node, in order.
        inputs: id -> ids of the tensors (or tuples of tensors) it reads, quantizers looked through.
        readers: id -> nodes that read it.
        transparent: ids of operators of which nothing is left in a runtime; not those that a
            recurrent step is fed back through, which have a quantizer of their own.
        place: ids of the parts of recurrent steps -> what they are in every step.
        same: ids of operators that only move values, so that output and inputs share a scale.
        tails: first node of a pattern -> its last one.
        integer: first nodes of the patterns that run in integers.
        not_asked: those that stay float because their weight was not selected.
        why_float: id -> reason, for every other operator that computes something.
        summed: ends of patterns whose sums go into an addition before they are rounded.
        floats: those of them that stay float because somebody says so.
    """

    def __init__(
        self,
        graph: Graph,
        profile: Profile,
        weights: Sequence[str],
        weights_only: bool,
        floats: Mapping[str, str] = MappingProxyType({}),
    ):
        self.graph, self.profile, self.weights_only = graph, profile, weights_only
        self.floats = floats
        self.nodes = {n.id: n for n in graph if n.op != "quantize"}
        self.inputs = {n.id: self._tensors_read(n) for n in self.nodes.values()}
        self.readers: dict[str, list[Node]] = {id: [] for id in self.nodes}
        for n in self.nodes.values():
            for i in dict.fromkeys(self.inputs[n.id]):
                self.readers[i].append(n)
        self.place = {
            n.id: str(n.fx.meta[PLACE])
            for n in self.nodes.values()
            if n.fx is not None and PLACE in n.fx.meta
        }
        self.transparent = {
            n.id for n in self.nodes.values() if n.op in TRANSPARENT_OPS and n.id not in self.place
        }
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
        self.summed: set[str] = set()
        if profile.sums_in_accumulator:
            convs = (n for n in self.nodes.values() if n.op == "conv")
            able = [n for n in convs if n in self.integer or n.id in self.floats]
            ends = {self.tails[n.id]: n for n in able}
            additions = [n for n in self.integer if n.op == "add"]
            self.summed = {end for n in additions for end in self._sums(n, ends)}

    def owner(self, id: str) -> str:
        """The node that computes this value: looks through identity and dropout."""
        while id in self.transparent and self.inputs[id]:
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

    def _tensors_read(self, n: Node) -> tuple[str, ...]:
        ids = [self._through(i) for i in n.inputs]
        moved = self.profile.ops_same_scale  # may hand on a tuple of tensors: chunk, split
        return tuple(i for i in ids if self.graph[i].shape is not None or self.graph[i].op in moved)

    def _through(self, id: str) -> str:
        while self.graph[id].op == "quantize":
            id = self.graph[id].inputs[0]
        return id

    def _moves(self, n: Node) -> bool:
        if n.op not in self.profile.ops_same_scale or n.id in {*self.transparent, *self.place}:
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
            if at.id in self.transparent:
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

    def _sums(self, addition: Node, ends: Mapping[str, Node]) -> list[str]:
        """The operand that an addition takes unrounded: the first that only it reads, if any."""
        for i in self.inputs[addition.id]:
            plain = i in ends and self.nodes[i].op not in ACTIVATION_OPS
            if plain and [r.id for r in self.readers[i]] == [addition.id]:
                return [i]
        return []

    def _refusal(self, n: Node, allowed: set[int | str]) -> str | None:
        """None: computed in integers. "": nothing to say. Otherwise why it stays in float."""
        if n.op == "embedding" and self.key(n.params.get("weight", "")) in allowed:
            return ""  # a table in integers, of which rows are looked up
        if n.op in (*NO_COMPUTE, *TRANSPARENT_OPS) or n.id in self.fused or n.id in self.same:
            return ""
        if n.id in self.floats:
            return self.floats[n.id]
        if n.op not in self.profile.ops_integer:
            why = self.profile.notes.get(n.op)
            return f"profile '{self.profile.name}' has no integer kernel for '{n.op}'" + (
                f": {why}" if why else ""
            )
        if n.id in self.place and n.op not in WEIGHT_OPS and not self.profile.quantize_steps:
            return "it is a part of a recurrent step, of which the products are in integers"
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
        while (id in self.same or id in self.transparent) and self.inputs[id]:
            id = self.inputs[id][0]
        return id


def never_negative(view: View) -> dict[str, bool]:
    """Id -> whether its values cannot be below zero, whatever the weights."""
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
