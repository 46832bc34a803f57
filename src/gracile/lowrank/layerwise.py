"""Methods that put something else in the place of layers, one layer after another.

In turns with training: Gusak et al. 2019, arXiv:1903.09973, for factors.
"""

from abc import abstractmethod
from collections.abc import Iterator
from math import ceil
from typing import Any

from torch import Tensor, nn

from gracile.analyze.responses import LAYERS, Responses
from gracile.core import method as core
from gracile.errors import BindError
from gracile.graph.graph import Graph, Node
from gracile.nn.chain import Layer, Size


class LayerByLayer(core.Method):
    """Base: chooses layers at bind, and changes equal parts of them at each firing, in order.

    Options have `weights` (a selector or None for all that can be changed) and `when`.

    Attributes:
        chosen: addresses of the weights of all layers it will change.
        done: how many of them are.
    """

    def on_attach(self, s: Any) -> None:
        self.done = 0
        wanted = self.options.weights
        selected = None if wanted is None else s.tensors(wanted)
        self.chosen: list[str] = []
        whys: dict[str, str] = {}
        for address, node in layers_of(s.graph).items():
            if selected is not None and address not in selected:
                continue
            why = self.unsupported(s, node)
            if why is None:
                self.chosen.append(address)
            else:
                whys[address] = why
                s.note(address, "structure", "kept", "unsupported", why, self.id)
        if not self.chosen:
            first = next((f"'{a}': {why}" for a, why in whys.items()), "it has no such layer")
            raise BindError(f"'{self.id}': no layer of {s.name} can be {self.doing}: {first}")

    def on_fire(self, s: Any, progress: float) -> None:
        wanted = ceil(progress * len(self.chosen) - 1e-9)
        for address in self.chosen[self.done : wanted]:
            if address in s.parameter_names:
                self.change(s, address, layers_of(s.graph)[address])
        self.done = max(self.done, wanted)

    def claims(self, s: Any) -> list[tuple[str, str]]:
        return [("module", path_of(a)) for a in self.chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = int(state["done"])

    @property
    @abstractmethod
    def doing(self) -> str:
        """What is done to layers: "factorized by 'svd'"."""

    @abstractmethod
    def unsupported(self, s: Any, node: Node) -> str | None:
        """Why a layer cannot be changed, now or ever; None if it can."""

    @abstractmethod
    def change(self, s: Any, address: str, node: Node) -> None:
        """Change one layer, or note in the ledger why not."""

    # --- for these

    def kept(self, s: Any, address: str, why: str) -> None:
        """Note that a layer stays as it is, as changing it would gain nothing."""
        s.note(address, "structure", "kept", "no_gain", why, self.id)

    def sums(self, s: Any, node: Node, weight: Tensor) -> dict[str, Tensor]:
        """What the layer reads now, and what it should give, over calibration data."""
        found = Responses(weight, node, bias=False)
        rng = s.generator(self.id, "points", node.id)
        for x, y in self.responses(s, node, len(weight), bias=False):
            found.see(x, y, 0, rng)
        found.share()
        return {"gram": found.gram, "cross": found.right}

    def responses(
        self, s: Any, node: Node, outputs: int, last: Node | None = None, *, bias: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(what the layer reads now, what it gave in the original), for each calibration batch.

        Args:
            s: the Session.
            node: of the layer.
            outputs: channels it has now.
            last: of the layer whose output is wanted; default the same.
            bias: whether what it gave has its bias in it.
        """
        last = last or node
        kept = s.plan.to_original().get((last.params["weight"], 0))
        dim = -1 if last.op == "linear" else 1
        with s.walk(self, lambda id: None) as (model, teacher):
            added = None if bias else _bias(s.teacher_graph, last)
            for x, y in zip(model.need(node.inputs[0]), teacher.need(last.id), strict=True):
                wanted = y
                if added is not None:
                    shape = [1] * y.dim()
                    shape[dim] = -1
                    wanted = y - added.reshape(shape)
                if kept is not None and wanted.shape[dim] != outputs:
                    wanted = wanted.index_select(dim, wanted.new_tensor(kept).long())
                yield x, wanted


def layers_of(graph: Graph) -> dict[str, Node]:
    """Weight -> the node of the layer that has it as its own and alone calls it, in order."""
    calls: dict[str, list[Node]] = {}
    for node in graph.of_op(*LAYERS):
        calls.setdefault(node.params.get("weight", ""), []).append(node)
    return {
        a: nodes[0]
        for a, nodes in calls.items()
        if len({n.module for n in nodes}) == 1 and nodes[0].module == path_of(a)
    }


def path_of(address: str) -> str:
    """The layer of a weight."""
    return address.removesuffix(".weight")


def size_of(s: Any, node: Node, layer: Layer) -> Size:
    """Pixels along each axis of what a convolution reads; () for a linear layer."""
    shape = s.graph[node.inputs[0]].shape
    return tuple(shape[2:]) if layer.kernel and shape is not None else ()


def module_of(s: Any, address: str) -> nn.Module:
    """The layer that has a weight."""
    found: nn.Module = s.model.get_submodule(path_of(address))
    return found


def _bias(graph: Graph, node: Node) -> Tensor | None:
    """Of the original layer; None if it adds none."""
    address = graph[node.id].params.get("bias")
    assert graph.module is not None
    return None if address is None else graph.module.get_parameter(address).detach()
