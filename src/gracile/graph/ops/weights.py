"""Weights of products: a parameter, or what the forward computes from some.

As weight standardization, weight normalization, masks and sums of kernels do. The labels say what
the indices of a computed weight stand for, so it is coupled as a parameter is.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Flow, Labels, Shape, Value
from gracile.graph.operands import Operand, known
from gracile.graph.oprule import OpRule, oprule
from gracile.graph.ops.along import Along
from gracile.graph.ops.elementwise import broadcast
from gracile.graph.ops.maths import keys
from gracile.graph.producers import parameter_of


def source_of(node: Node, given: Mapping[str, Operand]) -> str | Operand | None:
    """A weight's address, or the tensor that is computed; None where that is not known."""
    operand = given.get("weight")
    if operand is None:
        return node.params.get("weight")
    is_known = operand.node is not None and operand.axes is not None
    return operand if is_known and len(operand.shape or ()) > 1 else None


def coupled(
    node: Node, weight: str | Operand, flow: Flow, made: int, read: int
) -> tuple[Labels, Labels, str]:
    """Labels of the output channels and of the input channels of a weight.

    Args:
        node: the product.
        weight: see `source_of`.
        flow: is told which axes of parameters make channels and read them.
        made: the weight's dim of output channels.
        read: its dim of input channels.

    Returns:
        both, and why what is tied to an index that cannot go cannot go.
    """
    why = f"the inputs of '{node.id}' stay"
    if isinstance(weight, str):
        return flow.written(weight, made), flow.read(weight, read), why
    value, shape = weight.axes, weight.shape
    assert weight.node is not None
    assert value is not None
    assert shape is not None
    mark_computed(weight.node, value, flow, made, read)
    if value.dims[made] is None and weight.node.meta["id"] in flow.constant:
        for at in (at for at, size in _behind(weight.node) if size == shape):
            flow.protect(flow.written(at, made), value.why)  # so that it has a group with a reason
    flow.only(value, node, (made, read))
    if any(value.dims[d] is None and shape[d] > 1 for d in (made, read)):
        why = value.why
    return known(value.dims[made], shape[made]), known(value.dims[read], shape[read]), why


def mark_computed(weight: fx.Node, value: Axes, flow: Flow, made: int, read: int) -> None:
    """Note which axes of the parameters behind a computed weight make channels and read them.

    Those that have both kinds of channels are the kernels; where there are some, the others only
    scale them. What is removed is a zero of the weight as it is computed, see `verify`.
    """
    flow.statistics.add(weight.meta["id"])
    done = {at for at, _ in (*flow.writes, *flow.reads)}
    axes = [(p, d) for p, shape in _behind(weight) for d, n in enumerate(shape) if n > 1]
    makers, readers = (
        [a for a in axes if a[0] not in done and _in_common(flow, flow.axis(*a), value.dims[dim])]
        for dim in (made, read)
    )
    kernels = {at for at, _ in makers} & {at for at, _ in readers}
    for found, mark in ((makers, flow.written), (readers, flow.read)):
        for at, d in found:
            if at in kernels or not kernels:
                mark(at, d)


def mark_constant(node: Node, operand: Operand | None, flow: Flow, made: int, read: int) -> None:
    """Note a matrix product's weight if it is computed, of parameters only."""
    if operand is None or operand.axes is None or operand.node is None:
        return
    constant = operand.node.meta["id"] in flow.constant and node.id not in flow.constant
    if constant and parameter_of(operand.node) is None:
        mark_computed(operand.node, operand.axes, flow, made, read)


def shape_of_weight(inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> Shape | None:
    """A product's weight is a parameter or its second input."""
    if "weight" in params:
        return params["weight"]
    return inputs[1] if len(inputs) > 1 else None


def _behind(weight: fx.Node) -> list[tuple[str, Shape]]:
    """Parameters of two or more dims that a tensor is computed from, the largest first."""
    found: dict[str, nn.Parameter] = {}
    seen, todo = {weight}, [weight]
    while todo:
        node = todo.pop()
        if node.op == "get_attr":
            tensor = attrgetter(str(node.target))(node.graph.owning_module)
            if isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
                found[str(node.target)] = tensor
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        todo += fresh
    return sorted(((at, tuple(p.shape)) for at, p in found.items()), key=lambda p: -np.prod(p[1]))


def _in_common(flow: Flow, a: Labels, b: Labels | None) -> bool:
    return b is not None and bool((np.intersect1d(flow.table(a), flow.table(b)) >= 0).any())


@oprule("weight_norm", source="Salimans and Kingma 2016, arXiv:1602.07868, eq. 2")
class WeightNorm(OpRule):
    """g v / |v|: a filter of zeros has no direction, so only those that are kept are computed."""

    calls = dict.fromkeys((torch._weight_norm, "aten._weight_norm"), ("v", "g", "dim"))
    statistic = True

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Lengths go with their filters."""
        shapes = [flow.shape_of(i) for i in node.inputs]
        if len(values) != 2 or node.shape is None or any(s is None for s in shapes):
            return flow.give_up(node, values, "'weight_norm' does not read two tensors")
        return broadcast(node, values, [s or () for s in shapes], node.shape, flow)


_MOMENTS = ("input", "dim", "unbiased", "keepdim")


@oprule("var_mean", source="torch.var_mean, torch.std_mean")
class VarMean(Along):
    """Variance or deviation, and mean, of what is left."""

    reduces = statistic = True
    defaults = {"dim": None, "keepdim": False}
    calls = dict.fromkeys((*keys("var_mean"), *keys("std_mean")), _MOMENTS)

    def complete(self, attrs: dict[str, Any], params: Mapping[str, Shape]) -> None:
        """A second argument may say `unbiased` instead of a dim."""
        if isinstance(attrs.get("dim"), bool):
            attrs["dim"] = None

    def passes(self, node: Node, dims: int) -> bool:
        """What is removed is left out."""
        return True
