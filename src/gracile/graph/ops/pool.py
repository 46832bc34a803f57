"""Operators over space: pooling, means, interpolation. Channels pass if they are not reduced."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Flow, Several, Value
from gracile.graph.oprule import OpRule, oprule


class _Spatial(OpRule):
    """Works on the last `spatial` dims of each channel by itself."""

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels pass if they lie before the spatial dims."""
        value = values[0] if len(values) == 1 else None
        if not isinstance(value, Axes):
            return flow.give_up(node, values, f"'{node.op}' is not called on one tensor")
        before = len(value.dims) - self.spatial(node, value)
        for labels in value.dims[before:]:
            flow.protect(labels, f"'{node.op}' works along the channels ('{node.id}')")
        rest = (None,) * (len(value.dims) - before)
        out = Axes(value.dims[:before] + rest, value.why)
        return out if node.shape is not None else Several((out, out))  # values and indices

    def spatial(self, node: Node, value: Axes) -> int:
        """How many of the last dims are worked on: all but batch and channels."""
        return len(value.dims) - 2


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

    passes = False  # whether channels that are reduced may go: what they add is then 0

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels that are not reduced pass, and move left past dims that vanish."""
        value = values[0]
        if not isinstance(value, Axes):
            return value
        rank, dims = len(value.dims), node.attrs.get("dim")
        if dims is None:
            dims = tuple(range(rank))
        dims = [dims] if isinstance(dims, int) else dims
        if not all(isinstance(d, int) for d in dims):
            return flow.give_up(node, values, f"'{node.op}' has a dim that cannot be read")
        gone = {d % rank for d in dims}
        if not self.passes:
            for d in gone:
                flow.protect(value.dims[d], f"'{node.op}' reduces the channels ('{node.id}')")
        if node.shape is not None and len(node.shape) == rank:
            return Axes(
                tuple(None if d in gone else v for d, v in enumerate(value.dims)), value.why
            )
        out = Axes(tuple(v for d, v in enumerate(value.dims) if d not in gone), value.why)
        return out if node.shape is not None else Several((out, out))  # values and indices


def _reduction(op: str, passes: bool, statistic: bool = False) -> None:
    names = ("input", "dim", "keepdim", "dtype")
    calls = dict.fromkeys((getattr(torch, op), f".{op}", f"aten.{op}"), names)
    cls = type(
        op.title(),
        (_Reduce,),
        {
            "calls": calls,
            "passes": passes,
            "statistic": statistic,
            "__doc__": f"`{op}` over some dims.",
            "__module__": __name__,
        },
    )
    oprule(op, source=f"torch.{op}")(cls)


# Over channels, a sum loses what a removed channel adds, a mean or a variance is one of those left.
for _op, _passes, _statistic in (
    ("mean", True, True), ("var", True, True), ("std", True, True), ("sum", True, False),
    ("amax", False, False), ("amin", False, False),
):  # fmt: skip
    _reduction(_op, _passes, _statistic)
