"""Operators that change a tensor's shape or the order of its dims."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Fixed, Flow, Labels, Value, segments
from gracile.graph.maps import ChannelMap
from gracile.graph.oprule import OpRule, oprule
from gracile.nn import maps


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
        return _rearranged(node, values, flow)


class _Sized(OpRule):
    """An operator that is given sizes; where one counts channels it needs a channel map."""

    module: type[maps.Reshape] = maps.Reshape

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Move the labels as the data moves, and tie the sizes that are given to them."""
        out = self.moved(node, values, flow)
        if not isinstance(out, Axes) or not out.labelled:
            return out
        if "unflattened_size" in node.attrs:
            return self.unflattened(node, out, flow)
        if node.module is not None:  # a channel map
            return _tie_sizes(out, f"{node.module}.sizes", out.labelled, flow, node)
        shape = node.shape or ()
        given = _sizes(node, shape)
        stiff = [d for d in out.labelled if given[d] != -1]
        if not stiff:
            return out
        merged = {d: dims for d, dims in self.merged(node, flow).items() if d in stiff}
        known = [d for d in range(len(shape)) if d in stiff or (d and shape[d] == 1)]
        sizes = [merged.get(d) or _size(given[d], shape[d], d in known) for d in range(len(shape))]
        free = tuple(g for g, n in zip(given, sizes, strict=True) if n is None)
        map_ = None
        if node.fx is not None:
            map_ = ChannelMap(self.module(sizes), (node.fx.args[0], *free))
        home = flow.channel_map(node, map_)
        return _tie_sizes(out, f"{home}.sizes", [d for d in stiff if d not in merged], flow, node)

    def merged(self, node: Node, flow: Flow) -> dict[int, tuple[int, ...]]:
        """Dims of the output that are several of the input: their size follows from these."""
        return {}

    def moved(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The labels of the output."""
        return _rearranged(node, values, flow)

    def unflattened(self, node: Node, out: Axes, flow: Flow) -> Value:
        """One dim in several: the module's own sizes, or a map's."""
        first, sizes = node.attrs.get("dim"), node.attrs["unflattened_size"]
        if not isinstance(first, int) or not isinstance(sizes, tuple):
            return flow.give_up(node, [out], f"'{node.op}' has sizes that cannot be read")
        first %= len(out.dims) - len(sizes) + 1
        home = node.module
        if home is None:
            now = (node.shape or ())[first : first + len(sizes)]
            module = nn.Unflatten(first, tuple(now))
            home = flow.channel_map(
                node, None if node.fx is None else ChannelMap(module, (node.fx.args[0],))
            )
        for k in range(len(sizes)):
            labels = out.dims[first + k]
            if labels is not None and (node.module is None or sizes[k] != -1):
                axis = flow.map_axis(f"{home}.unflattened_size", k, len(labels))
                flow.tie(axis, labels, f"the sizes of '{node.id}'")
        return out

    def attribute_size(self, module: Any, name: str, dim: int) -> int | None:
        """A size."""
        sizes = getattr(module, name, ()) if name in ("sizes", "unflattened_size") else ()
        return sizes[dim] if dim < len(sizes) and isinstance(sizes[dim], int) else None

    def cut_attribute(self, module: Any, name: str, dim: int, keep: Sequence[int]) -> None:
        """Set a size."""
        sizes = list(getattr(module, name))
        sizes[dim] = len(keep)
        setattr(module, name, sizes if name == "sizes" else tuple(sizes))


@oprule("reshape", source="torch.reshape")
class Reshape(_Sized):
    """Any change of shape, with exact index maps."""

    modules = (nn.Unflatten, "gracile.nn.maps.Reshape")
    attributes = ("dim", "unflattened_size")
    calls = {
        torch.reshape: ("input", "shape"),
        ".reshape": ("input", "*shape"), ".view": ("input", "*shape"),
        "aten.reshape": ("input", "shape"), "aten.view": ("input", "shape"),
        "aten._unsafe_view": ("input", "shape"),
        ".unflatten": ("input", "dim", "unflattened_size"),
        "aten.unflatten": ("input", "dim", "unflattened_size"),
    }  # fmt: skip

    def merged(self, node: Node, flow: Flow) -> dict[int, tuple[int, ...]]:
        """As where a batch and its heads become one dim, whatever the size of the batch."""
        before = flow.shape_of(node.inputs[0])
        found = segments(before, node.shape) if before is not None and node.shape else []
        return {new[0]: tuple(old) for old, new in found if len(new) == 1 and len(old) > 1}


@oprule("expand", source="torch.Tensor.expand")
class Expand(_Sized):
    """Repeat dims of size 1: what is repeated is the same for every index."""

    module = maps.Expand
    modules = ("gracile.nn.maps.Expand",)
    calls = {
        ".expand": ("input", "*shape"), "aten.expand": ("input", "shape"),
        torch.broadcast_to: ("input", "shape"), ".broadcast_to": ("input", "*shape"),
        "aten.broadcast_to": ("input", "shape"),
    }  # fmt: skip

    def moved(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """A dim that is repeated has no labels: all its indices are one."""
        value, shape = values[0], flow.shape_of(node.inputs[0])
        if not isinstance(value, Axes) or shape is None or node.shape is None:
            return value
        new = len(node.shape) - len(shape)
        dims: list[Labels | None] = [None] * new
        for d, labels in enumerate(value.dims):
            same = shape[d] == node.shape[d + new]
            if not same:
                flow.protect(labels, f"'{node.id}' repeats it")
            dims.append(labels if same else None)
        return Axes(tuple(dims), value.why)


@oprule("permute", source="torch.permute")
class Permute(OpRule):
    """Reorder the dims: the channels move along."""

    modules = ("torchvision.ops.misc.Permute",)
    attributes = ("dims",)
    calls = {
        torch.permute: ("input", "dims"), ".permute": ("input", "*dims"),
        "aten.permute": ("input", "dims"),
        torch.transpose: ("input", "dim0", "dim1"), ".transpose": ("input", "dim0", "dim1"),
        torch.swapaxes: ("input", "dim0", "dim1"), ".swapaxes": ("input", "dim0", "dim1"),
        ".transpose_": ("input", "dim0", "dim1"),
        "aten.transpose": ("input", "dim0", "dim1"),
        ".t": ("input",), torch.t: ("input",), "aten.t": ("input",), "aten.numpy_T": ("input",),
        ".T": ("input", "name"),
    }  # fmt: skip

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The channels lie where their dim went."""
        value = values[0]
        if not isinstance(value, Axes):
            return value
        order = permuted_dims(node.attrs, len(value.dims))
        if order is None:
            return flow.give_up(node, values, "'permute' has dims that cannot be read")
        return Axes(tuple(value.dims[d] for d in order), value.why)


@oprule("movedim", source="torch.movedim")
class MoveDim(OpRule):
    """Move dims: the channels move along."""

    calls = dict.fromkeys(
        (torch.movedim, ".movedim", torch.moveaxis, "aten.movedim"),
        ("input", "source", "destination"),
    )

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The labels are moved as torch moves the dims."""
        value, a = values[0], node.attrs
        if not isinstance(value, Axes):
            return value
        try:
            probe = torch.empty(tuple(range(2, 2 + len(value.dims))), device="meta")
            order = [n - 2 for n in probe.movedim(a["source"], a["destination"]).shape]
        except (TypeError, RuntimeError, KeyError):
            return flow.give_up(node, values, "'movedim' has dims that cannot be read")
        return Axes(tuple(value.dims[d] for d in order), value.why)


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
        if not isinstance(value, Axes) or shape is None:
            return value
        dims = node.attrs.get("dim")
        if dims is None:  # a layer that is cut down to one channel would vanish too
            if value.labelled:
                return flow.give_up(node, values, "'squeeze' without a dim depends on the sizes")
            dims = tuple(range(len(shape)))
        gone = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)}
        gone = {d for d in gone if shape[d] == 1}
        for d in gone:
            flow.protect(value.dims[d], f"'squeeze' drops the dim ('{node.id}')")
        return Axes(tuple(v for d, v in enumerate(value.dims) if d not in gone), value.why)


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
        if not isinstance(value, Axes):
            return value
        if not isinstance(dim, int):
            return flow.give_up(node, values, "'unsqueeze' has a dim that cannot be read")
        dims = list(value.dims)
        dims.insert(dim % (len(dims) + 1), None)
        return Axes(tuple(dims), value.why)


@oprule("pixel_shuffle", source="Shi et al. 2016, arXiv:1609.05158")
class PixelShuffle(OpRule):
    """Channels become pixels: the r*r channels of one output channel go together."""

    modules = (nn.PixelShuffle,)
    attributes = ("upscale_factor",)
    calls = {
        torch.pixel_shuffle: ("input", "upscale_factor"),
        "aten.pixel_shuffle": ("input", "upscale_factor"),
    }

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """(C r r) -> C."""
        value, r = values[0], node.attrs.get("upscale_factor")
        if not isinstance(value, Axes) or not isinstance(r, int):
            return flow.give_up(node, values, "'pixel_shuffle' has a factor that cannot be read")
        flow.only(value, node, range(len(value.dims) - 2))
        dim, why = len(value.dims) - 3, f"'{node.id}' makes pixels of it"
        labels = value.dims[dim]
        if labels is None:
            return value
        outer, inner = flow.split(labels, (len(labels) // (r * r), r * r), why)
        flow.protect(inner, why)
        return value.with_dim(dim, outer)


@oprule("pixel_unshuffle", source="torch.nn.PixelUnshuffle")
class PixelUnshuffle(OpRule):
    """Pixels become channels: each channel becomes r*r of them."""

    modules = (nn.PixelUnshuffle,)
    attributes = ("downscale_factor",)
    calls = {
        torch.pixel_unshuffle: ("input", "downscale_factor"),
        "aten.pixel_unshuffle": ("input", "downscale_factor"),
    }

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """C -> (C r r)."""
        value, r = values[0], node.attrs.get("downscale_factor")
        if not isinstance(value, Axes) or not isinstance(r, int):
            return flow.give_up(node, values, "'pixel_unshuffle' has a factor that cannot be read")
        flow.only(value, node, range(len(value.dims) - 2))
        dim = len(value.dims) - 3
        labels = value.dims[dim]
        return value.with_dim(dim, None if labels is None else labels.repeat(r * r))


@oprule("unfold", source="torch.nn.functional.unfold")
class Unfold(OpRule):
    """Patches as columns: (N, C, H, W) -> (N, C*k*k, L)."""

    modules = (nn.Unfold,)
    attributes = ("kernel_size",)
    calls = dict.fromkeys(
        (F.unfold, "aten.im2col"), ("input", "kernel_size", "dilation", "padding", "stride")
    )

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Each channel becomes k*k rows."""
        value = values[0]
        if not isinstance(value, Axes) or len(value.dims) != 4 or node.shape is None:
            return flow.give_up(node, values, "'unfold' reads no batch of images")
        flow.only(value, node, (0, 1))
        labels = value.dims[1]
        rows = None if labels is None else labels.repeat(node.shape[1] // len(labels))
        return Axes((value.dims[0], rows, None), value.why)


@oprule("fold", source="torch.nn.functional.fold")
class Fold(OpRule):
    """Columns as patches: (N, C*k*k, L) -> (N, C, H, W)."""

    modules = (nn.Fold,)
    attributes = ("kernel_size",)

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The k*k rows of a channel go together."""
        value = values[0]
        if not isinstance(value, Axes) or len(value.dims) != 3 or node.shape is None:
            return flow.give_up(node, values, "'fold' reads no columns")
        flow.only(value, node, (0, 1))
        labels, why = value.dims[1], f"'{node.id}' makes pixels of it"
        if labels is None:
            return Axes((value.dims[0], None, None, None), value.why)
        outer, inner = flow.split(labels, (node.shape[1], len(labels) // node.shape[1]), why)
        flow.protect(inner, why)
        return Axes((value.dims[0], outer, None, None), value.why)


@oprule("size", source="torch.Tensor.size")
class Size(OpRule):
    """A size or what is computed from sizes: numbers, no channels."""

    calls = {
        ".size": ("input", "dim"), ".dim": ("input",), ".numel": ("input",), getattr: (),
        "aten.sym_size": ("input", "dim"), "aten.sym_numel": ("input",),
    }  # fmt: skip

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Nothing flows; whoever uses the number follows the cut or is found out by the proof."""
        return Fixed("a size")


def _rearranged(node: Node, values: Sequence[Value], flow: Flow) -> Value:
    value, shape = values[0], flow.shape_of(node.inputs[0])
    if not isinstance(value, Axes):
        return value
    if len(values) != 1 or shape is None or node.shape is None:
        return flow.give_up(node, values, f"'{node.op}' is not called on one tensor")
    return flow.rearranged(value, shape, node.shape, f"'{node.id}' mixes channels irregularly")


def _tie_sizes(out: Axes, address: str, dims: Sequence[int], flow: Flow, node: Node) -> Axes:
    """Sizes that count channels are cut with them; one that is -1 or given at the call is not."""
    for d in dims:
        labels = out.dims[d]
        if labels is not None and flow.size_of(address, d) in (None, len(labels)):
            if node.module is not None and flow.size_of(address, d) is None:
                continue
            flow.tie(flow.map_axis(address, d, len(labels)), labels, f"the sizes of '{node.id}'")
    return out


def _sizes(node: Node, shape: Sequence[int]) -> list[Any]:
    """The sizes a call is given, with the graph's nodes in them.

    Where they cannot be read one by one (another tensor's shape), those of the example but the
    first, which follows.
    """
    if node.fx is None:
        given = node.attrs.get("shape", ())
        given = given[0] if len(given) == 1 and isinstance(given[0], tuple) else given
        return list(given) if len(given) == len(shape) else [None] * len(shape)
    args = [*node.fx.args[1:], *(v for k, v in node.fx.kwargs.items() if k != "implicit")]
    first = args[0] if args else None
    given = list(first) if isinstance(first, (list, tuple)) else args
    return given if len(given) == len(shape) else [-1, *shape[1:]]


def _size(given: Any, now: int, counts: bool) -> int | None:
    """What a map keeps of a given size: None for one that the call still gives."""
    if counts:
        return now
    return None if isinstance(given, fx.Node) else int(given)


def permuted_dims(attrs: Mapping[str, Any], rank: int) -> list[int] | None:
    """For each output dim the input dim it comes from."""
    if "dim0" in attrs:
        a, b = attrs["dim0"], attrs["dim1"]
        if not isinstance(a, int) or not isinstance(b, int):
            return None
        order = list(range(rank))
        order[a % rank], order[b % rank] = b % rank, a % rank
        return order
    dims = attrs.get("dims")
    if dims is None:
        return list(range(rank))[::-1] if rank <= 2 else None
    if len(dims) == 1 and isinstance(dims[0], (list, tuple)):
        dims = dims[0]
    if len(dims) != rank or not all(isinstance(d, int) for d in dims):
        return None
    return [d % rank for d in dims]
