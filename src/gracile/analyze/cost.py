"""What a network costs by arithmetic: multiply-adds, parameters and bytes of each operator.

MACs count convolutions, linear layers and matrix products only, one multiply-add = 1, for one
sample; they predict nothing about time.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from gracile.graph.dependency import canonical_addresses
from gracile.graph.graph import Graph, Node
from gracile.graph.oprule import Shape, rule_of_op


@dataclass(frozen=True)
class CostRow:
    """One operator.

    Attributes:
        id: node id in the captured graph.
        op: normalized operator.
        macs: multiply-adds for one sample.
        params: parameters it is the first to read, in elements; buffers are not counted.
        weight: address of its weight, None if it has none.
    """

    id: str
    op: str
    macs: int
    params: int
    weight: str | None


@dataclass(frozen=True)
class Totals:
    """A whole network: `macs` for one sample, `params` in elements, `bytes` of all it stores."""

    macs: int
    params: int
    bytes: int


def cost(model: nn.Module, graph: Graph) -> list[CostRow]:
    """One row for each operator, in the order they run.

    A layer that is called twice costs its MACs twice and its parameters once.

    Args:
        model: the model the graph was captured from.
        graph: with shapes for some batch; MACs are divided by its size.
    """
    tensors = _tensors(model)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    canonical = canonical_addresses(model)
    batch = _batch(graph)
    counted: set[str] = set()
    rows = []
    for node in graph:
        if node.op in ("input", "output", "param", "size"):
            continue
        own = dict.fromkeys(canonical.get(a, a) for a in _reads(graph, node))
        fresh = [a for a in own if a not in counted and isinstance(tensors.get(a), nn.Parameter)]
        counted.update(fresh)
        rows.append(
            CostRow(
                node.id,
                node.op,
                _macs(graph, node, shapes) // batch,
                sum(tensors[a].numel() for a in fresh),
                node.params.get("weight"),
            )
        )
    return rows


def totals(model: nn.Module, graph: Graph) -> Totals:
    """MACs of one sample, and parameters and stored bytes of the model, tied tensors once.

    Bytes are of parameters and buffers as they are stored now.
    """
    stored = {id(t): t for t in _tensors(model).values()}.values()
    return Totals(
        macs=sum(row.macs for row in cost(model, graph)),
        params=sum(t.numel() for t in stored if isinstance(t, nn.Parameter)),
        bytes=sum(t.numel() * t.element_size() for t in stored),
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


def _batch(graph: Graph) -> int:
    shapes = [n.shape for n in graph.of_op("input") if n.shape]
    return shapes[0][0] if shapes else 1


def _reads(graph: Graph, node: Node) -> list[str]:
    bare = [graph[i].params["value"] for i in node.inputs if graph[i].op == "param"]
    return [*node.params.values(), *bare]


def _macs(graph: Graph, node: Node, shapes: dict[str, Shape]) -> int:
    inputs: list[Shape | None] = [graph[i].shape for i in node.inputs]
    if not inputs:  # a graph that is only a list of modules
        inputs = list(node.attrs.get("input_shapes", ()))
    params = {role: shapes[a] for role, a in node.params.items() if a in shapes}
    return rule_of_op(node.op).macs(node, inputs, params)
