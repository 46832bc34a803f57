"""Bare parameters in a product: along which of their dims they make channels, or read them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Flow, Labels, Value

_SAME = {
    "t", "transpose", "permute", "contiguous", "to", "type_as", "float", "half", "bfloat16",
    "double", "_to_copy", "clone", "numpy_T", "T", "mT", "swapaxes", "unsqueeze", "squeeze",
    "expand",
}  # fmt: skip


def mark_product(
    node: Node,
    values: Sequence[Value],
    flow: Flow,
    *dims: tuple[Sequence[int], Sequence[int]],
) -> None:
    """Note which axes of bare parameters a product reads, and which it writes.

    Args:
        node: the product; its operands are `node.inputs`.
        values: of the operands.
        flow: is told.
        dims: for each operand the dims that the product sums over, and those that it makes.
    """
    if node.fx is None:
        return
    nodes = {n.meta.get("id"): n for n in node.fx.all_input_nodes}
    for id, value, (summed, made) in zip(node.inputs, values, dims, strict=True):
        call = nodes.get(id)
        address = None if call is None else parameter_of(call)
        if address is None or not isinstance(value, Axes):
            continue
        for chosen, mark in ((summed, flow.read), (made, flow.written)):
            for d in chosen:
                dim = _dim_of(address, value.dims[d], flow)
                if dim is not None:
                    mark(address, dim)


def _dim_of(address: str, labels: Labels | None, flow: Flow) -> int | None:
    """Along which dim a parameter has these very labels."""
    dim = 0
    while (size := flow.size_of(address, dim)) is not None:
        if size > 1 and flow.axis(address, dim) is labels:
            return dim
        dim += 1
    return None


def parameter_of(node: fx.Node) -> str | None:
    """Address of the tensor that a node is, in another order of dims or type; None for others."""
    while node.op in ("call_method", "call_function") and _name(node) in _SAME:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        node = source
    return str(node.target) if node.op == "get_attr" else None


def _name(node: fx.Node) -> str:
    target: Any = node.target
    if target is getattr:
        return str(node.args[1])
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).partition("::")[2]
    return str(getattr(target, "__name__", target))
