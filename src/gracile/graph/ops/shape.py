"""Operators that move data without changing it: reshape, permute, concatenate, slice, pad."""

import operator
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from gracile.graph.channels import Channels, Fixed, Flow, Free, Several, Value
from gracile.graph.graph import Node
from gracile.graph.oprule import COMPUTED, OpRule, oprule


@oprule("flatten", source="torch.flatten")
class Flatten(OpRule):
    """Merge dims: each channel becomes as many indices as it has pixels."""

    modules = (nn.Flatten,)
    attributes = ("start_dim", "end_dim")
    defaults = {"start_dim": 0, "end_dim": -1}
    calls = dict.fromkeys(
        (torch.flatten, ".flatten", "aten.flatten"), ("input", "start_dim", "end_dim")
    )

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Every size follows from the input's, so nothing is hard-coded."""
        return rearrange(node, values, flow, adaptive=None)


@oprule("reshape", source="torch.reshape")
class Reshape(OpRule):
    """Any change of shape: exact index maps, wherever no channel count is written in numbers."""

    modules = (nn.Unflatten,)
    attributes = ("dim", "unflattened_size")
    calls = {
        torch.reshape: ("input", "shape"),
        ".reshape": ("input", "*shape"), ".view": ("input", "*shape"),
        "aten.reshape": ("input", "shape"), "aten.view": ("input", "shape"),
        "aten._unsafe_view": ("input", "shape"),
        ".unflatten": ("input", "dim", "unflattened_size"),
    }  # fmt: skip

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """A dim that is -1 or computed follows the channels; a number does not."""
        size = self._size(node, flow)
        if size is None or node.shape is None or len(size) != len(node.shape):
            return flow.give_up(node, values, "'reshape' has a shape that cannot be read")
        adaptive = [d for d, n in enumerate(size) if n in (-1, COMPUTED)]
        return rearrange(node, values, flow, adaptive)

    def _size(self, node: Node, flow: Flow) -> list[Any] | None:
        shape = flow.shape_of(node.inputs[0])
        if "unflattened_size" in node.attrs:
            dim, sizes = node.attrs.get("dim"), node.attrs["unflattened_size"]
            if not isinstance(dim, int) or shape is None:
                return None
            dim %= len(shape)
            return [COMPUTED] * dim + list(sizes) + [COMPUTED] * (len(shape) - dim - 1)
        size = node.attrs.get("shape")
        if isinstance(size, tuple) and len(size) == 1 and isinstance(size[0], tuple):
            size = size[0]
        return list(size) if isinstance(size, tuple) else None


@oprule("permute", source="torch.permute")
class Permute(OpRule):
    """Reorder the dims: the channels move along."""

    calls = {
        torch.permute: ("input", "dims"), ".permute": ("input", "*dims"),
        "aten.permute": ("input", "dims"),
        torch.transpose: ("input", "dim0", "dim1"), ".transpose": ("input", "dim0", "dim1"),
        "aten.transpose": ("input", "dim0", "dim1"),
    }  # fmt: skip

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The channels lie where their dim went."""
        value, shape = values[0], flow.shape_of(node.inputs[0])
        if isinstance(value, Fixed):
            return value
        order = _order(node.attrs, len(shape)) if shape is not None else None
        if not isinstance(value, Channels) or order is None:
            return flow.give_up(node, values, "'permute' reads no followed channels")
        return Channels(order.index(value.dim), value.atoms)


@oprule("squeeze", source="torch.squeeze")
class Squeeze(OpRule):
    """Drop dims of size 1."""

    calls = {
        torch.squeeze: ("input", "dim"), ".squeeze": ("input", "dim"),
        "aten.squeeze": ("input", "dim"),
    }  # fmt: skip

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The channels move left past what vanished."""
        value, shape = values[0], flow.shape_of(node.inputs[0])
        if isinstance(value, Fixed):
            return value
        if not isinstance(value, Channels) or shape is None or node.shape is None:
            return flow.give_up(node, values, "'squeeze' reads no followed channels")
        dims = node.attrs.get("dim")
        if dims is None:  # a batch of one, or a layer cut down to one channel, would vanish too
            return flow.give_up(node, values, "'squeeze' without a dim depends on the sizes")
        gone = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)}
        gone = {d for d in gone if shape[d] == 1}
        if value.dim in gone:
            return flow.give_up(node, values, "'squeeze' drops the channel dim")
        return Channels(value.dim - sum(d < value.dim for d in gone), value.atoms)


@oprule("unsqueeze", source="torch.unsqueeze")
class Unsqueeze(OpRule):
    """Insert a dim of size 1."""

    calls = {
        torch.unsqueeze: ("input", "dim"), ".unsqueeze": ("input", "dim"),
        "aten.unsqueeze": ("input", "dim"),
    }  # fmt: skip

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The channels move right past the new dim."""
        value, dim = values[0], node.attrs.get("dim")
        if isinstance(value, Fixed):
            return value
        if not isinstance(value, Channels) or not isinstance(dim, int) or node.shape is None:
            return flow.give_up(node, values, "'unsqueeze' reads no followed channels")
        return Channels(value.dim + (dim % len(node.shape) <= value.dim), value.atoms)


@oprule("cat", source="torch.cat")
class Cat(OpRule):
    """Concatenate: along the channels one after the other, along another dim tied together."""

    calls = dict.fromkeys(
        (torch.cat, torch.concat, torch.concatenate, "aten.cat"), ("tensors", "dim")
    )
    defaults = {"dim": 0}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The same input twice simply appears twice."""
        shapes = [flow.shape_of(i) for i in node.inputs]
        dim, tracked = node.attrs.get("dim"), [v for v in values if isinstance(v, Channels)]
        if not tracked:
            for v in values:
                flow.protect_value(v, f"'cat' of parameters ('{node.id}')")
            return next((v for v in values if isinstance(v, Fixed)), Fixed("made by 'cat'"))
        if node.shape is None or not isinstance(dim, int) or any(s is None for s in shapes):
            return flow.give_up(node, values, "'cat' has a dim that cannot be read")
        dim %= len(node.shape)
        if len({v.dim for v in tracked}) > 1:
            return flow.give_up(node, values, "'cat' joins different kinds of channels")
        along = tracked[0].dim
        parts = [
            flow.along(v, node, along, s[along])
            for v, s in zip(values, shapes, strict=True)
            if s is not None
        ]
        if dim == along:
            return Channels(dim, tuple(a for part in parts for a in part))
        for part in parts[1:]:
            flow.tie(parts[0], part)
        return Channels(along, parts[0])


@oprule("chunk", source="torch.chunk")
class Chunk(OpRule):
    """Split a dim into equal parts: the same index of every part goes together."""

    calls = {
        torch.chunk: ("input", "chunks", "dim"), ".chunk": ("input", "chunks", "dim"),
        "aten.chunk": ("input", "chunks", "dim"),
    }  # fmt: skip
    defaults = {"dim": 0}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Equal parts stay equal; other splits are protected."""
        value, shape = values[0], flow.shape_of(node.inputs[0])
        n, dim = node.attrs.get("chunks"), node.attrs.get("dim")
        if not isinstance(value, Channels) or shape is None or not isinstance(dim, int):
            return flow.give_up(node, values, "'chunk' reads no followed channels")
        if not isinstance(n, int):
            return flow.give_up(node, values, "'chunk' has a count that cannot be read")
        if dim % len(shape) != value.dim:
            return Several((value,) * n)
        width = len(value.atoms) // n
        if width * n != len(value.atoms):
            return flow.give_up(node, values, "'chunk' makes parts of different sizes")
        for k in range(1, n):
            flow.tie(value.atoms[:width], value.atoms[k * width : (k + 1) * width])
        parts = (value.atoms[k * width : (k + 1) * width] for k in range(n))
        return Several(tuple(Channels(value.dim, part) for part in parts))


@oprule("getitem", source="torch.Tensor.__getitem__")
class GetItem(OpRule):
    """Pick one of several outputs, or slice a tensor: channels pass where they are taken whole."""

    calls = {operator.getitem: ("input", "index"), ".__getitem__": ("input", "index")}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Spatial slices pass; a slice of channels has hard-coded numbers in it."""
        value, index = values[0], node.attrs.get("index")
        if isinstance(value, Several) and isinstance(index, int):
            return value.values[index]
        if isinstance(value, Fixed):
            return value
        shape = flow.shape_of(node.inputs[0])
        if not isinstance(value, Channels) or shape is None or len(values) > 1:
            return flow.give_up(node, values, "'getitem' reads no followed channels")
        place = _after_index(index if isinstance(index, tuple) else (index,), value.dim, len(shape))
        if place is None:
            return flow.give_up(node, values, "'getitem' slices the channels by number")
        return Channels(place, value.atoms)


@oprule("slice", source="aten.slice")
class Slice(OpRule):
    """One dim sliced, as torch.export writes it."""

    calls = {"aten.slice": ("input", "dim", "start", "end", "step")}
    defaults = {"dim": 0, "start": 0, "end": None, "step": 1}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels pass where they are taken whole."""
        value, shape, a = values[0], flow.shape_of(node.inputs[0]), node.attrs
        if isinstance(value, Fixed):
            return value
        if not isinstance(value, Channels) or shape is None or not isinstance(a.get("dim"), int):
            return flow.give_up(node, values, "'slice' reads no followed channels")
        whole = a["start"] in (0, None) and a["step"] == 1
        whole = whole and (a["end"] is None or a["end"] >= 2**62)
        if a["dim"] % len(shape) != value.dim or whole:
            return value
        return flow.give_up(node, values, "'slice' slices the channels by number")


@oprule("pad", source="torch.nn.functional.pad")
class Pad(OpRule):
    """Pad the last dims: channels pass where they are not padded themselves."""

    modules = (
        nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d,
        nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
        nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    )  # fmt: skip
    attributes = ("padding", "value")
    defaults = {"mode": "constant", "value": None}
    calls = {
        F.pad: ("input", "padding", "mode", "value"),
        torch.constant_pad_nd: ("input", "padding", "value"),
        "aten.pad": ("input", "padding", "mode", "value"),
        "aten.constant_pad_nd": ("input", "padding", "value"),
    }

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """A padded channel dim has its width written in numbers; `ChannelPad` does not."""
        value, shape = values[0], flow.shape_of(node.inputs[0])
        padding = node.attrs.get("padding")
        if isinstance(value, Fixed):
            return value
        if not isinstance(value, Channels) or shape is None or not isinstance(padding, Sequence):
            return flow.give_up(node, values, "'pad' reads no followed channels")
        at = 2 * (len(shape) - 1 - value.dim)
        if all(p == 0 for p in padding[at : at + 2]):
            return value
        return flow.give_up(node, values, "'pad' pads the channels by a fixed number")


@oprule("channel_pad", source="He et al. 2015, arXiv:1512.03385, section 3.3, option A")
class ChannelPad(OpRule):
    """Zero channels around the input's; `source` says for each output which input it copies."""

    modules = ("gracile.nn.shortcut.ChannelPad",)
    attributes = ("source", "in_channels", "stride", "front", "back")

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """A copied channel goes with its copy; a zero channel is its own."""
        source = node.attrs["source"]
        fed = flow.along(values[0], node, 1, node.attrs["in_channels"])
        at = f"{node.module}.source"
        flow.tie(fed, flow.axis(at, 1))
        out = tuple(flow.axis(at, 0))
        copied = [(o, i) for o, i in enumerate(source) if i >= 0]
        flow.tie([out[o] for o, _ in copied], [fed[i] for _, i in copied])
        return Channels(1, out)

    def attribute_size(self, module: Any, name: str, dim: int) -> int | None:
        """`source`: dim 0 counts output channels, dim 1 input channels."""
        sizes = {("source", 0): module.out_channels, ("source", 1): module.in_channels}
        return sizes.get((name, dim))

    def cut_attribute(self, module: Any, name: str, dim: int, keep: Sequence[int]) -> None:
        """Cut the map."""
        module.cut(dim, keep)


@oprule("size", source="torch.Tensor.size")
class Size(OpRule):
    """A size or what is computed from sizes: numbers, no channels."""

    calls = {".size": ("input", "dim"), ".dim": ("input",), ".numel": ("input",), getattr: ()}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Nothing flows; whoever uses the number follows the cut or is found out by the proof."""
        return Fixed("a size")


def rearrange(
    node: Node, values: Sequence[Value], flow: Flow, adaptive: Sequence[int] | None
) -> Value:
    """Follow channels through a change of shape by moving their atoms as the data would move.

    Where one dim of channels is split in two, the part whose size is computed stays a channel dim
    and the indices of the part whose size is a number are tied: (C) -> (2, C/2) keeps both halves
    equally wide, as a channel shuffle needs.

    Args:
        adaptive: output dims whose size follows the input's; None if all do.
    """
    value, shape = values[0], flow.shape_of(node.inputs[0])
    if isinstance(value, Fixed):
        return value
    if len(values) != 1 or isinstance(value, (Free, Several)) or shape is None or not node.shape:
        return flow.give_up(node, values, f"'{node.op}' reads no followed channels")
    made = node.shape
    if made[0] == shape[0] and value.dim > 0:  # the batch is not touched: one sample will do
        shape, made = (1, *shape[1:]), (1, *made[1:])
    place = [1] * len(shape)
    place[value.dim] = -1
    atoms = np.array([flow.find(a) for a in value.atoms]).reshape(place)
    moved = np.broadcast_to(atoms, shape).reshape(made)
    varying = [d for d in range(len(made)) if _varies(moved, d)]
    free = [d for d in varying if adaptive is None or d in adaptive]
    if len(free) != 1 or (adaptive is None and len(varying) != 1):
        why = "has the number of channels written in it" if varying else "reads a single channel"
        return flow.give_up(node, values, f"'{node.op}' {why}")
    dim = free[0]
    rows = np.moveaxis(moved, dim, 0).reshape(made[dim], prod(made) // made[dim])
    for row in rows:
        flow.tie_all(np.unique(row).tolist())
    return Channels(dim, tuple(flow.find(int(row[0])) for row in rows))


def _varies(array: "np.ndarray[Any, Any]", dim: int) -> bool:
    first = array.take([0], axis=dim)
    return bool((array != first).any())


def _order(attrs: Mapping[str, Any], rank: int) -> list[int] | None:
    """For each output dim the input dim it comes from."""
    if "dim0" in attrs:
        a, b = attrs["dim0"], attrs["dim1"]
        if not isinstance(a, int) or not isinstance(b, int):
            return None
        order = list(range(rank))
        order[a % rank], order[b % rank] = b % rank, a % rank
        return order
    dims = attrs.get("dims", ())
    if len(dims) == 1 and isinstance(dims[0], (list, tuple)):
        dims = dims[0]
    if len(dims) != rank or not all(isinstance(d, int) for d in dims):
        return None
    return [d % rank for d in dims]


def _after_index(index: Sequence[Any], dim: int, rank: int) -> int | None:
    """Where dim lies after basic indexing; None if it is not taken whole."""
    used = sum(i is not None and i is not Ellipsis for i in index)
    full: list[Any] = []
    for i in index:
        full += [slice(None)] * (rank - used) if i is Ellipsis else [i]
    full += [slice(None)] * (rank - sum(i is not None for i in full))
    source = target = 0
    for i in full:
        if i is None:
            target += 1
        elif isinstance(i, slice):
            if source == dim:
                return target if i in (slice(None), slice(0, None), slice(None, None, 1)) else None
            source, target = source + 1, target + 1
        elif isinstance(i, int):
            if source == dim:
                return None
            source += 1
        else:
            return None
    return None
