"""Cut a captured graph into units: the pieces on which a runtime and PyTorch are compared."""

from collections.abc import Collection

from gracile.benchmark.artifact import Unit
from gracile.graph.graph import Graph, Node
from gracile.graph.instrument import SUFFIX

# Operators that only move or rename values; they belong to no unit.
MOVES = (
    "input", "output", "param", "flatten", "reshape", "permute", "getitem", "pad", "channel_pad",
    "identity", "dropout", "quantize", "squeeze", "unsqueeze", "slice", "chunk", "size",
)  # fmt: skip
LAYERS = ("conv", "conv_transpose", "linear", "matmul")
ACTIVATIONS = (
    "relu", "relu6", "hardtanh", "sigmoid", "hardsigmoid", "silu", "hardswish", "gelu", "tanh",
    "leaky_relu", "elu",
)  # fmt: skip
FUSED = {
    "batch_norm": LAYERS,
    **dict.fromkeys(ACTIVATIONS, (*LAYERS, "batch_norm", "add", "sub", "mul")),
}


def choose_units(graph: Graph, quantized: Collection[str]) -> tuple[Unit, ...]:
    """The units of a graph in execution order.

    A layer, the BatchNorm behind it and the activation behind that are one unit, named by the last
    of them, because a runtime computes them as one; a quantizer in between ends the unit. The
    tensor of a quantized unit is the one behind its quantizer. A quantized input is a unit named
    ``<input>.quantize``, what only one operator reads quantized is ``<operator>.input.quantize``.

    Args:
        graph: captured, with or without quantizers.
        quantized: ids of the nodes whose output is quantized.
    """
    units: list[Unit] = []
    open_layers: dict[str, tuple[str, ...]] = {}  # id -> layers of a unit that has not ended yet
    for node in graph:
        if node.op == "input" and node.id in quantized:
            units.append(Unit(node.id + SUFFIX))
        if node.op == "quantize" and _before(graph, node) in quantized:
            units.append(Unit(node.id))
            continue
        if node.id not in quantized and (node.op in MOVES or node.shape is None):
            continue
        layers = tuple(x for i in node.inputs for x in open_layers.pop(i, ()))
        if node.op not in MOVES and node.module is not None and node.params:
            layers = (*layers, node.module)
        elif node.op not in MOVES:
            layers = (*layers, *_owners(node))
        if node.op == "input":
            continue
        if node.id not in quantized and _goes_on(graph, node):
            open_layers[node.id] = layers
        else:
            units.append(Unit(node.id, tuple(dict.fromkeys(layers))))
    return tuple(units)


def _before(graph: Graph, node: Node) -> str | None:
    """The name of a quantizer on the way to one operator; None for one behind an operator."""
    id = node.id.removesuffix(SUFFIX)
    return None if id in graph.nodes else id


def _owners(node: Node) -> tuple[str, ...]:
    return tuple(a.rpartition(".")[0] for a in node.params.values() if "." in a)


def _goes_on(graph: Graph, node: Node) -> bool:
    readers = graph.consumers(node.id)
    return len(readers) == 1 and node.op in FUSED.get(readers[0].op, ())
