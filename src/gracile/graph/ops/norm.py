"""Normalization layers: which statistics they take decides whether a channel can be cut."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from gracile.graph import maps
from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Flow, Labels, Value
from gracile.graph.oprule import Kept, OpRule, oprule


class _PerChannel(OpRule):
    """Statistics of each channel (dim 1) by itself."""

    roles = ("weight", "bias", "running_mean", "running_var")
    attributes = ("num_features", "eps", "momentum", "affine", "track_running_stats")
    defaults = {"eps": 1e-5, "momentum": 0.1}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Each parameter and statistic goes with its channel; other dims stay whole."""
        value = values[0]
        if not isinstance(value, Axes) or len(value.dims) < 2:
            return flow.give_up(node, values, f"'{node.op}' is not over dim 1")
        if node.module is None and _of_batch(node) and any(d != 1 for d in value.labelled):
            flow.statistics.add(node.id)  # of a weight: over what is left of its other dims
        else:
            flow.only(value, node, (0, 1))
        labels = _params(node, values, flow, 0, "num_features", value.dims[1])
        if labels is None:
            return value
        return value.with_dim(1, labels)

    def resize(self, module: Any, kept: Kept) -> None:
        """`num_features` from whatever tensor there is."""
        for role in self.roles:
            tensor = getattr(module, role, None)
            if tensor is not None:
                module.num_features = tensor.shape[0]

    def attribute_size(self, module: Any, name: str, dim: int) -> int | None:
        """A norm without tensors still counts its channels."""
        return module.num_features if (name, dim) == ("num_features", 0) else None

    def cut_attribute(self, module: Any, name: str, dim: int, keep: Sequence[int]) -> None:
        """Set the count."""
        module.num_features = len(keep)


_STATS = ("running_mean", "running_var", "weight", "bias")


@oprule("batch_norm", source="Ioffe and Szegedy 2015, arXiv:1502.03167")
class BatchNorm(_PerChannel):
    """Batch normalization."""

    modules = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    calls = {
        F.batch_norm: ("input", *_STATS, "training", "momentum", "eps"),
        "aten.batch_norm": (
            "input", "weight", "bias", "running_mean", "running_var", "training", "momentum",
            "eps", "cudnn_enabled",
        ),
    }  # fmt: skip


@oprule("batch_norm_act", source="timm 1.0: timm/layers/norm_act.py")
class BatchNormAct(_PerChannel):
    """timm's BatchNorm that ends with dropout and activation: one module, one operator.

    Its forward asks for `training` and counts batches, which fx cannot follow. An operator of its
    own, so that nobody folds it without its activation.
    """

    modules = ("timm.layers.norm_act.BatchNormAct2d",)

    def roles_of(self, module: Any) -> Sequence[str]:
        """The norm's tensors, and those of an activation that has some."""
        inside = (*module.act.named_parameters(), *module.act.named_buffers())
        return (*self.roles, *(f"act.{name}" for name, _ in inside))

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """As of the norm; an activation with tensors of its own is not looked into."""
        if inside := sorted(role for role in node.params if role not in self.roles):
            return flow.give_up(node, values, f"'{node.op}' has '{inside[0]}' in its activation")
        return super().flow(node, values, flow)


@oprule("instance_norm", source="Ulyanov et al. 2016, arXiv:1607.08022")
class InstanceNorm(_PerChannel):
    """Instance normalization."""

    modules = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    calls = {
        F.instance_norm: ("input", *_STATS, "use_input_stats", "momentum", "eps"),
        "aten.instance_norm": (
            "input", "weight", "bias", "running_mean", "running_var", "use_input_stats",
            "momentum", "eps", "cudnn_enabled",
        ),
    }  # fmt: skip


@oprule("group_norm", source="Wu and He 2018, arXiv:1803.08494")
class GroupNorm(OpRule):
    """Group normalization: whole groups can go, or the same channels of every group.

    Statistics are those of the channels that are left.
    """

    modules = (nn.GroupNorm,)
    calls = {
        F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
        "aten.group_norm": ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"),
    }
    roles = ("weight", "bias")
    attributes = ("num_groups", "num_channels", "eps")
    statistic = True

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The channels are split into groups. A functional call hard-codes how many."""
        value, groups = values[0], node.attrs.get("num_groups")
        if not isinstance(value, Axes) or not isinstance(groups, int):
            return flow.give_up(node, values, "'group_norm' hard-codes its number of groups")
        flow.only(value, node, (0, 1))
        labels = _params(node, values, flow, 0, "num_channels", value.dims[1])
        if labels is None:
            return value
        why = f"the groups of '{node.id}' are of one size"
        outer, _ = flow.split(labels, (groups, len(labels) // groups), why)
        if node.module is None:
            flow.protect(outer, f"'group_norm' hard-codes its number of groups ('{node.id}')")
        elif outer is not None and groups > 1:
            flow.tie(flow.map_axis(f"{node.module}.num_groups", 0, groups), outer, why)
        return value.with_dim(1, labels)

    def resize(self, module: Any, kept: Kept) -> None:
        """`num_channels` from the weight."""
        if isinstance(module.weight, torch.Tensor):
            module.num_channels = module.weight.shape[0]

    def attribute_size(self, module: Any, name: str, dim: int) -> int | None:
        """The number of groups, and the channels of a norm without tensors."""
        return getattr(module, name) if name in ("num_channels", "num_groups") and not dim else None

    def cut_attribute(self, module: Any, name: str, dim: int, keep: Sequence[int]) -> None:
        """Set a count."""
        setattr(module, name, len(keep))


class _LastDims(OpRule):
    """Statistics over the last dims, of the channels that are left."""

    roles: ClassVar[Sequence[str]] = ("weight", "bias")
    attributes = ("normalized_shape", "eps", "elementwise_affine")
    statistic = True

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Each parameter goes with its channel; a functional call needs a channel map."""
        value, normalized = values[0], node.attrs.get("normalized_shape")
        if isinstance(normalized, int):
            normalized = (normalized,)
        if not isinstance(value, Axes) or not isinstance(normalized, tuple):
            return flow.give_up(node, values, f"'{node.op}' has a shape that cannot be read")
        first, out = len(value.dims) - len(normalized), value
        home = node.module
        if home is None and any(d >= first for d in value.labelled):
            home = flow.channel_map(node, maps.norm_of(node))
        for k in range(len(normalized)):
            labels = _params(node, values, flow, k, "normalized_shape", value.dims[first + k], home)
            out = out.with_dim(first + k, labels)
        return out

    def resize(self, module: Any, kept: Kept) -> None:
        """The normalized shape from the weight."""
        if isinstance(module.weight, torch.Tensor):
            module.normalized_shape = tuple(module.weight.shape)

    def attribute_size(self, module: Any, name: str, dim: int) -> int | None:
        """Sizes that are normalized over."""
        shape = module.normalized_shape
        return shape[dim] if name == "normalized_shape" and dim < len(shape) else None

    def cut_attribute(self, module: Any, name: str, dim: int, keep: Sequence[int]) -> None:
        """Set one of them."""
        shape = list(module.normalized_shape)
        shape[dim] = len(keep)
        module.normalized_shape = tuple(shape)


@oprule("layer_norm", source="Ba et al. 2016, arXiv:1607.06450")
class LayerNorm(_LastDims):
    """Layer normalization over the last dims."""

    modules = (nn.LayerNorm, "gracile.nn.maps.LayerNorm")
    calls = {
        F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
        torch.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
        "aten.layer_norm": ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
    }


@oprule("rms_norm", source="Zhang and Sennrich 2019, arXiv:1910.07467")
class RMSNorm(_LastDims):
    """Root-mean-square normalization over the last dims."""

    modules = (nn.RMSNorm, "gracile.nn.maps.RMSNorm")
    calls = {
        F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
        "aten.rms_norm": ("input", "normalized_shape", "weight", "eps"),
    }
    roles = ("weight",)


@oprule("normalize", source="torch.nn.functional.normalize")
class Normalize(OpRule):
    """Division by a p-norm along a dim: a channel that is zero adds nothing to it."""

    calls = {F.normalize: ("input", "p", "dim", "eps")}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels pass."""
        return values[0]


def _of_batch(node: Node) -> bool:
    """Whether there are no running statistics."""
    return node.attrs.get("running_mean") is None and "running_mean" not in node.params


def _params(
    node: Node,
    values: Sequence[Value],
    flow: Flow,
    dim: int,
    count: str,
    labels: Labels | None,
    home: str | None = None,
) -> Labels | None:
    """Tie a dim of a norm's tensors to the channels it normalizes; without tensors, its count."""
    home = home or node.module
    own = [flow.axis(address, dim) for address in node.params.values()]
    if home is not None and (not own or home != node.module or home.startswith(maps.HOME)):
        size = 0 if labels is None else len(labels)
        if size:
            own.append(flow.map_axis(f"{home}.{count}", dim, size))
    for value in values[1:]:  # scales and shifts that are computed
        if labels is not None:
            own.append(flow.along(value, node, dim, len(labels)))
        else:
            flow.protect_value(value, f"the channels of '{node.id}' stay")
    if own and labels is None:
        flow.protect(np.concatenate(own), f"the channels of '{node.id}' stay")
    elif own and labels is not None:
        every = np.tile(labels, len(own))
        flow.tie(every, np.concatenate(own), f"the channels of '{node.id}' stay")
    return labels
