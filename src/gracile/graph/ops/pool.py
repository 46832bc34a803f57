"""Operators over space: pooling, means, interpolation. Channels pass if they are not reduced."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gracile.graph.channels import Channels, Fixed, Flow, Value
from gracile.graph.graph import Node
from gracile.graph.oprule import OpRule, oprule


class _Spatial(OpRule):
    """Works on the last `spatial` dims of each channel by itself."""

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels pass if they lie before the spatial dims."""
        value, shape = values[0], flow.shape_of(node.inputs[0])
        if len(values) != 1 or shape is None or node.shape is None:
            return flow.give_up(node, values, f"'{node.op}' is not called on one tensor")
        if isinstance(value, Fixed):
            return value
        if isinstance(value, Channels) and value.dim < len(shape) - self.spatial(node, shape):
            return value
        return flow.give_up(node, values, f"'{node.op}' works along the channels")

    def spatial(self, node: Node, shape: tuple[int, ...]) -> int:
        """How many of the last dims are worked on: all but batch and channels."""
        return len(shape) - 2


def _functions(name: str) -> list[Any]:
    """`F.<name>1d`, ... and their aten names; torch's, where a name stands for a dispatcher."""
    found: list[Any] = []
    for d in (1, 2, 3):
        full = f"{name}{d}d"
        for home in (F, torch):
            if callable(f := getattr(home, full, None)) and f not in found:
                found.append(f)
        found.append(f"aten.{full}")
    return found


def _family(
    op: str,
    modules: Sequence[type],
    functions: Sequence[str],
    attributes: Sequence[str],
    defaults: Mapping[str, Any],
) -> None:
    calls = {key: ("input", *attributes) for f in functions for key in _functions(f)}
    cls = type(
        op.title().replace("_", ""),
        (_Spatial,),
        {
            "modules": modules,
            "calls": calls,
            "attributes": attributes,
            "defaults": defaults,
            "__doc__": f"`{op}`, channel by channel.",
            "__module__": __name__,
        },
    )
    oprule(op, source="torch.nn.functional")(cls)


_family(
    "max_pool",
    (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    ("max_pool", "_max_pool"),
    ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False},
)
_family(
    "avg_pool",
    (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    ("avg_pool",),
    ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    {"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True},
)
_family(
    "adaptive_avg_pool",
    (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    ("adaptive_avg_pool",),
    ("output_size",),
    {},
)
_family(
    "adaptive_max_pool",
    (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    ("adaptive_max_pool", "_adaptive_max_pool"),
    ("output_size", "return_indices"),
    {},
)


@oprule("interpolate", source="torch.nn.functional.interpolate")
class Interpolate(_Spatial):
    """Upsampling, channel by channel."""

    modules = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
    attributes = ("size", "scale_factor", "mode", "align_corners")
    calls = {
        F.interpolate: ("input", *attributes),
        "aten.upsample_nearest2d": ("input", "size", "scale_factor"),
        "aten.upsample_bilinear2d": ("input", "size", "align_corners", "scale_factor"),
    }


class _Reduce(OpRule):
    """Reduces some dims; the others stay."""

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels pass if they are not reduced, and move left past dims that vanish."""
        value, shape = values[0], flow.shape_of(node.inputs[0])
        if isinstance(value, Fixed):
            return value
        if not isinstance(value, Channels) or shape is None or node.shape is None:
            return flow.give_up(node, values, f"'{node.op}' reads no followed channels")
        dims = node.attrs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        if not dims or not all(isinstance(d, int) for d in dims):
            return flow.give_up(node, values, f"'{node.op}' reduces every dim")
        gone = {d % len(shape) for d in dims}
        if value.dim in gone:
            return flow.give_up(node, values, f"'{node.op}' reduces the channels")
        keep = len(node.shape) == len(shape)
        return Channels(value.dim - (0 if keep else sum(d < value.dim for d in gone)), value.atoms)


def _reduction(op: str) -> None:
    names = ("input", "dim", "keepdim", "dtype")
    calls = dict.fromkeys((getattr(torch, op), f".{op}", f"aten.{op}"), names)
    cls = type(
        op.title(),
        (_Reduce,),
        {"calls": calls, "__doc__": f"`{op}` over some dims.", "__module__": __name__},
    )
    oprule(op, source=f"torch.{op}")(cls)


for _op in ("mean", "sum", "amax", "amin"):
    _reduction(_op)
