"""Operators that work on each element by itself: activations, dropout, sums and products."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Flow, Labels, Shape, Value
from gracile.graph.oprule import Kept, OpRule, oprule


class Elementwise(OpRule):
    """One tensor in, the same shape out, each element by itself: channels pass.

    f(0) need not be 0: a removed channel's readers lose their weights for it as well.
    """

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """What comes in goes out."""
        if len(values) != 1:
            return flow.give_up(node, values, f"'{node.op}' is not called on one tensor")
        return values[0]


# op: (modules, functions and methods, argument names after the input)
_UNARY: Mapping[str, tuple[Sequence[type | str], Sequence[Any], Sequence[str]]] = {
    "relu": ((nn.ReLU,), (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), ("inplace",)),
    "relu6": ((nn.ReLU6,), (F.relu6, "relu6", "relu6_"), ("inplace",)),
    "hardtanh": (
        (nn.Hardtanh,),
        (F.hardtanh, F.hardtanh_, "hardtanh", "hardtanh_"),
        ("min_val", "max_val", "inplace"),
    ),
    "sigmoid": (
        (nn.Sigmoid,),
        (F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"),
        (),
    ),
    "hardsigmoid": ((nn.Hardsigmoid,), (F.hardsigmoid, "hardsigmoid"), ("inplace",)),
    "silu": ((nn.SiLU,), (F.silu, "silu", "silu_"), ("inplace",)),
    "hardswish": ((nn.Hardswish,), (F.hardswish, "hardswish", "hardswish_"), ("inplace",)),
    "gelu": ((nn.GELU,), (F.gelu, "gelu"), ("approximate",)),
    "tanh": ((nn.Tanh,), (F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), ()),
    "leaky_relu": (
        (nn.LeakyReLU,),
        (F.leaky_relu, F.leaky_relu_, "leaky_relu", "leaky_relu_"),
        ("negative_slope", "inplace"),
    ),
    "elu": ((nn.ELU,), (F.elu, F.elu_, "elu", "elu_"), ("alpha", "inplace")),
    "selu": ((nn.SELU,), (F.selu, torch.selu, "selu", "selu_"), ("inplace",)),
    "celu": ((nn.CELU,), (F.celu, torch.celu, "celu", "celu_"), ("alpha", "inplace")),
    "mish": ((nn.Mish,), (F.mish, "mish", "mish_"), ("inplace",)),
    "softplus": ((nn.Softplus,), (F.softplus, "softplus"), ("beta", "threshold")),
    "softsign": ((nn.Softsign,), (F.softsign, "softsign"), ()),
    "logsigmoid": ((nn.LogSigmoid,), (F.logsigmoid, "log_sigmoid"), ()),
    "hardshrink": ((nn.Hardshrink,), (F.hardshrink, "hardshrink"), ("lambd",)),
    "softshrink": ((nn.Softshrink,), (F.softshrink, "softshrink"), ("lambd",)),
    "threshold": ((nn.Threshold,), (F.threshold, "threshold"), ("threshold", "value", "inplace")),
    "clamp": ((), (torch.clamp, torch.clip, "clamp", "clamp_", "clip"), ("min", "max")),
    "fill": ((), ("fill_", "zero_"), ("value",)),
    "exp": ((), (torch.exp, "exp"), ()),
    "sqrt": ((), (torch.sqrt, "sqrt"), ()),
    "abs": ((), (torch.abs, operator.abs, "abs"), ()),
    "neg": ((), (torch.neg, operator.neg, "neg"), ()),
    "dropout": (
        (
            nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
            nn.FeatureAlphaDropout, "torchvision.ops.stochastic_depth.StochasticDepth",
            "timm.layers.drop.DropPath",
        ),
        (
            F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
            F.feature_alpha_dropout, "dropout", "dropout_", "alpha_dropout", "feature_dropout",
        ),
        ("p", "training", "inplace"),
    ),
    "identity": (
        (nn.Identity, "gracile.nn.recurrent.Length"),
        ("contiguous", "clone", "detach", "float", "alias", "lift_fresh_copy"),
        ("memory_format",),
    ),
    "quantize": (
        ("gracile.nn.quantized.ActivationQuantizer", "gracile.nn.binary.Binarizer"), (), (),
    ),
    "step": (("gracile.nn.binary.Step",), (), ()),
}  # fmt: skip


def _unary(name: str) -> None:
    modules, functions, arguments = _UNARY[name]
    calls: dict[Any, Sequence[str]] = {}
    for f in functions:
        keys = (f,) if callable(f) else (f".{f}", f"aten.{f}")
        calls.update(dict.fromkeys(keys, ("input", *arguments)))
    attributes = tuple(a for a in arguments if a not in ("training", "memory_format"))
    if not modules:
        attributes = ()
    cls = type(
        name.capitalize(),
        (Elementwise,),
        {
            "modules": modules,
            "calls": calls,
            "attributes": attributes,
            "__doc__": f"`{name}`, element by element.",
            "__module__": __name__,
        },
    )
    oprule(name, source="torch.nn.functional")(cls)


for _name in _UNARY:
    _unary(_name)


@oprule("prelu", source="He et al. 2015, arXiv:1502.01852")
class PReLU(OpRule):
    """ReLU with a learned slope, one for all or one a channel (dim 1)."""

    modules = (nn.PReLU,)
    calls = {F.prelu: ("input", "weight"), "aten.prelu": ("input", "weight")}
    roles = ("weight",)
    attributes = ("num_parameters",)

    def complete(self, attrs: dict[str, Any], params: Mapping[str, tuple[int, ...]]) -> None:
        """Number of slopes of a functional call."""
        if "weight" in params:
            attrs.setdefault("num_parameters", params["weight"][0])

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Slopes go with their channels; a single one with none."""
        slopes = node.attrs.get("num_parameters")
        if "weight" not in node.params or len(values) != 1 or slopes is None:
            return flow.give_up(node, values, "the slope of 'prelu' is computed")
        value = values[0]
        if slopes == 1 or not isinstance(value, Axes):
            flow.protect_tensor(node.params["weight"], "a slope for all channels")
            return value
        labels = flow.along(value, node, 1, slopes)
        flow.tie(labels, flow.axis(node.params["weight"], 0), f"slopes of '{node.id}'")
        return value

    def resize(self, module: Any, kept: Kept) -> None:
        """Number of slopes."""
        module.num_parameters = module.weight.shape[0]


class Broadcast(OpRule):
    """Several tensors (or numbers), broadcast against each other from the right."""

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Tie the operands channel by channel; a size of 1 fits every channel and ties nothing."""
        shapes = [flow.shape_of(i) for i in node.inputs]
        if node.shape is None or any(s is None for s in shapes):
            return flow.give_up(node, values, f"'{node.op}' reads something that is no tensor")
        return broadcast(node, values, [s or () for s in shapes], node.shape, flow)


def broadcast(
    node: Node, values: Sequence[Value], shapes: Sequence[Shape], shape: Shape, flow: Flow
) -> Value:
    """Tie tensors of these shapes where they meet in a result of that shape."""
    dims: list[Labels | None] = []
    why = next((v.why for v in values if isinstance(v, Axes)), "made of numbers")
    for d, size in enumerate(shape):
        met: Labels | None = None
        fixed = ""
        for value, own in zip(values, shapes, strict=True):
            at = d - (len(shape) - len(own))
            if at < 0 or not isinstance(value, Axes):
                continue
            labels = value.dims[at]
            if own[at] != size:  # one value for every channel
                flow.protect(labels, f"'{node.id}' broadcasts it over channels")
            elif labels is None:
                fixed = value.why if size > 1 else fixed
            elif met is None:
                met = labels
            else:
                flow.tie(met, labels, f"'{node.id}' joins it to channels that stay")
        if met is not None and fixed:
            flow.protect(met, fixed)
            met = None
        dims.append(met)
    return Axes(tuple(dims), why)


def _binary(name: str, calls: Sequence[Any], doc: str) -> None:
    names = ("input", "other", "alpha")
    cls = type(
        name.capitalize(),
        (Broadcast,),
        {"calls": dict.fromkeys(calls, names), "__doc__": doc, "__module__": __name__},
    )
    oprule(name, source="torch: broadcasting from the right")(cls)


_binary(
    "add",
    (operator.add, operator.iadd, torch.add, ".add", ".add_", "aten.add", "aten.add_"),
    "Sum: residual connections tie the channels of both branches.",
)
_binary(
    "sub",
    (operator.sub, operator.isub, torch.sub, ".sub", ".sub_", "aten.sub", "aten.sub_", "aten.rsub"),
    "Difference.",
)
_binary(
    "mul",
    (operator.mul, operator.imul, torch.mul, ".mul", ".mul_", "aten.mul", "aten.mul_"),
    "Product: gates tie their channels to what they scale.",
)
_binary("maximum", (torch.maximum, ".maximum", "aten.maximum"), "Larger of two.")
_binary("minimum", (torch.minimum, ".minimum", "aten.minimum"), "Smaller of two.")


@oprule("div", source="torch.div")
class Div(Broadcast):
    """Quotient. A divisor with channels must be kept away from 0, where a mask puts it."""

    calls = dict.fromkeys(
        (operator.truediv, operator.itruediv, torch.div, ".div", ".div_", "aten.div", "aten.div_"),
        ("input", "other", "rounding_mode"),
    )

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels of the dividend pass."""
        divisor = values[-1]
        by_numbers = len(values) == 1 and not isinstance(node.attrs.get("input"), (int, float))
        if by_numbers or not isinstance(divisor, Axes) or not divisor.labelled:
            return super().flow(node, values, flow)
        below = node.fx.args[1] if node.fx is not None and len(node.fx.args) > 1 else None
        if node.id in flow.constant:  # as in a computed weight: proven on what is kept
            flow.statistics.add(node.id)
        elif not _never_zero(below):
            return flow.give_up(node, values, "'div' divides by channels")
        return super().flow(node, values, flow)


def _never_zero(below: Any, depth: int = 4) -> bool:
    """Whether a divisor is kept away from 0 by the operators just before it."""
    if isinstance(below, (int, float)) or not isinstance(below, fx.Node) or depth == 0:
        return isinstance(below, (int, float)) and below != 0
    name = str(getattr(below.target, "__name__", below.target)).split(".")[0].rstrip("_")
    limits = [a for a in (*below.args[1:2], below.kwargs.get("min")) if isinstance(a, (int, float))]
    if name in ("exp", "sigmoid", "softplus"):
        return True
    if name in ("clamp", "clamp_min", "add"):
        return any(n > 0 for n in limits)
    if name in ("expand", "expand_as", "reshape", "view", "unsqueeze", "sqrt", "to", "contiguous"):
        return bool(below.args) and _never_zero(below.args[0], depth - 1)
    return False


@oprule("pow", source="torch.pow")
class Pow(Elementwise):
    """Power with a positive number as exponent; others are infinite at 0, where a mask puts it."""

    calls = dict.fromkeys((operator.pow, torch.pow, ".pow", "aten.pow"), ("input", "exponent"))

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels of the base pass."""
        exponent = node.attrs.get("exponent")
        if isinstance(exponent, (int, float)) and exponent > 0:
            return super().flow(node, values, flow)
        return flow.give_up(node, values, "'pow' has an exponent that is no positive number")


class _Softmax(OpRule):
    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels pass unless they are what it normalizes over."""
        value, dim = values[0], node.attrs.get("dim")
        if not isinstance(value, Axes):
            return value
        if not isinstance(dim, int):
            return flow.give_up(node, values, f"'{node.op}' does not say its dim")
        dim %= len(value.dims)
        flow.protect(value.dims[dim], f"'{node.op}' normalizes over the channels ('{node.id}')")
        return value.with_dim(dim, None)


@oprule("softmax", source="torch.nn.functional.softmax")
class Softmax(_Softmax):
    """Softmax over one dim."""

    modules = (nn.Softmax,)
    attributes = ("dim",)
    calls = {
        F.softmax: ("input", "dim", "_stacklevel", "dtype"),
        torch.softmax: ("input", "dim", "dtype"),
        ".softmax": ("input", "dim", "dtype"),
        "aten.softmax": ("input", "dim", "dtype"),
        "aten._softmax": ("input", "dim", "half_to_float"),
    }


@oprule("log_softmax", source="torch.nn.functional.log_softmax")
class LogSoftmax(_Softmax):
    """Logarithm of the softmax over one dim."""

    modules = (nn.LogSoftmax,)
    attributes = ("dim",)
    calls = {
        F.log_softmax: ("input", "dim", "_stacklevel", "dtype"),
        torch.log_softmax: ("input", "dim", "dtype"),
        ".log_softmax": ("input", "dim", "dtype"),
        "aten.log_softmax": ("input", "dim", "dtype"),
    }


@oprule("glu", source="Dauphin et al. 2016, arXiv:1612.08083")
class GLU(OpRule):
    """Gated linear unit: the first half of a dim times the sigmoid of the second."""

    modules = (nn.GLU,)
    attributes = ("dim",)
    defaults = {"dim": -1}
    calls = {F.glu: ("input", "dim"), "aten.glu": ("input", "dim")}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """A channel goes together with its gate, so the halves stay equal."""
        value, dim = values[0], node.attrs.get("dim")
        if not isinstance(value, Axes) or not isinstance(dim, int):
            return flow.give_up(node, values, "'glu' does not say its dim")
        dim %= len(value.dims)
        labels = value.dims[dim]
        if labels is None:
            return value
        half = len(labels) // 2
        flow.tie(labels[:half], labels[half:], f"the halves of '{node.id}' belong together")
        return value.with_dim(dim, labels[:half])
