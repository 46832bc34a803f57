"""The layers of a session that may be factorized, and what they read and give on its data."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from gracile.analyze.responses import LAYERS, Responses
from gracile.graph.decompose import ATTENTION
from gracile.graph.graph import Graph, Node
from gracile.nn.chain import Layer, Size

WHOLE_ATTENTION = (
    "nn.MultiheadAttention reads its projections itself; write them as linear layers (q, k, v and "
    "out, with scaled_dot_product_attention), which are factorized one by one"
)


def layers(s: Any) -> dict[str, Node]:
    """Weight -> the node of the layer that has it as its own and alone reads it, in order."""
    return {a: n for a, n in _readers(s).items() if isinstance(n, Node)}


def shared(s: Any) -> dict[str, str]:
    """Weight -> why it is no layer's own: who reads it besides."""
    return {a: why for a, why in _readers(s).items() if isinstance(why, str)}


def _readers(s: Any) -> dict[str, Node | str]:
    calls: dict[str, list[Node]] = {}
    for node in s.graph.of_op(*LAYERS, "embedding"):
        if "weight" in node.params:
            calls.setdefault(node.params["weight"], []).append(node)
    out: dict[str, Node | str] = {}
    for node in s.graph.of_op(*ATTENTION):
        for name, address in node.params.items():
            if name.endswith("weight"):
                out[address] = WHOLE_ATTENTION
    for address, nodes in calls.items():
        modules = {n.module for n in nodes}
        if modules == {path_of(address)}:
            out[address] = nodes[0]
        else:
            names = ", ".join(f"'{n.id}'" for n in nodes)
            out[address] = (
                f"its weight is read by {names}, not by one layer alone; a tied weight stays "
                "whole, give each its own"
            )
    return out


def path_of(address: str) -> str:
    """The layer of a weight."""
    return address.removesuffix(".weight")


def size_of(s: Any, node: Node, layer: Layer) -> Size:
    """Pixels along each axis of a convolution's input; () for another layer."""
    shape = s.graph[node.inputs[0]].shape
    return tuple(shape[2:]) if layer.kernel and shape is not None else ()


def weight_of(s: Any, address: str) -> Tensor:
    """As the network sees it, without its grid."""
    weight: Tensor = s.overlays.effective(address, upto="mask").detach()
    return weight


def sums(s: Any, by: Any, addresses: Iterable[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """For one layer after the other: what it reads now and what it should give, as sums.

    All in one walk over the calibration data; the model must stay as it is meanwhile.

    Args:
        s: the Session.
        by: the method that asks.
        addresses: of weights, in the order of the network.

    Yields:
        The address; gram and cross (see `gracile.lowrank.reconstruct.reconstruct`).
    """
    nodes = layers(s)
    with s.walk(by, lambda id: None) as walks:
        for address in addresses:
            node, weight = nodes[address], weight_of(s, address)
            found = Responses(weight, node, bias=False)
            rng = s.generator(by.id, "points", node.id)
            for x, y in _pairs(s, walks, node, node, len(weight), bias=False):
                found.see(x, y, 0, rng)
            found.share()
            yield address, {"gram": found.gram, "cross": found.right}


def responses(
    s: Any, by: Any, node: Node, outputs: int, last: Node | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(what a layer reads now, what it gave in the original), for each calibration batch.

    Args:
        s: the Session.
        by: the method that asks.
        node: of the layer.
        outputs: channels it has now.
        last: of the layer whose output is wanted; default the same.
    """
    with s.walk(by, lambda id: None) as walks:
        yield from _pairs(s, walks, node, last or node, outputs, bias=True)


def _pairs(
    s: Any, walks: tuple[Any, Any], node: Node, last: Node, outputs: int, *, bias: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    model, teacher = walks
    kept = s.plan.to_original().get((last.params["weight"], 0))
    dim = -1 if last.op == "linear" else 1
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


def _bias(graph: Graph, node: Node) -> Tensor | None:
    """Of the original layer; None if it adds none."""
    address = graph[node.id].params.get("bias")
    assert graph.module is not None
    return None if address is None else graph.module.get_parameter(address).detach()
