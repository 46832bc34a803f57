"""Fold BatchNorm in eval mode into the convolution or linear layer before it."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class FoldResult:
    """What folding left.

    Attributes:
        module: a deep copy without the folded BatchNorms, in eval mode.
        scaled: address of each weight that changed -> the signed factor gamma / sigma by which
            each output channel was multiplied, shape (O,).
        merged: id of a folded BatchNorm's node -> id of the node that now computes its output.
    """

    module: fx.GraphModule
    scaled: dict[str, Tensor] = field(default_factory=dict)
    merged: dict[str, str] = field(default_factory=dict)


def fold_batchnorm(module: fx.GraphModule) -> FoldResult:
    """Replace conv -> BatchNorm by one convolution that computes the same in eval mode.

    w' = w * gamma / sigma and b' = beta + (b - mu) * gamma / sigma per output channel, with sigma
    = sqrt(var + eps); gamma may be negative. A BatchNorm stays where folding would change
    something else: the layer's output has other readers, the layer or its weight is used twice, or
    the norm has no running statistics.

    Args:
        module: a captured graph; nodes may carry ``meta["id"]``. It is not changed.
    """
    result = FoldResult(copy.deepcopy(module).eval())
    graph, modules = result.module.graph, dict(result.module.named_modules())
    for node in list(graph.nodes):
        if not _calls(node, modules, NORMS) or len(node.args) != 1:
            continue
        before = node.args[0]
        if not isinstance(before, fx.Node) or len(before.users) != 1:
            continue
        if not _calls(before, modules, (*CONVS, *TRANSPOSED, nn.Linear)):
            continue
        layer, norm = modules[before.target], modules[node.target]
        if not _foldable(layer, norm, result.module) or _uses(graph, str(before.target)) > 1:
            continue
        result.scaled[f"{before.target}.weight"] = _fold(layer, norm)
        result.merged[node.meta.get("id", node.name)] = before.meta.get("id", before.name)
        node.replace_all_uses_with(before)
        graph.erase_node(node)
    result.module.delete_all_unused_submodules()
    graph.lint()
    result.module.recompile()
    return result


def channel_axis(layer: nn.Module) -> int:
    """The weight's axis of output channels (within a group, for a transposed convolution)."""
    return 1 if isinstance(layer, TRANSPOSED) else 0


def scale_channels(weight: Tensor, factor: Tensor, axis: int) -> Tensor:
    """Multiply each output channel of a weight; `factor` has one value per output channel, (O,).

    A transposed convolution in groups has O / groups channels along `axis` and the groups one
    after the other along axis 0.
    """
    groups = factor.numel() // weight.shape[axis]
    if groups == 1:
        shape = [1] * weight.ndim
        shape[axis] = -1
        return weight * factor.reshape(shape)
    split = weight.reshape(groups, -1, *weight.shape[1:])
    tail = [1] * (weight.ndim - 2)
    return (split * factor.reshape(groups, 1, -1, *tail)).reshape(weight.shape)


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> Tensor:
    mean, var = norm.running_mean.double(), norm.running_var.double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.double()
    weight = layer.weight
    factor: Tensor = gamma / torch.sqrt(var + norm.eps)
    folded = scale_channels(weight.double(), factor, channel_axis(layer)).to(weight.dtype)
    layer.weight = nn.Parameter(folded, requires_grad=False)
    shifted = (beta + (bias - mean) * factor).to(weight.dtype)
    layer.bias = nn.Parameter(shifted, requires_grad=False)
    return factor


def _foldable(layer: Any, norm: Any, root: nn.Module) -> bool:
    if norm.running_mean is None or norm.running_var is None:
        return False
    if isinstance(layer, nn.Linear) and not isinstance(norm, nn.BatchNorm1d):
        return False
    owners = [p for m in root.modules() for p in m._parameters.values() if p is layer.weight]
    return len(owners) == 1


def _calls(node: fx.Node, modules: dict[str, nn.Module], types: tuple[type, ...]) -> bool:
    # The exact class: a subclass may compute something else with the same weight.
    return node.op == "call_module" and type(modules.get(str(node.target))) in types


def _uses(graph: fx.Graph, layer: str) -> int:
    """How often a layer, or one of its tensors by itself, is read."""
    targets = [str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")]
    return sum(t == layer or t.startswith(f"{layer}.") for t in targets)
