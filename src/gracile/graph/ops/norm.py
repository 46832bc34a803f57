"""Normalization layers: which statistics they take decides whether a channel can be cut."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gracile.graph.channels import Channels, Flow, Value
from gracile.graph.graph import Node
from gracile.graph.oprule import Kept, OpRule, oprule


class _PerChannel(OpRule):
    """Statistics of each channel (dim 1) by itself."""

    roles = ("weight", "bias", "running_mean", "running_var")
    attributes = ("num_features", "eps", "momentum", "affine", "track_running_stats")
    defaults = {"eps": 1e-5, "momentum": 0.1}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Each parameter and statistic goes with its channel."""
        shape = flow.shape_of(node.inputs[0])
        if shape is None or len(shape) < 2:
            return flow.give_up(node, values, f"'{node.op}' is not over dim 1")
        atoms = flow.along(values[0], node, 1, shape[1])
        _tie_params(node, atoms, flow, "num_features")
        return Channels(1, atoms)

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
    """Group normalization: only whole groups can be cut, their statistics are their own."""

    modules = (nn.GroupNorm,)
    calls = {
        F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
        "aten.group_norm": ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"),
    }
    roles = ("weight", "bias")
    attributes = ("num_groups", "num_channels", "eps")

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The channels of one group are one unit. A functional call hard-codes its groups."""
        shape, groups = flow.shape_of(node.inputs[0]), node.attrs.get("num_groups")
        if shape is None or not isinstance(groups, int) or node.module is None:
            return flow.give_up(node, values, "'group_norm' hard-codes its number of groups")
        if groups == 1:
            return flow.give_up(node, values, "'group_norm' takes statistics over all channels")
        atoms = flow.along(values[0], node, 1, shape[1])
        width = shape[1] // groups
        for g in range(groups):
            flow.tie_all(atoms[g * width : (g + 1) * width])
        _tie_params(node, atoms, flow, "num_channels")
        return Channels(1, atoms)

    def resize(self, module: Any, kept: Kept) -> None:
        """Groups keep their width, so there are fewer."""
        if isinstance(module.weight, torch.Tensor):
            self._count(module, module.weight.shape[0])

    def attribute_size(self, module: Any, name: str, dim: int) -> int | None:
        """A norm without tensors still counts its channels."""
        return module.num_channels if (name, dim) == ("num_channels", 0) else None

    def cut_attribute(self, module: Any, name: str, dim: int, keep: Sequence[int]) -> None:
        """Set the counts."""
        self._count(module, len(keep))

    @staticmethod
    def _count(module: Any, channels: int) -> None:
        width = module.num_channels // module.num_groups
        module.num_channels, module.num_groups = channels, channels // width


@oprule("layer_norm", source="Ba et al. 2016, arXiv:1607.06450")
class LayerNorm(OpRule):
    """Layer normalization over the last dims.

    Statistics over channels change when a channel goes (even a zero one), so channels that lie
    along a normalized dim are protected; others pass.
    """

    modules = (nn.LayerNorm,)
    calls = {
        F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
        "aten.layer_norm": ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
    }
    roles = ("weight", "bias")
    attributes = ("normalized_shape", "eps", "elementwise_affine")

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Channels beside the normalized dims pass; its own parameters stay."""
        value, shape = values[0], flow.shape_of(node.inputs[0])
        normalized = node.attrs.get("normalized_shape")
        first = len(shape) - len(normalized) if shape and normalized is not None else 0
        if isinstance(value, Channels) and value.dim < first:
            flow.give_up(node, (), "'layer_norm' has a fixed normalized shape")
            return value
        return flow.give_up(node, values, "'layer_norm' takes statistics over the channels")


def _tie_params(node: Node, atoms: Sequence[int], flow: Flow, count: str) -> None:
    for address in node.params.values():
        flow.tie(atoms, flow.axis(address, 0))
    if not node.params and node.module is not None:
        flow.tie(atoms, flow.axis(f"{node.module}.{count}", 0))
