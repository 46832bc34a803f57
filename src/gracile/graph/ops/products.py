"""Operators that multiply by a weight: convolutions, linear layers and matrix products."""

import operator
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Flow, Labels, Value
from gracile.graph.maps import conv_of
from gracile.graph.operands import Operand, known, operands
from gracile.graph.oprule import Kept, OpRule, Shape, oprule
from gracile.graph.ops.elementwise import broadcast
from gracile.graph.ops.weights import coupled, mark_constant, shape_of_weight, source_of
from gracile.graph.producers import mark_product

CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
CONV_T = (
    "input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation",
)  # fmt: skip


class _Convolution(OpRule):
    roles = ("weight", "bias")
    attributes: ClassVar[Sequence[str]] = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode",
    )  # fmt: skip
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros"}
    out_dim = 0  # the weight's dim of output channels

    def complete(self, attrs: dict[str, Any], params: Mapping[str, Shape]) -> None:
        """Kernel size and channel counts of a functional convolution."""
        weight, groups = params.get("weight"), attrs.get("groups")
        if weight is None or not isinstance(groups, int):
            return
        attrs.setdefault("kernel_size", weight[2:])
        for name in ("stride", "padding", "dilation", "output_padding"):
            if isinstance(attrs.get(name), int):
                attrs[name] = (attrs[name],) * len(weight[2:])
        attrs.setdefault("in_channels", weight[1] * groups if self.out_dim == 0 else weight[0])
        attrs.setdefault("out_channels", weight[0] if self.out_dim == 0 else weight[1] * groups)

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Output channels are new; input channels are tied to the weight that reads them."""
        given, groups = operands(node, values, flow, CONV), node.attrs.get("groups")
        value = given["input"].axes if "input" in given else None
        weight, attrs = source_of(node, given), dict(node.attrs)
        if weight is None or value is None or not isinstance(groups, int):
            return flow.give_up(node, values, f"the weight or groups of '{node.op}' are computed")
        if isinstance(weight, Operand):
            self.complete(attrs, {"weight": weight.shape or ()})
        dim = len(value.dims) - len(attrs["kernel_size"]) - 1
        flow.only(value, node, (0, dim) if dim else (dim,))
        fed = flow.along(value, node, dim, attrs["in_channels"])
        out, outer = self.couple(node, weight, groups, fed, flow)
        if groups > 1 and outer is not None:
            self.count_groups(node, outer, groups, flow)
        _tie_bias(node, given.get("bias"), out, flow)
        rest = (None,) * (len(value.dims) - dim - 1)
        if (out < 0).all():
            return Axes((*value.dims[:dim], None, *rest), f"the weight of '{node.id}' stays")
        return Axes((*value.dims[:dim], out, *rest), "it lies in space")

    def couple(
        self, node: Node, weight: str | Operand, groups: int, fed: Labels, flow: Flow
    ) -> tuple[Labels, Labels | None]:
        """Tie the labels of the input to the weight; those of the output and of the groups."""
        raise TypeError(f"{type(self).__name__} must say how its weight is laid out")

    def count_groups(self, node: Node, outer: Labels, groups: int, flow: Flow) -> None:
        """The number of groups is cut with them, where a module keeps it."""
        home = node.module
        if home is None and node.op == "conv":
            home = flow.channel_map(node, conv_of(node))
        if home is None:
            flow.protect(outer, f"'{node.op}' has its number of groups written in it ('{node.id}')")
            return
        axis = flow.map_axis(f"{home}.groups", 0, groups)
        flow.tie(axis, outer, f"the groups of '{node.id}' stay")

    def attribute_size(self, module: Any, name: str, dim: int) -> int | None:
        """The number of groups."""
        return int(module.groups) if (name, dim) == ("groups", 0) else None

    def cut_attribute(self, module: Any, name: str, dim: int, keep: Sequence[int]) -> None:
        """Set the number of groups; the channel counts follow from the weight."""
        module.groups = len(keep)


@oprule("conv", source="torch.nn.functional.conv*d: weight (O, I/groups, k...)")
class Conv(_Convolution):
    """Convolution, plain, grouped or depthwise (with any multiplier)."""

    modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d, "gracile.nn.maps.Convolution")
    calls = {
        F.conv1d: CONV, F.conv2d: CONV, F.conv3d: CONV,
        "aten.conv1d": CONV, "aten.conv2d": CONV, "aten.conv3d": CONV,
    }  # fmt: skip

    def couple(
        self, node: Node, weight: str | Operand, groups: int, fed: Labels, flow: Flow
    ) -> tuple[Labels, Labels | None]:
        """Whole groups go with their inputs; within them inputs and outputs by themselves."""
        out, inner, why = coupled(node, weight, flow, 0, 1)
        if groups == 1:
            flow.tie(fed, inner, why)
            return out, None
        ins, columns = flow.split(fed, (groups, len(inner)), why)
        outs, _ = flow.split(out, (groups, len(out) // groups), why)
        flow.tie(known(ins, groups), known(outs, groups), why)
        flow.tie(known(columns, len(inner)), inner, why)
        return out, outs

    def resize(self, module: Any, kept: Kept) -> None:
        """Channel counts from the weight."""
        out, inner = module.weight.shape[:2]
        module.out_channels, module.in_channels = out, inner * module.groups

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Output elements x (I/groups) x kernel."""
        weight = shape_of_weight(inputs, params)
        return 0 if node.shape is None or weight is None else prod(node.shape) * prod(weight[1:])


@oprule("conv_transpose", source="torch.nn.functional.conv_transpose*d: weight (I, O/groups, k...)")
class ConvTranspose(_Convolution):
    """Transposed convolution, plain, grouped or depthwise."""

    modules = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    attributes = (*_Convolution.attributes, "output_padding")
    defaults = {**_Convolution.defaults, "output_padding": 0}
    calls = {
        F.conv_transpose1d: CONV_T, F.conv_transpose2d: CONV_T, F.conv_transpose3d: CONV_T,
        "aten.conv_transpose1d": CONV_T, "aten.conv_transpose2d": CONV_T,
        "aten.conv_transpose3d": CONV_T,
    }  # fmt: skip
    out_dim = 1

    def couple(
        self, node: Node, weight: str | Operand, groups: int, fed: Labels, flow: Flow
    ) -> tuple[Labels, Labels | None]:
        """The weight is (I, O/groups): its second dim appears once in every group."""
        out, rows, why = coupled(node, weight, flow, 1, 0)
        flow.tie(fed, rows, why)
        if groups == 1:
            return out, None
        outer, _ = flow.split(rows, (groups, len(rows) // groups), why)
        merged = flow.merge((outer, out), (groups, len(out)))
        return (out if merged is None else merged), outer

    def resize(self, module: Any, kept: Kept) -> None:
        """Channel counts from the weight."""
        inner, out = module.weight.shape[:2]
        module.in_channels, module.out_channels = inner, out * module.groups

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Input elements x (O/groups) x kernel: every input pixel is spread over a kernel."""
        weight = shape_of_weight(inputs, params)
        if not inputs or inputs[0] is None or weight is None:
            return 0
        return prod(inputs[0]) * prod(weight[1:])


@oprule("linear", source="torch.nn.functional.linear: weight (O, I)")
class Linear(OpRule):
    """Matrix product over the last dim."""

    modules = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
    calls = {F.linear: ("input", "weight", "bias"), "aten.linear": ("input", "weight", "bias")}
    roles = ("weight", "bias")
    attributes = ("in_features", "out_features")

    def complete(self, attrs: dict[str, Any], params: Mapping[str, Shape]) -> None:
        """Feature counts of a functional call."""
        if "weight" in params:
            attrs.setdefault("in_features", params["weight"][1])
            attrs.setdefault("out_features", params["weight"][0])

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Output features are new; the last dim of the input is tied to the weight's columns."""
        given = operands(node, values, flow, ("input", "weight", "bias"))
        value = given["input"].axes if "input" in given else None
        weight = source_of(node, given)
        if value is None or weight is None:
            return flow.give_up(node, values, "the weight of 'linear' is computed")
        out, columns, why = coupled(node, weight, flow, 0, 1)
        fed = flow.along(value, node, len(value.dims) - 1, len(columns))
        flow.tie(fed, columns, why)
        _tie_bias(node, given.get("bias"), out, flow)
        return value.with_dim(len(value.dims) - 1, None if (out < 0).all() else out)

    def resize(self, module: Any, kept: Kept) -> None:
        """Feature counts from the weight."""
        module.out_features, module.in_features = module.weight.shape

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Output elements x input features."""
        weight = shape_of_weight(inputs, params)
        return 0 if node.shape is None or weight is None else prod(node.shape) * weight[1]


@oprule("matmul", source="torch.matmul")
class Matmul(OpRule):
    """Product of two activations, or with a bare parameter: the inner dims are tied."""

    calls = dict.fromkeys(
        (
            operator.matmul, torch.matmul, torch.bmm, torch.mm, ".matmul", ".bmm", ".mm",
            "aten.matmul", "aten.bmm", "aten.mm",
        ),
        ("a", "b"),
    )  # fmt: skip

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """(..., n, k) @ (..., k, m): the leading dims as in a sum."""
        shapes = [flow.shape_of(i) for i in node.inputs]
        if len(values) != 2 or node.shape is None or any(s is None or len(s) < 2 for s in shapes):
            return flow.give_up(node, values, "'matmul' does not multiply two matrices")
        a, b = values
        if not isinstance(a, Axes) or not isinstance(b, Axes):
            return flow.give_up(node, values, "'matmul' does not multiply two matrices")
        left, right = shapes[0] or (), shapes[1] or ()
        mark_product(node, values, flow, ((-1,), (-2,)), ((-2,), (-1,)))
        given = operands(node, values, flow, ("a", "b"))
        mark_constant(node, given.get("a"), flow, -2, -1)
        mark_constant(node, given.get("b"), flow, -1, -2)
        inner, why = left[-1], f"'{node.id}' multiplies it with something that stays"
        k = flow.along(a, node, len(left) - 1, inner)
        flow.tie(k, flow.along(b, node, len(right) - 2, inner), why)
        lead = broadcast(
            node, [Axes(a.dims[:-2], a.why), Axes(b.dims[:-2], b.why)],
            [left[:-2], right[:-2]], node.shape[:-2], flow,
        )  # fmt: skip
        ends = (a.dims[-2], b.dims[-1])
        return Axes((*(lead.dims if isinstance(lead, Axes) else ()), *ends), a.why)

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Output elements x length of the inner dim."""
        if node.shape is None or not inputs or inputs[0] is None:
            return 0
        return prod(node.shape) * inputs[0][-1]


def _tie_bias(node: Node, bias: Operand | None, out: Labels, flow: Flow) -> None:
    """A parameter's or a computed one's channels are those of the output."""
    if "bias" in node.params:
        flow.tie(out, flow.axis(node.params["bias"], 0), f"the outputs of '{node.id}' stay")
    elif bias is not None:
        labels = flow.along(bias.value, node, 0, len(out))
        flow.tie(out, labels, f"the computed bias of '{node.id}' stays")
