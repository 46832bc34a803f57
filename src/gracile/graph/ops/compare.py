"""Comparisons, logic and choices: several tensors, element by element."""

import operator
from collections.abc import Sequence
from typing import Any

import torch

from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Flow, Value
from gracile.graph.oprule import oprule
from gracile.graph.ops.elementwise import Broadcast
from gracile.graph.ops.maths import keys

_TWO = {
    "eq": (operator.eq,),
    "ne": (operator.ne,),
    "lt": (operator.lt,),
    "le": (operator.le,),
    "gt": (operator.gt,),
    "ge": (operator.ge,),
    "logical_and": (),
    "logical_or": (),
    "logical_xor": (),
    "bitwise_and": (operator.and_, ".__and__", "aten.__and__"),
    "bitwise_or": (operator.or_, ".__or__", "aten.__or__"),
    "bitwise_xor": (operator.xor,),
    "atan2": (),
    "lerp": (),
    "addcmul": (),
}


def _add(name: str, base: type[Broadcast], more: Sequence[Any], names: Sequence[str]) -> None:
    cls = type(
        name.title().replace("_", ""),
        (base,),
        {
            "calls": dict.fromkeys(keys(name, *more), names),
            "__doc__": f"`{name}`, element by element.",
            "__module__": __name__,
        },
    )
    oprule(name, source=f"torch.{name}")(cls)


class _Divided(Broadcast):
    """A divisor with channels of its own is not cut: a masked one would divide by 0."""

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels of the dividend pass."""
        last = values[-1] if values else None
        number = isinstance(node.attrs.get("input"), (int, float))
        if number or (len(values) > 1 and isinstance(last, Axes) and last.labelled):
            return flow.give_up(node, values, f"'{node.op}' divides by channels")
        return super().flow(node, values, flow)


for _name, _more in _TWO.items():
    _add(_name, Broadcast, _more, ("input", "other"))
_add("floor_divide", _Divided, (operator.floordiv,), ("input", "other"))
_add("remainder", _Divided, (operator.mod,), ("input", "other"))
_add("fmod", _Divided, (), ("input", "other"))


@oprule("where", source="torch.where")
class Where(Broadcast):
    """One of two by a condition: all three are tied."""

    calls = {
        torch.where: ("condition", "input", "other"),
        ".where": ("input", "condition", "other"),
        "aten.where": ("condition", "input", "other"),
    }


@oprule("masked_fill", source="torch.Tensor.masked_fill")
class MaskedFill(Broadcast):
    """A number where a mask is true; a mask of one value a channel ties it to them."""

    calls = dict.fromkeys(keys("masked_fill"), ("input", "mask", "value"))
