"""Mathematical functions of each element by itself, beside the activations."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Flow, Value
from gracile.graph.oprule import OpRule, oprule
from gracile.graph.ops.elementwise import Elementwise


def keys(name: str, *more: Any) -> list[Any]:
    """What one function is called by: torch's, the method's, the aten operator's."""
    f: Callable[..., Any] | None = getattr(torch, name, None)
    own = [f] if callable(f) else []
    return [*own, f".{name}", f".{name}_", f"aten.{name}", f"aten.{name}_", *more]


# op: (modules, functions beside torch's)
_FINITE: Mapping[str, tuple[Sequence[type], Sequence[Any]]] = {
    "square": ((), ()),
    "erf": ((), ()),
    "erfc": ((), ()),
    "sin": ((), ()),
    "cos": ((), ()),
    "atan": ((), ()),
    "sinh": ((), ()),
    "cosh": ((), ()),
    "log1p": ((), ()),
    "expm1": ((), ()),
    "exp2": ((), ()),
    "sign": ((), ()),
    "floor": ((), ()),
    "ceil": ((), ()),
    "round": ((), (round,)),
    "trunc": ((), ()),
    "frac": ((), ()),
    "sinc": ((), ()),
    "positive": ((), (operator.pos,)),
    "nan_to_num": ((), ()),
    "clamp_min": ((), ()),
    "clamp_max": ((), ()),
    "tanhshrink": ((nn.Tanhshrink,), (F.tanhshrink,)),
    "logical_not": ((), ()),
    "bitwise_not": ((), (operator.invert,)),
    "isnan": ((), ()),
    "isinf": ((), ()),
    "isfinite": ((), ()),
}
_SINGULAR = ("log", "log2", "log10", "rsqrt", "reciprocal")


class Singular(OpRule):
    """A function that is infinite at zero, where a mask puts a channel: channels stay."""

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Dims without channels pass."""
        value = values[0] if len(values) == 1 else None
        if isinstance(value, Axes) and node.id in flow.constant:
            flow.statistics.add(node.id)  # as in a computed weight: proven on what is kept
        elif not isinstance(value, Axes) or value.labelled:
            return flow.give_up(node, values, f"'{node.op}' is infinite at zero")
        return value


def _add(name: str, base: type[OpRule], modules: Sequence[type], more: Sequence[Any]) -> None:
    cls = type(
        name.title().replace("_", ""),
        (base,),
        {
            "modules": tuple(modules),
            "calls": dict.fromkeys(keys(name, *more), ("input",)),
            "__doc__": f"`{name}`, element by element.",
            "__module__": __name__,
        },
    )
    oprule(name, source=f"torch.{name}")(cls)


for _name, (_modules, _more) in _FINITE.items():
    _add(_name, Elementwise, _modules, _more)
for _name in _SINGULAR:
    _add(_name, Singular, (), ())
