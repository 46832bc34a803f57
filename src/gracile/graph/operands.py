"""Operands of a call by the names of its arguments, and what happens where two of them meet."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from gracile.graph.graph import Node
from gracile.graph.labels import KEPT, Axes, Flow, Labels, Shape, Value


@dataclass(frozen=True)
class Operand:
    """One tensor (or several) that a call reads.

    Attributes:
        value: what is known about its channels.
        shape: None if it is not one tensor.
        node: that made it.
    """

    value: Value
    shape: Shape | None
    node: fx.Node | None = None

    @property
    def axes(self) -> Axes | None:
        """Its labels; None if it is not one tensor."""
        return self.value if isinstance(self.value, Axes) and self.shape is not None else None


def operands(
    node: Node, values: Sequence[Value], flow: Flow, names: Sequence[str]
) -> dict[str, Operand]:
    """Argument name -> the operand it is given; numbers and what is left out are not there.

    `node.inputs` names each input of a module once, however often the call reads it; this does not.
    A tensor in a list or tuple is called `name.0`, `name.1`.
    """
    known = {id: Operand(v, flow.shape_of(id)) for id, v in zip(node.inputs, values, strict=True)}
    if node.fx is None:
        return dict(zip(names, known.values(), strict=False))
    given = {**dict(zip(names, node.fx.args, strict=False)), **node.fx.kwargs}
    out: dict[str, Operand] = {}
    for name, value in given.items():
        parts = {name: value}
        if isinstance(value, (list, tuple)):
            parts = {f"{name}.{k}": v for k, v in enumerate(value)}
        for key, part in parts.items():
            if isinstance(part, fx.Node) and (id := part.meta.get("id")) in known:
                out[key] = Operand(known[id].value, known[id].shape, part)
    return out


def argument(node: Node, names: Sequence[str], name: str, default: Any = None) -> Any:
    """What the forward gives a module's argument: a plain value or an fx node."""
    if node.fx is None:
        return default
    given = {**dict(zip(names, node.fx.args, strict=False)), **node.fx.kwargs}
    return given.get(name, default)


def join(flow: Flow, a: Labels | None, b: Labels | None, why: str) -> Labels | None:
    """Tie two dims of one size that meet; one that meets a dim without labels stays."""
    if a is None or b is None:
        flow.protect(a, why)
        flow.protect(b, why)
        return None
    flow.tie(a, b, why)
    return a


def known(labels: Labels | None, size: int) -> Labels:
    """Labels of a dim of this size, of indices that cannot go where it has none."""
    return np.full(size, KEPT, dtype=np.int64) if labels is None else labels
