"""Operators that multiply by a weight: convolutions, linear layers and matrix products."""

import operator
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from gracile.graph.channels import Channels, Flow, Value
from gracile.graph.graph import Node
from gracile.graph.oprule import Kept, OpRule, Shape, oprule

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
        weight, groups = node.params.get("weight"), node.attrs.get("groups")
        if weight is None or len(values) != 1 or not isinstance(groups, int):
            return flow.give_up(node, values, f"the weight of '{node.op}' is computed")
        kernel, read = node.attrs["kernel_size"], node.attrs["in_channels"]
        if node.module is None and 1 < groups == read:
            return flow.give_up(node, values, f"'{node.op}' has its number of groups written in it")
        dim = len(flow.shape_of(node.inputs[0]) or (0,) * (len(kernel) + 2)) - len(kernel) - 1
        fed = flow.along(values[0], node, dim, read)
        out = self.couple(weight, groups, fed, flow)
        if "bias" in node.params:
            flow.tie(out, flow.axis(node.params["bias"], 0))
        return Channels(dim, out)

    def couple(self, weight: str, groups: int, fed: Sequence[int], flow: Flow) -> tuple[int, ...]:
        """Tie the atoms of the input to the weight; return the atoms of the output."""
        raise TypeError(f"{type(self).__name__} must say how its weight is laid out")


@oprule("conv", source="torch.nn.functional.conv*d: weight (O, I/groups, k...)")
class Conv(_Convolution):
    """Convolution, plain, grouped or depthwise (with any multiplier)."""

    modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    calls = {
        F.conv1d: CONV, F.conv2d: CONV, F.conv3d: CONV,
        "aten.conv1d": CONV, "aten.conv2d": CONV, "aten.conv3d": CONV,
    }  # fmt: skip

    def couple(self, weight: str, groups: int, fed: Sequence[int], flow: Flow) -> tuple[int, ...]:
        """A depthwise group goes with its input channel; other groups stay equally wide."""
        out = tuple(flow.written(weight, 0))
        if 1 < groups == len(fed):  # depthwise: output o belongs to input o // multiplier
            multiplier = len(out) // groups
            flow.tie(out, [fed[o // multiplier] for o in range(len(out))])
            return out
        width, made = len(fed) // groups, len(out) // groups
        inner = flow.read(weight, 1)
        flow.tie(fed, [inner[i % width] for i in range(len(fed))])
        flow.tie(out, [out[o % made] for o in range(len(out))])
        return out

    def resize(self, module: Any, kept: Kept) -> None:
        """Channel counts from the weight; a depthwise convolution loses groups."""
        out, inner = module.weight.shape[:2]
        module.groups = _groups_left(module.groups, module.out_channels, kept)
        module.out_channels = out
        module.in_channels = inner * module.groups

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Output elements x (I/groups) x kernel."""
        if node.shape is None or "weight" not in params:
            return 0
        return prod(node.shape) * prod(params["weight"][1:])


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

    def couple(self, weight: str, groups: int, fed: Sequence[int], flow: Flow) -> tuple[int, ...]:
        """The output's atoms are the weight's second dim, one copy a group."""
        if 1 < groups == len(fed):  # depthwise: group g's outputs go with input g
            flow.tie(fed, flow.written(weight, 0))
            return tuple(fed[g] for g in range(groups) for _ in flow.axis(weight, 1))
        flow.tie(fed, flow.read(weight, 0))
        width = len(fed) // groups
        flow.tie(fed, [fed[i % width] for i in range(len(fed))])
        return tuple(flow.written(weight, 1)) * groups

    def resize(self, module: Any, kept: Kept) -> None:
        """Channel counts from the weight; a depthwise one loses groups."""
        inner, out = module.weight.shape[:2]
        module.groups = _groups_left(module.groups, module.in_channels, kept)
        module.in_channels = inner
        module.out_channels = out * module.groups

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Input elements x (O/groups) x kernel: every input pixel is spread over a kernel."""
        if not inputs or inputs[0] is None or "weight" not in params:
            return 0
        return prod(inputs[0]) * prod(params["weight"][1:])


@oprule("linear", source="torch.nn.functional.linear: weight (O, I)")
class Linear(OpRule):
    """Matrix product over the last dim."""

    modules = (nn.Linear,)
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
        weight = node.params.get("weight")
        if weight is None or len(values) != 1:
            return flow.give_up(node, values, "the weight of 'linear' is computed")
        shape = flow.shape_of(node.inputs[0])
        if shape is None:
            return flow.give_up(node, values, "the input of 'linear' is not one tensor")
        columns = flow.read(weight, 1)
        flow.tie(flow.along(values[0], node, len(shape) - 1, len(columns)), columns)
        out = tuple(flow.written(weight, 0))
        if "bias" in node.params:
            flow.tie(out, flow.axis(node.params["bias"], 0))
        return Channels(len(shape) - 1, out)

    def resize(self, module: Any, kept: Kept) -> None:
        """Feature counts from the weight."""
        module.out_features, module.in_features = module.weight.shape

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Output elements x input features."""
        if node.shape is None or "weight" not in params:
            return 0
        return prod(node.shape) * params["weight"][1]


@oprule("matmul", source="torch.matmul")
class Matmul(OpRule):
    """Product of two activations (or with a bare parameter): counted, not cut through."""

    calls = dict.fromkeys(
        (
            operator.matmul, torch.matmul, torch.bmm, torch.mm, ".matmul", ".bmm", ".mm",
            "aten.matmul", "aten.bmm", "aten.mm",
        ),
        ("a", "b"),
    )  # fmt: skip

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Both sides are protected."""
        return flow.give_up(node, values, "'matmul' multiplies two tensors")

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Output elements x length of the inner dim."""
        if node.shape is None or not inputs or inputs[0] is None:
            return 0
        return prod(node.shape) * inputs[0][-1]


def _groups_left(groups: int, rows: int, kept: Kept) -> int:
    """Groups that still have a row (dim 0 of the weight): cuts either leave all groups equally
    wide, or take whole groups of a depthwise convolution."""
    width = rows // groups
    return len({row // width for row in kept.get(("weight", 0), range(rows))})
