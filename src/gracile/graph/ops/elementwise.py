"""Operators that work on each element by itself: activations, dropout, sums and products."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gracile.graph.channels import Channels, Fixed, Flow, Free, Value
from gracile.graph.graph import Node
from gracile.graph.oprule import Kept, OpRule, oprule


class Elementwise(OpRule):
    """One tensor in, the same shape out, each element by itself: channels pass.

    f(0) need not be 0: a removed channel's readers lose their weights for it as well.
    """

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """What comes in goes out; a bare parameter cannot be followed through."""
        if len(values) != 1 or isinstance(values[0], Free):
            return flow.give_up(node, values, f"'{node.op}' is applied to a parameter")
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
    "exp": ((), (torch.exp, "exp"), ()),
    "sqrt": ((), (torch.sqrt, "sqrt"), ()),
    "abs": ((), (torch.abs, operator.abs, "abs"), ()),
    "neg": ((), (torch.neg, operator.neg, "neg"), ()),
    "dropout": (
        (
            nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
            nn.FeatureAlphaDropout,
        ),
        (
            F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
            F.feature_alpha_dropout, "dropout", "dropout_", "alpha_dropout", "feature_dropout",
        ),
        ("p", "training", "inplace"),
    ),
    "identity": (
        (nn.Identity,),
        ("contiguous", "clone", "detach", "float", "alias", "lift_fresh_copy"),
        ("memory_format",),
    ),
    "quantize": (("gracile.nn.quantized.ActivationQuantizer",), (), ()),
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
        if slopes == 1:
            flow.protect_tensor(node.params["weight"], "a slope for all channels")
            return values[0]
        atoms = flow.along(values[0], node, 1, slopes)
        flow.tie(atoms, flow.axis(node.params["weight"], 0))
        return Channels(1, atoms)

    def resize(self, module: Any, kept: Kept) -> None:
        """Number of slopes."""
        module.num_parameters = module.weight.shape[0]


class Broadcast(OpRule):
    """Several tensors (or numbers), broadcast against each other from the right."""

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Tie the operands channel by channel; a size of 1 fits every channel and ties nothing."""
        if node.shape is None:
            return flow.give_up(node, values, f"'{node.op}' does not make one tensor")
        shapes = [flow.shape_of(i) for i in node.inputs]
        if any(s is None for s in shapes):
            return flow.give_up(node, values, f"'{node.op}' reads something that is no tensor")
        rank = len(node.shape)
        shift = [rank - len(s or ()) for s in shapes]
        dims = {
            v.dim + k
            for v, k in zip(values, shift, strict=True)
            if isinstance(v, Channels) and len(v.atoms) == node.shape[v.dim + k]
        }
        if not dims:
            reason = next((v.why for v in values if isinstance(v, Fixed)), "made of parameters")
            for v in values:
                flow.protect_value(v, f"'{node.op}' has no channels to follow ('{node.id}')")
            return Fixed(reason)
        if len(dims) > 1:
            return flow.give_up(node, values, f"'{node.op}' crosses two kinds of channels")
        dim = dims.pop()
        return Channels(dim, self._tie(node, values, shapes, dim, flow))

    def _tie(
        self,
        node: Node,
        values: Sequence[Value],
        shapes: Sequence[tuple[int, ...] | None],
        dim: int,
        flow: Flow,
    ) -> tuple[int, ...]:
        shape = node.shape or ()
        base: tuple[int, ...] | None = None
        for value, own in zip(values, shapes, strict=True):
            own = own or ()
            at = dim - (len(shape) - len(own))
            if at < 0 or (own[at] == 1 and shape[dim] > 1):
                continue  # the same for every channel
            atoms = flow.along(value, node, at, shape[dim])
            if base is not None:
                flow.tie(base, atoms)
            base = base or atoms
        return base or ()


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
    """Quotient. A divisor with channels of its own is not cut: a masked one would divide by 0."""

    calls = dict.fromkeys(
        (operator.truediv, operator.itruediv, torch.div, ".div", ".div_", "aten.div", "aten.div_"),
        ("input", "other", "rounding_mode"),
    )

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels of the dividend pass."""
        if not isinstance(node.attrs.get("input"), (int, float)) and len(values) == 1:
            return super().flow(node, values, flow)
        return flow.give_up(node, values, "'div' divides by a tensor")


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
        shape, dim = node.shape, node.attrs.get("dim")
        if isinstance(values[0], Channels) and shape is not None and isinstance(dim, int):
            if dim % len(shape) != values[0].dim:
                return values[0]
            return flow.give_up(node, values, f"'{node.op}' normalizes over the channels")
        if isinstance(values[0], Fixed):
            return values[0]
        return flow.give_up(node, values, f"'{node.op}' does not say its dim")


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
        value, shape = values[0], flow.shape_of(node.inputs[0])
        dim = node.attrs.get("dim")
        if not isinstance(value, Channels) or shape is None or not isinstance(dim, int):
            return flow.give_up(node, values, "'glu' reads no followed channels")
        if dim % len(shape) != value.dim:
            return value
        half = len(value.atoms) // 2
        flow.tie(value.atoms[:half], value.atoms[half:])
        return Channels(value.dim, value.atoms[:half])
