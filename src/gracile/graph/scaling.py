"""Which channels can be scaled between the layers that write and read them, and nothing changes.

Cross-layer equalization of Nagel et al. 2019 (arXiv:1906.04721, section 4.1) is told there for
pairs of layers; here a group is all that carries the same channels, so that residual streams have
one scale as well, and a depthwise layer ends one group and begins the next.
"""

from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from gracile.graph.graph import Graph, Node

LAYERS = ("conv", "conv_transpose", "linear")
SCALED = ("relu", "leaky_relu", "prelu", "dropout", "identity")  # f(s x) = s f(x) for s > 0
_WHY = {
    "output": "the network returns them",
    "relu6": "'{id}' clips at 6, whatever the channel's scale (use ReLU)",
}
POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")


@dataclass(frozen=True)
class Writer:
    """A layer that makes the channels; `norm` is the BatchNorm that alone reads it, if any."""

    node: Node
    norm: Node | None


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels; `inputs` of them for each (behind flattening)."""

    node: Node
    inputs: int


@dataclass(frozen=True)
class ScaleGroup:
    """Channels that may be multiplied by positive factors where they are made.

    Attributes:
        id: of the first writer.
        size: number of channels.
        writers, readers: layers whose weights take the factors and their inverses.
        passed: ids of all operators in between.
    """

    id: str
    size: int
    writers: tuple[Writer, ...]
    readers: tuple[Reader, ...]
    passed: tuple[str, ...]


def scale_groups(graph: Graph) -> tuple[list[ScaleGroup], dict[str, str]]:
    """All groups of a captured graph, in order, and why the channels of other layers are none.

    Returns:
        The groups, and id of a layer -> reason its outputs cannot be scaled.
    """
    found = _Groups(graph)
    return found.groups(), found.refused()


def by_channels(node: Node, weight: Tensor, inputs: int = 1) -> Tensor:
    """A view (groups, outputs, channels, rest) of a layer's weight, both numbers within a group.

    Args:
        node: of the layer.
        weight: of it.
        inputs: inputs that are one channel, one after the other (a linear layer behind flattening).
    """
    groups = int(node.attrs.get("groups", 1)) if node.op != "linear" else 1
    view: Tensor
    if node.op == "conv_transpose":  # (I, O / groups, ...)
        view = weight.unflatten(0, (groups, -1)).flatten(3).transpose(1, 2)
    elif node.op == "linear":
        view = weight.unflatten(1, (-1, inputs))[None]
    else:
        view = weight.unflatten(0, (groups, -1)).flatten(3)
    return view


class _Groups:
    """Union-find over the outputs of operators; `why` keeps what pins one."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.leader = {n.id: n.id for n in graph}
        self.why: dict[str, str] = {}
        self.dim: dict[str, int | None] = {}  # of channels in an output
        uses = Counter(n.params["weight"] for n in graph.of_op(*LAYERS) if "weight" in n.params)
        self.norms = {n.id: self._norm(n) for n in graph.of_op(*LAYERS)}
        mine = {norm.id for norm in self.norms.values() if norm is not None}
        for n in graph:
            self.dim[n.id] = self._dim(n)
            if n.op in LAYERS:
                if uses[n.params.get("weight", "")] != 1:
                    self._pin(n, f"the weight of '{n.id}' is not its own")
                elif not self._reads(n):
                    self._pin(n, f"'{n.id}' reads no channels", output=False)
            elif n.id in mine:
                self._tie(n.inputs[0], n.id)
            elif not self._passes(n):
                self._pin(
                    n,
                    _WHY.get(n.op, "'{id}' ({op}) does not pass a scale on").format(
                        id=n.id, op=n.op
                    ),
                )
            else:
                for i in n.inputs:
                    self._tie(i, n.id)

    def groups(self) -> list[ScaleGroup]:
        members: dict[str, list[Node]] = {}
        for n in self.graph:
            members.setdefault(self._find(n.id), []).append(n)
        pinned = {self._find(id) for id in self.why}
        out = []
        for root, nodes in members.items():
            ids = {n.id for n in nodes}
            writers = tuple(Writer(n, self.norms[n.id]) for n in nodes if n.op in LAYERS)
            layers = [n for n in self.graph.of_op(*LAYERS) if n.inputs and n.inputs[0] in ids]
            if root in pinned or not writers or not layers:
                continue
            first = writers[0].node
            size = self._channels(first)
            readers = tuple(Reader(n, self._fed(n) // size) for n in layers)
            passed = tuple(n.id for n in nodes if n.op not in LAYERS)
            out.append(ScaleGroup(first.id, size, writers, readers, passed))
        return out

    def refused(self) -> dict[str, str]:
        why: dict[str, str] = {}
        for id, text in self.why.items():
            why.setdefault(self._find(id), text)
        roots = {n.id: self._find(n.id) for n in self.graph.of_op(*LAYERS)}
        return {id: why[root] for id, root in roots.items() if root in why}

    def _norm(self, n: Node) -> Node | None:
        """The BatchNorm that alone reads a layer, and can take a scale."""
        readers = self.graph.consumers(n.id)
        if len(readers) != 1 or readers[0].op != "batch_norm":
            return None
        norm = readers[0]
        whole = {"weight", "bias", "running_mean", "running_var"} <= set(norm.params)
        used = sum(norm.params.get("weight") == m.params.get("weight") for m in self.graph)
        return norm if whole and used == 1 else None

    def _dim(self, n: Node) -> int | None:
        if n.op in LAYERS:
            return len(n.shape or ()) - 1 if n.op == "linear" else 1
        dims = {self.dim[i] for i in n.inputs}
        return dims.pop() if len(dims) == 1 else None

    def _reads(self, n: Node) -> bool:
        before = self.graph[n.inputs[0]]
        at = self.dim[before.id]
        last = n.op == "linear"
        return at is not None and at == (len(before.shape or ()) - 1 if last else 1)

    def _passes(self, n: Node) -> bool:
        at = self.dim[n.id]
        shapes = [self.graph[i].shape for i in n.inputs]
        if at is None or n.shape is None or any(s is None for s in shapes):
            return False
        if n.op in SCALED:
            return True
        if n.op == "add":
            same = all(s == n.shape for s in shapes)
            return same and len(n.inputs) == 2 and n.attrs.get("alpha", 1) in (None, 1)
        if at != 1 or len(shapes) != 1:
            return False
        rank = len(shapes[0] or ())
        if n.op in POOLS:
            return rank >= 3
        if n.op == "flatten":
            return n.attrs.get("start_dim") == 1 and n.attrs.get("end_dim") in (-1, rank - 1)
        if n.op == "mean":
            dims = n.attrs.get("dim")
            dims = (dims,) if isinstance(dims, int) else dims
            return isinstance(dims, tuple) and all(
                isinstance(d, int) and d % rank > at for d in dims
            )
        return False

    def _channels(self, n: Node) -> int:
        assert n.shape is not None
        return n.shape[self.dim[n.id] or 0]

    def _fed(self, n: Node) -> int:
        shape = self.graph[n.inputs[0]].shape
        assert shape is not None
        return shape[-1] if n.op == "linear" else shape[1]

    def _pin(self, n: Node, why: str, *, output: bool = True) -> None:
        for id in (*n.inputs, *((n.id,) if output else ())):
            self.why.setdefault(id, why)

    def _find(self, id: str) -> str:
        while self.leader[id] != id:
            id = self.leader[id]
        return id

    def _tie(self, a: str, b: str) -> None:
        self.leader[self._find(b)] = self._find(a)
