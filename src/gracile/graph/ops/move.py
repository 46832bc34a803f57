"""Operators that put indices elsewhere: roll, flip, repeat, picks by a tensor."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Flow, Labels, Value
from gracile.graph.operands import join
from gracile.graph.oprule import OpRule, oprule
from gracile.graph.ops.maths import keys


@oprule("roll", source="torch.roll")
class Roll(OpRule):
    """Shift along dims by a number that is not cut: channels along them stay."""

    calls = dict.fromkeys((torch.roll, ".roll", "aten.roll"), ("input", "shifts", "dims"))
    defaults = {"dims": None}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The other dims pass."""
        value = values[0]
        if not isinstance(value, Axes):
            return value
        dims = _dims(node.attrs.get("dims") or range(len(value.dims)), len(value.dims))
        if dims is None:
            return flow.give_up(node, values, "'roll' has dims that cannot be read")
        for d in dims:
            flow.protect(value.dims[d], f"'{node.id}' shifts the channels by a number")
            value = value.with_dim(d, None)
        return value


@oprule("flip", source="torch.flip")
class Flip(OpRule):
    """Reverse dims: channels move along."""

    calls = {
        **dict.fromkeys((torch.flip, "aten.flip"), ("input", "dims")),
        ".flip": ("input", "*dims"),
    }

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """What is left of reversed channels is what is left, reversed."""
        value = values[0]
        if not isinstance(value, Axes):
            return value
        dims = _dims(node.attrs.get("dims"), len(value.dims))
        if dims is None:
            return flow.give_up(node, values, "'flip' has dims that cannot be read")
        for d in dims:
            labels = value.dims[d]
            value = value.with_dim(d, None if labels is None else labels[::-1].copy())
        return value


@oprule("mT", source="torch.Tensor.mT")
class SwapLast(OpRule):
    """The last two dims swapped."""

    calls = {".mT": ("input", "name"), "aten.mT": ("input",)}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The channels move along."""
        value = values[0]
        if not isinstance(value, Axes):
            return value
        return Axes((*value.dims[:-2], value.dims[-1], value.dims[-2]), value.why)


@oprule("repeat", source="torch.Tensor.repeat")
class Repeat(OpRule):
    """Whole dims one after the other, several times."""

    calls = {
        ".repeat": ("input", "*repeats"), "aten.repeat": ("input", "repeats"),
        torch.tile: ("input", "repeats"), ".tile": ("input", "*repeats"),
        "aten.tile": ("input", "repeats"),
    }  # fmt: skip

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """A channel goes together with its copies."""
        value, shape = values[0], node.shape
        counts = _flat(node.attrs.get("repeats", node.attrs.get("dims", ())))
        if not isinstance(value, Axes) or shape is None or len(counts) > len(shape):
            return flow.give_up(node, values, "'repeat' does not read one tensor")
        new = len(shape) - len(value.dims)
        counts = [1] * (len(shape) - len(counts)) + counts
        dims: list[Labels | None] = [None] * new
        for labels, n in zip(value.dims, counts[new:], strict=True):
            if labels is not None and not isinstance(n, int):
                flow.protect(labels, f"'{node.id}' repeats it a computed number of times")
                labels = None
            dims.append(None if labels is None else np.tile(labels, n))
        return Axes(tuple(dims), value.why)


@oprule("repeat_interleave", source="torch.repeat_interleave")
class RepeatInterleave(OpRule):
    """Each index of a dim several times, as keys of grouped queries are."""

    calls = dict.fromkeys(keys("repeat_interleave"), ("input", "repeats", "dim"))

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """A channel goes together with its copies."""
        value, n, dim = values[0], node.attrs.get("repeats"), node.attrs.get("dim")
        if not isinstance(value, Axes) or not isinstance(n, int) or not isinstance(dim, int):
            return flow.give_up(node, values, "'repeat_interleave' has a count or dim to compute")
        labels = value.dims[dim % len(value.dims)]
        return value.with_dim(dim, None if labels is None else np.repeat(labels, n))


@oprule("expand_as", source="torch.Tensor.expand_as")
class ExpandAs(OpRule):
    """Repeat dims of size 1 as often as another tensor is large: the size follows it."""

    calls = dict.fromkeys((".expand_as", "aten.expand_as"), ("input", "other"))

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """What is repeated has the other's labels."""
        shape = flow.shape_of(node.inputs[0])
        a, b = values if len(values) == 2 else (None, None)
        if not isinstance(a, Axes) or not isinstance(b, Axes) or shape is None:
            return flow.give_up(node, values, "'expand_as' does not read two tensors")
        dims = list(b.dims)
        for d, size in enumerate(reversed(shape), 1):
            if node.shape is None or size == node.shape[-d]:
                dims[-d] = join(flow, a.dims[-d], b.dims[-d], f"'{node.id}' has its size")
            else:
                flow.protect(a.dims[-d], f"'{node.id}' repeats it")
        return Axes(tuple(dims), a.why)


@oprule("view_as", source="torch.Tensor.view_as")
class ViewAs(OpRule):
    """Another tensor's shape: the sizes follow it."""

    calls = dict.fromkeys(
        (".view_as", ".reshape_as", "aten.view_as", "aten.reshape_as"), ("input", "other")
    )

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Tied to the other dim by dim."""
        shape = flow.shape_of(node.inputs[0])
        a, b = values if len(values) == 2 else (None, None)
        if not isinstance(a, Axes) or not isinstance(b, Axes) or shape is None or not node.shape:
            return flow.give_up(node, values, "'view_as' does not read two tensors")
        moved = flow.rearranged(a, shape, node.shape, f"'{node.id}' mixes channels irregularly")
        pairs = zip(moved.dims, b.dims, strict=True)
        why = f"'{node.id}' has the size of something that stays"
        return Axes(tuple(join(flow, x, y, why) for x, y in pairs), a.why)


@oprule("index_select", source="torch.index_select")
class IndexSelect(OpRule):
    """Indices of one dim, picked by a tensor: channels along it stay."""

    calls = dict.fromkeys(keys("index_select"), ("input", "dim", "index"))

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The other dims pass."""
        value, dim = values[0], node.attrs.get("dim")
        if not isinstance(value, Axes) or not isinstance(dim, int):
            return flow.give_up(node, values, "'index_select' has a dim that cannot be read")
        flow.protect(value.dims[dim], f"'{node.id}' picks indices by a tensor")
        return value.with_dim(dim, None)


@oprule("gather", source="torch.gather")
class Gather(OpRule):
    """An index for each element: the indices' other dims are tied to the input's."""

    calls = dict.fromkeys(keys("gather"), ("input", "dim", "other"))

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels along the dim stay."""
        dim, shapes = node.attrs.get("dim"), [flow.shape_of(i) for i in node.inputs]
        a, b = values if len(values) == 2 else (None, None)
        if not isinstance(a, Axes) or not isinstance(b, Axes) or not isinstance(dim, int):
            return flow.give_up(node, values, "'gather' has a dim that cannot be read")
        dim %= len(a.dims)
        dims: list[Labels | None] = []
        for d, (x, y) in enumerate(zip(a.dims, b.dims, strict=True)):
            if d == dim or (shapes[0] or ())[d] != (shapes[1] or ())[d]:
                flow.protect(x, f"'{node.id}' picks indices by a tensor")
                dims.append(y)
            else:
                dims.append(join(flow, x, y, f"'{node.id}' picks indices by a tensor"))
        return Axes(tuple(dims), a.why)


@oprule("windows", source="torch.Tensor.unfold")
class Windows(OpRule):
    """Sliding windows along a dim, which become a new last dim."""

    calls = dict.fromkeys((".unfold", "aten.unfold"), ("input", "dim", "size", "step"))

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The other dims pass."""
        value, dim = values[0], node.attrs.get("dim", node.attrs.get("dimension"))
        if not isinstance(value, Axes) or not isinstance(dim, int):
            return flow.give_up(node, values, "'unfold' has a dim that cannot be read")
        flow.protect(value.dims[dim], f"'{node.id}' takes windows of it")
        value = value.with_dim(dim, None)
        return Axes((*value.dims, None), value.why)


@oprule("grid_sample", source="torch.nn.functional.grid_sample")
class GridSample(OpRule):
    """Pixels at computed places, channel by channel."""

    calls = {F.grid_sample: ("input", "other"), "aten.grid_sampler": ("input", "other")}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels (dim 1) pass."""
        value = values[0]
        if not isinstance(value, Axes) or len(values) != 2:
            return flow.give_up(node, values, "'grid_sample' does not read two tensors")
        flow.only(value, node, (0, 1))
        flow.protect_value(values[1], f"'{node.id}' reads places from it")
        return Axes((*value.dims[:2], *(None,) * (len(value.dims) - 2)), value.why)


def _dims(given: Any, rank: int) -> list[int] | None:
    """Dims as given: one, several, or several in one list; None if they cannot be read."""
    flat = _flat(given)
    return [d % rank for d in flat] if flat and all(isinstance(d, int) for d in flat) else None


def _flat(given: Any) -> list[Any]:
    if isinstance(given, (list, tuple, range)):
        return [v for g in given for v in _flat(g)]
    return [] if given is None else [given]
