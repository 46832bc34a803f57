"""Operators that put tensors together or take parts of them: concatenate, split, slice, pad."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from gracile.graph.graph import Node
from gracile.graph.labels import KEPT, Axes, Flow, Labels, Several, Value
from gracile.graph.maps import ChannelMap
from gracile.graph.oprule import OpRule, oprule
from gracile.nn import maps


@oprule("cat", source="torch.cat")
class Cat(OpRule):
    """Concatenate: one after the other along a dim, tied together along the others."""

    calls = dict.fromkeys(
        (torch.cat, torch.concat, torch.concatenate, "aten.cat"), ("tensors", "dim")
    )
    defaults = {"dim": 0}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The same input twice simply appears twice."""
        dim, shapes = node.attrs.get("dim"), [flow.shape_of(i) for i in node.inputs]
        axes = [v for v in values if isinstance(v, Axes)]
        if node.shape is None or not isinstance(dim, int) or len(axes) != len(values):
            return flow.give_up(node, values, "'cat' has a dim that cannot be read")
        dim %= len(node.shape)
        parts = [(v, s) for v, s in zip(axes, shapes, strict=True) if s is not None and s != (0,)]
        dims: list[Labels | None] = []
        for d in range(len(node.shape)):
            mine = [(v.dims[d], s[d]) for v, s in parts]
            dims.append(_joined(mine) if d == dim else _together(mine, node, flow))
        return Axes(tuple(dims), axes[0].why)


@oprule("stack", source="torch.stack")
class Stack(OpRule):
    """A new dim of tensors side by side: their other dims are tied."""

    calls = dict.fromkeys((torch.stack, "aten.stack"), ("tensors", "dim"))
    defaults = {"dim": 0}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The new dim has no channels."""
        dim, axes = node.attrs.get("dim"), [v for v in values if isinstance(v, Axes)]
        if node.shape is None or not isinstance(dim, int) or len(axes) != len(values):
            return flow.give_up(node, values, "'stack' has a dim that cannot be read")
        dims: list[Labels | None] = []
        shape = flow.shape_of(node.inputs[0]) or ()
        for d, size in enumerate(shape):
            dims.append(_together([(v.dims[d], size) for v in axes], node, flow))
        dims.insert(dim % len(node.shape), None)
        return Axes(tuple(dims), axes[0].why)


class _Parts(OpRule):
    """Several outputs, one after the other along a dim."""

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Each part has its own labels; where they are channels, a map keeps the sizes."""
        value, dim = values[0], node.attrs.get("dim")
        if not isinstance(value, Axes) or not isinstance(dim, int):
            return flow.give_up(node, values, f"'{node.op}' has a dim that cannot be read")
        dim %= len(value.dims)
        labels, size = value.dims[dim], (flow.shape_of(node.inputs[0]) or ())[dim]
        sizes = self.sizes(node, size)
        if sizes is None:
            return flow.give_up(node, values, f"'{node.op}' has sizes that cannot be read")
        if labels is None:
            return Several((value,) * len(sizes))
        home = node.module
        if home is None:
            fed = None if node.fx is None else node.fx.args[0]
            map_ = None if fed is None else ChannelMap(maps.Split(sizes, dim), (fed,))
            home = flow.channel_map(node, map_)
        parts, at = [], 0
        for k, n in enumerate(sizes):
            part = labels[at : at + n]
            flow.tie(flow.map_axis(f"{home}.sizes", k, n), part, f"the sizes of '{node.id}'")
            parts.append(value.with_dim(dim, part))
            at += n
        return Several(tuple(parts))

    def sizes(self, node: Node, size: int) -> list[int] | None:
        """Lengths of the parts of a dim of this size; None if they cannot be read."""
        raise TypeError(f"{type(self).__name__} must say how it splits")


@oprule("chunk", source="torch.chunk")
class Chunk(_Parts):
    """Split a dim into equal parts."""

    calls = {
        torch.chunk: ("input", "chunks", "dim"), ".chunk": ("input", "chunks", "dim"),
        "aten.chunk": ("input", "chunks", "dim"),
    }  # fmt: skip
    defaults = {"dim": 0}

    def sizes(self, node: Node, size: int) -> list[int] | None:
        """As torch does it: all equal but perhaps the last."""
        n = node.attrs.get("chunks")
        return _steps(size, -(-size // n)) if isinstance(n, int) else None


@oprule("split", source="torch.split")
class Split(_Parts):
    """Split a dim into parts of given sizes."""

    modules = ("gracile.nn.maps.Split",)
    attributes = ("sizes", "dim")
    calls = {
        torch.split: ("input", "sizes", "dim"), ".split": ("input", "sizes", "dim"),
        "aten.split": ("input", "sizes", "dim"), "aten.split_with_sizes": ("input", "sizes", "dim"),
        torch.split_with_sizes: ("input", "sizes", "dim"),
        ".split_with_sizes": ("input", "sizes", "dim"),
    }  # fmt: skip
    defaults = {"dim": 0}

    def sizes(self, node: Node, size: int) -> list[int] | None:
        """The given sizes; computed ones as for the example."""
        given = node.attrs.get("sizes", node.attrs.get("split_size_or_sections"))
        if isinstance(given, int):
            return _steps(size, given)
        if isinstance(given, (tuple, list)) and all(isinstance(n, int) for n in given):
            return list(given)
        return None

    def attribute_size(self, module: Any, name: str, dim: int) -> int | None:
        """Length of a part."""
        return module.sizes[dim] if name == "sizes" and dim < len(module.sizes) else None

    def cut_attribute(self, module: Any, name: str, dim: int, keep: Sequence[int]) -> None:
        """Set the length of a part."""
        module.sizes[dim] = len(keep)


@oprule("unbind", source="torch.unbind")
class Unbind(OpRule):
    """One output for each index of a dim: none of them can go."""

    calls = dict.fromkeys((torch.unbind, ".unbind", "aten.unbind"), ("input", "dim"))
    defaults = {"dim": 0}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The dim vanishes; the others stay."""
        value, dim = values[0], node.attrs.get("dim")
        if not isinstance(value, Axes) or not isinstance(dim, int):
            return flow.give_up(node, values, "'unbind' has a dim that cannot be read")
        dim %= len(value.dims)
        flow.protect(value.dims[dim], f"'{node.id}' takes it apart by number")
        n = (flow.shape_of(node.inputs[0]) or ())[dim]
        one = Axes(value.dims[:dim] + value.dims[dim + 1 :], value.why)
        return Several((one,) * n)


@oprule("getitem", source="torch.Tensor.__getitem__")
class GetItem(OpRule):
    """Pick one of several outputs, or index a tensor."""

    calls = {operator.getitem: ("input", "index"), ".__getitem__": ("input", "index")}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Slices of channels by number become a channel map."""
        value, index = values[0], node.attrs.get("index")
        if isinstance(value, Several):
            if isinstance(index, int):
                return value.values[index]
            if isinstance(index, slice):
                return Several(value.values[index])
        if not isinstance(value, Axes):
            return value
        if node.shape is None:
            return flow.give_up(node, values, "'getitem' does not make one tensor")
        given = node.fx.args[1] if node.fx is not None and len(node.fx.args) > 1 else index
        return indexed(node, value, given, flow)


@oprule("index", source="torch.Tensor.index: aten.index")
class Index(OpRule):
    """Tensors as indices: dims that are indexed whole pass."""

    calls = {"aten.index": ("input", "indices")}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """As `x[i, :, j]` with tensors i, j."""
        value = values[0]
        if not isinstance(value, Axes) or node.fx is None:
            return flow.give_up(node, values, "'index' reads no tensor")
        given: Any = node.fx.args[1]
        return indexed(node, value, tuple(slice(None) if i is None else i for i in given), flow)


@oprule("slice", source="aten.slice")
class Slice(OpRule):
    """One dim sliced."""

    calls = {
        "aten.slice": ("input", "dim", "start", "end", "step"),
        torch.narrow: ("input", "dim", "start", "length"),
        ".narrow": ("input", "dim", "start", "length"),
        "aten.narrow": ("input", "dim", "start", "length"),
    }  # fmt: skip
    defaults = {"dim": 0, "start": 0, "end": None, "step": 1}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels that are sliced by number become a channel map."""
        value, a = values[0], node.attrs
        if not isinstance(value, Axes):
            return value
        if not isinstance(a.get("dim"), int):
            return flow.give_up(node, values, "'slice' has a dim that cannot be read")
        dim = a["dim"] % len(value.dims)
        labels = value.dims[dim]
        if labels is None:
            return value
        start, end = a["start"], a["end"]
        if "length" in a:
            end = start + a["length"] if isinstance(start, int) else "?"
        if not isinstance(start, int | None) or not isinstance(end, int | None):
            return flow.give_up(node, values, "'slice' has limits that cannot be read")
        chosen = range(len(labels))[slice(start, end, a["step"])]
        return taken(
            node, value, dim, list(chosen), flow, whole_is_free=end is None or end >= 2**31
        )


@oprule("select", source="torch.select")
class Select(OpRule):
    """One index of a dim, which vanishes."""

    calls = dict.fromkeys((torch.select, ".select", "aten.select"), ("input", "dim", "index"))

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """What is picked by number stays."""
        value, dim = values[0], node.attrs.get("dim")
        if not isinstance(value, Axes) or not isinstance(dim, int):
            return flow.give_up(node, values, "'select' has a dim that cannot be read")
        dim %= len(value.dims)
        flow.protect(value.dims[dim], f"'{node.id}' picks an index by number")
        return Axes(value.dims[:dim] + value.dims[dim + 1 :], value.why)


@oprule("take", source="torch.index_select, with the indices as data")
class Take(OpRule):
    """A channel map: chosen indices of one dim."""

    modules = ("gracile.nn.maps.Take", "gracile.nn.chain.Order")
    attributes = ("source", "size", "dim", "then")

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """A copied channel goes with its copies."""
        value, a = values[0], node.attrs
        if not isinstance(value, Axes):
            return value
        out = _take(node, value, a["dim"], list(a["source"]), f"{node.module}.source", flow)
        return out if a["then"] is None else indexed(node, out, a["then"], flow)

    def attribute_size(self, module: Any, name: str, dim: int) -> int | None:
        """`source`: dim 0 counts outputs, dim 1 inputs."""
        return {("source", 0): len(module.source), ("source", 1): module.size}.get((name, dim))

    def cut_attribute(self, module: Any, name: str, dim: int, keep: Sequence[int]) -> None:
        """Cut the map."""
        module.cut(dim, keep)


@oprule("channel_shuffle", source="Zhang et al. 2018, arXiv:1707.01083")
class ChannelShuffle(OpRule):
    """Channels of the groups by turns: another order of channels, kept in a channel map."""

    modules = (nn.ChannelShuffle,)
    attributes = ("groups",)
    calls = dict.fromkeys((torch.channel_shuffle, "aten.channel_shuffle"), ("input", "groups"))

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channel j of group i goes to place (j, i)."""
        value, groups = values[0], node.attrs.get("groups")
        if not isinstance(value, Axes) or not isinstance(groups, int):
            return flow.give_up(node, values, "'channel_shuffle' has groups that cannot be read")
        labels = value.dims[1]
        if labels is None:
            return value
        order = np.arange(len(labels)).reshape(groups, -1).T.reshape(-1).tolist()
        return _mapped(node, value, node.fx and node.fx.args[0], 1, order, flow)


@oprule("pad", source="torch.nn.functional.pad")
class Pad(OpRule):
    """Pad the last dims: padded channels stay where they are, around those that may go."""

    modules = (
        nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d,
        nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
        nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d,
        nn.CircularPad2d, nn.CircularPad3d,
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
        """Only a constant padding of channels leaves each channel by itself."""
        value, padding = values[0], node.attrs.get("padding")
        if not isinstance(value, Axes):
            return value
        if not isinstance(padding, Sequence):
            return flow.give_up(node, values, "'pad' has a padding that cannot be read")
        dims = list(value.dims)
        for k in range(len(padding) // 2):
            d, around = len(dims) - 1 - k, padding[2 * k : 2 * k + 2]
            labels = dims[d]
            if labels is None or all(p == 0 for p in around):
                continue
            if not all(isinstance(p, int) for p in around) or min(around) < 0 or (
                node.module is None and node.attrs.get("mode") not in ("constant", None)
            ):  # fmt: skip
                flow.protect(
                    labels, f"'{node.id}' pads the channels with others or by a computed number"
                )
                dims[d] = None
            else:
                dims[d] = np.pad(labels, around, constant_values=KEPT)
        return Axes(tuple(dims), value.why)


@oprule("channel_pad", source="He et al. 2015, arXiv:1512.03385, section 3.3, option A")
class ChannelPad(OpRule):
    """Zero channels around the input's; `source` says for each output which input it copies."""

    modules = ("gracile.nn.shortcut.ChannelPad",)
    attributes = ("source", "in_channels", "stride", "front", "back")

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """A copied channel goes with its copy; a zero channel is its own."""
        value, source = values[0], node.attrs["source"]
        if not isinstance(value, Axes):
            return value
        at, why = f"{node.module}.source", f"'{node.id}' copies channels that stay"
        fed = flow.along(value, node, 1, node.attrs["in_channels"])
        flow.tie(flow.axis(at, 1), fed, why)
        out = flow.axis(at, 0)
        copied = [(o, i) for o, i in enumerate(source) if i >= 0]
        flow.tie(out[[o for o, _ in copied]], fed[[i for _, i in copied]], why)
        return value.with_dim(1, out)

    def attribute_size(self, module: Any, name: str, dim: int) -> int | None:
        """`source`: dim 0 counts output channels, dim 1 input channels."""
        sizes = {("source", 0): module.out_channels, ("source", 1): module.in_channels}
        return sizes.get((name, dim))

    def cut_attribute(self, module: Any, name: str, dim: int, keep: Sequence[int]) -> None:
        """Cut the map."""
        module.cut(dim, keep)


def indexed(node: Node, value: Axes, index: Any, flow: Flow) -> Value:
    """Basic and tensor indexing of a tensor; slices of channels become a map."""
    index = index if isinstance(index, tuple) else (index,)
    rank = len(value.dims)
    used = sum(i is not None and i is not Ellipsis for i in index)
    full: list[Any] = []
    for i in index:
        full += [slice(None)] * (rank - used) if i is Ellipsis else [i]
    full += [slice(None)] * (rank - sum(i is not None for i in full))
    dims: list[Labels | None] = []
    partial: list[tuple[int, list[int]]] = []
    tensors: list[int] = []
    source = 0
    for i in full:
        if i is None:
            dims.append(None)
            continue
        labels = value.dims[source]
        if isinstance(i, slice):
            dims.append(labels)
            if labels is not None and i != slice(None):
                if not all(isinstance(n, int | None) for n in (i.start, i.stop, i.step)):
                    flow.protect(labels, f"'{node.id}' slices the channels by a computed number")
                    dims[-1] = None
                else:
                    partial.append((len(dims) - 1, list(range(len(labels))[i])))
                    if len(partial[-1][1]) == len(labels) and i.stop in (None, 2**63 - 1):
                        partial.pop()
        elif isinstance(i, int):
            flow.protect(labels, f"'{node.id}' picks an index by number")
        elif labels is not None and (chosen := _chosen(i)) is not None:
            dims.append(labels)
            partial.append((len(dims) - 1, chosen))
        else:
            flow.protect(labels, f"'{node.id}' picks indices by a tensor")
            tensors.append(len(dims))
        source += 1
    if tensors:
        return _with_tensor(node, value, dims, tensors, partial, flow)
    if not partial:
        return Axes(tuple(dims), value.why)
    return _sliced(node, value, full, flow)


def taken(
    node: Node, value: Axes, dim: int, chosen: list[int], flow: Flow, *, whole_is_free: bool
) -> Value:
    """Chosen indices of a dim of channels, by a channel map."""
    labels = value.dims[dim]
    if labels is None or (whole_is_free and chosen == list(range(len(labels)))):
        return value
    return _mapped(node, value, node.fx and node.fx.args[0], dim, chosen, flow)


def _chosen(index: Any) -> list[int] | None:
    """The indices that a list or a constant tensor of the forward picks; None for others."""
    if isinstance(index, fx.Node) and index.op == "get_attr":
        home: Any = index.graph.owning_module
        for name in str(index.target).split("."):
            home = getattr(home, name, None)
        if not isinstance(home, torch.Tensor) or home.ndim != 1 or home.dtype != torch.int64:
            return None
        index = home.tolist()
    if isinstance(index, (list, tuple)) and all(type(i) is int for i in index):
        return [int(i) for i in index]
    return None


def shuffled(node: Node, value: Value, fed: Node, dim: int, order: list[int], flow: Flow) -> Value:
    """Another order of channels, by a channel map that reads `fed`."""
    if not isinstance(value, Axes) or value.dims[dim] is None:
        return value
    return _mapped(node, value, fed.fx, dim, order, flow)


def _mapped(
    node: Node,
    value: Axes,
    fed: Any,
    dim: int,
    chosen: list[int],
    flow: Flow,
    then: tuple[Any, ...] | None = None,
) -> Axes:
    """Chosen channels by a channel map that reads `fed`; None where the forward is fixed."""
    labels, map_ = value.dims[dim], None
    if fed is not None and labels is not None:
        map_ = ChannelMap(maps.Take(chosen, len(labels), dim, then), (fed,))
    home = flow.channel_map(node, map_)
    return _take(node, value, dim, chosen, f"{home}.source", flow)


def _sliced(node: Node, value: Axes, full: list[Any], flow: Flow) -> Value:
    """Slices of channels one dim, any other index on the other dims."""
    at, dim = [], 0
    for k, i in enumerate(full):
        if i is None:
            continue
        labels = value.dims[dim]
        if labels is not None and not isinstance(i, int):
            chosen = list(range(len(labels))[i]) if isinstance(i, slice) else _chosen(i)
            if chosen is not None and i != slice(None):
                at.append((k, dim, [c % len(labels) for c in chosen]))
        dim += 1
    if len(at) > 1:
        return flow.give_up(node, [value], f"'{node.op}' slices two kinds of channels by number")
    k, dim, chosen = at[0]
    then = tuple(slice(None) if j == k else i for j, i in enumerate(full))
    plain = all(i == slice(None) for i in then if isinstance(i, slice)) and all(
        isinstance(i, slice) for i in then
    )
    readable = all(i is None or isinstance(i, int) or (
        isinstance(i, slice) and all(isinstance(n, int | None) for n in (i.start, i.stop, i.step))
    ) for i in then)  # fmt: skip
    fed = node.fx.args[0] if node.fx is not None and readable else None
    out = _mapped(node, value, fed, dim, chosen, flow, None if plain else then)
    return out if plain else indexed(node, out, then, flow)


def _take(node: Node, value: Axes, dim: int, chosen: list[int], address: str, flow: Flow) -> Axes:
    labels = value.dims[dim]
    if labels is None:
        return value
    why = f"'{node.id}' copies channels that stay"
    flow.tie(flow.map_axis(address, 1, len(labels)), labels, why)
    out = labels[chosen]
    flow.tie(flow.map_axis(address, 0, len(chosen)), out, why)
    return value.with_dim(dim, out)


def _with_tensor(
    node: Node,
    value: Axes,
    dims: list[Labels | None],
    tensors: list[int],
    partial: Sequence[Any],
    flow: Flow,
) -> Value:
    """One or several tensors as indices: their dims take the place of the first, side by side."""
    if partial or node.shape is None or tensors != [tensors[0]] * len(tensors):
        return flow.give_up(node, [value], f"'{node.op}' picks indices by several tensors")
    new = len(node.shape) - len(dims)
    dims[tensors[0] : tensors[0]] = [None] * new
    return Axes(tuple(dims), value.why)


def _joined(parts: Sequence[tuple[Labels | None, int]]) -> Labels | None:
    if all(labels is None for labels, _ in parts):
        return None
    return np.concatenate(
        [np.full(n, KEPT, dtype=np.int64) if labels is None else labels for labels, n in parts]
    )


def _together(parts: Sequence[tuple[Labels | None, int]], node: Node, flow: Flow) -> Labels | None:
    known = [labels for labels, _ in parts if labels is not None]
    why = f"'{node.id}' joins it to channels that stay"
    if len(known) < len(parts):
        for labels in known:
            flow.protect(labels, why)
        return None
    for labels in known[1:]:
        flow.tie(known[0], labels, why)
    return known[0]


def _steps(size: int, step: int) -> list[int]:
    return [min(step, size - at) for at in range(0, size, step)]
