"""Conversions of type and device, and tensors that are made with the size of another."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Flow, Labels, Value, unlabelled
from gracile.graph.maps import ChannelMap
from gracile.graph.oprule import OpRule, oprule
from gracile.nn.maps import Zeros

_TYPES = ("half", "double", "bfloat16", "int", "long", "bool", "cpu", "cuda", "requires_grad_")
_OPTIONS = ("dtype", "device", "layout", "requires_grad", "pin_memory")


@oprule("to", source="torch.Tensor.to")
class To(OpRule):
    """Another type or device; the tensor that says which has no part in it."""

    calls = {
        ".to": ("input", "*like"), "aten.to": ("input", "*like"),
        "aten._to_copy": ("input", "*like"), ".type": ("input", "dtype"),
        ".type_as": ("input", "other"), "aten.type_as": ("input", "other"),
        **{f".{name}": ("input",) for name in _TYPES},
    }  # fmt: skip

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels pass."""
        return values[0]


@oprule("filled_like", source="torch.zeros_like")
class FilledLike(OpRule):
    """One number, in the shape of another tensor: the size follows it."""

    calls = {
        key: ("input", "fill_value")
        for name in ("zeros", "ones", "full", "empty")
        for key in (getattr(torch, f"{name}_like"), f"aten.{name}_like")
    }

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels pass."""
        return values[0]


@oprule("zeros", source="torch.zeros")
class NewZeros(OpRule):
    """Zeros of given sizes, as a first hidden state: a channel map keeps the sizes."""

    modules = ("gracile.nn.maps.Zeros",)
    attributes = ("sizes",)
    calls = {
        torch.zeros: ("*sizes",), "aten.zeros": ("*sizes",),
        ".new_zeros": ("input", "*sizes"), "aten.new_zeros": ("input", "*sizes"),
    }  # fmt: skip

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Each size that is a number may count channels; the tensor it is made like is not read."""
        shape, why = node.shape, f"'{node.id}' makes it"
        if shape is None:
            return flow.give_up(node, values, "'zeros' makes no tensor")
        if node.module is not None:
            home, given = node.module, list(node.attrs["sizes"])
        else:
            given, like = _sizes(node)
            if len(given) != len(shape) or not any(isinstance(n, int) and n > 1 for n in given):
                return unlabelled(shape, why)
            home = flow.channel_map(node, _map_of(node, given, like))
        dims: list[Labels | None] = [
            flow.map_axis(f"{home}.sizes", d, n) if isinstance(n, int) and n > 1 else None
            for d, n in enumerate(given)
        ]
        return Axes(tuple(dims), why)

    def attribute_size(self, module: Any, name: str, dim: int) -> int | None:
        """A size; None for one that is given at the call."""
        return module.sizes[dim] if name == "sizes" and dim < len(module.sizes) else None

    def cut_attribute(self, module: Any, name: str, dim: int, keep: Sequence[int]) -> None:
        """Set a size."""
        module.sizes[dim] = len(keep)


@oprule("new_filled", source="torch.Tensor.new_ones")
class NewFilled(OpRule):
    """Another number, of given sizes: nothing of it can be cut, nor is anything read."""

    calls = {
        ".new_ones": ("input", "*sizes"), ".new_full": ("input", "sizes", "fill_value"),
        ".new_empty": ("input", "*sizes"), ".new_tensor": ("input", "data"),
        "aten.new_ones": ("input", "sizes"), "aten.new_full": ("input", "sizes", "fill_value"),
        "aten.new_empty": ("input", "sizes"),
    }  # fmt: skip

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """No channels."""
        return unlabelled(node.shape, f"'{node.id}' has a size that is written in the forward")


def _sizes(node: Node) -> tuple[list[Any], fx.Node | None]:
    """The sizes of a call, with the graph's nodes in them, and the tensor it is made like."""
    if node.fx is None:
        return [], None
    args = list(node.fx.args)
    like = args.pop(0) if len(node.inputs) and args and isinstance(args[0], fx.Node) else None
    if args and isinstance(args[0], (list, tuple)):
        args = list(args[0])
    if not args:
        args = list(node.fx.kwargs.get("size", ()))  # type: ignore[arg-type]
    return args, like if isinstance(like, fx.Node) else None


def _map_of(node: Node, given: Sequence[Any], like: fx.Node | None) -> ChannelMap | None:
    if node.fx is None:
        return None
    free = tuple(n for n in given if not isinstance(n, int))
    sizes = [n if isinstance(n, int) else None for n in given]
    options = {k: v for k, v in node.fx.kwargs.items() if k in _OPTIONS and v is not None}
    if like is not None:
        options["like"] = like
    return ChannelMap(Zeros(sizes), free, options)
