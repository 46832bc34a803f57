"""Least-squares reconstruction: each layer, in order, is fitted to what it gave before compression.

For a layer with inputs X (as the compressed network makes them) and the original outputs Y the new
weight is argmin ||Y - X W||^2 + ridge ||W - W_now||^2, on calibration data. Errors of earlier
layers are seen and made up for as far as a linear map can. What is masked stays zero.
"""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gracile.analyze.responses import Responses, is_followed
from gracile.core import method as core
from gracile.core.schedule import When
from gracile.errors import BindError
from gracile.graph.graph import Graph, Node
from gracile.graph.walk import Walk
from gracile.recipe.fields import Selector


class ReconstructOptions(core.Options):
    """Options of `recover: reconstruct`.

    Attributes:
        weights: of the layers to fit; default all convolutions and linear layers.
        residual: the last layer of a residual block is fitted to the block's output, so that it
            makes up for errors of the shortcut too.
        ridge: pull towards the present weight, as a share of the mean square of the inputs.
        points: positions of each image that are used; 0 is all of them.
        when: the firings.
    """

    weights: Selector | None = None
    residual: bool = True
    ridge: float = Field(default=1e-3, ge=0)
    points: int = Field(default=0, ge=0)
    when: When


@dataclass(frozen=True)
class _Layer:
    """One layer to fit.

    Attributes:
        node: in the compressed graph.
        fed: id of what it reads.
        norm: the BatchNorm that alone reads it, if any.
        add: the addition that alone reads that (or the layer), if the block's output is the target.
        other: id of the addition's other input.
    """

    node: Node
    fed: str
    norm: Node | None
    add: Node | None = None
    other: str = ""


@core.method(
    "recover",
    "reconstruct",
    source="He et al. 2017, arXiv:1707.06168, section 3.1, eq. 1 and 'multi-branch'",
)
class Reconstruct(core.Method):
    """Fit each layer's weight to the uncompressed network's outputs by least squares."""

    Options = ReconstructOptions
    needs = frozenset({"teacher", "calibration"})

    def on_attach(self, s: Any) -> None:
        chosen = self.options.weights
        self.chosen = None if chosen is None else frozenset(s.tensors(chosen))
        if not self._layers(s):
            raise BindError(
                f"'{self.id}': none of the selected weights belongs to a convolution (2-D, zero "
                f"padding) or linear layer of {s.name}, so there is nothing to reconstruct."
            )

    def on_fire(self, s: Any, progress: float) -> None:
        known = s.teacher_graph.nodes
        layers = {v.node.id: v for v in self._layers(s) if v.node.id in known}

        def before(id: str) -> None:
            if id in layers:
                self._fit(s, layers[id], model, teacher)

        with s.walk(self, before) as (model, teacher):
            for node in s.graph:
                if node.op != "output":
                    model.need(node.id)
        s.changed = True

    def _layers(self, s: Any) -> list[_Layer]:
        out = []
        for node in s.graph:
            if not is_followed(node):
                continue
            if self.chosen is None or node.params["weight"] in self.chosen:
                out.append(_around(s.graph, node, self.options.residual))
        return out

    def _fit(self, s: Any, layer: _Layer, model: Walk, teacher: Walk) -> None:
        address = layer.node.params["weight"]
        weight = s.overlays.effective(address, upto="mask").detach()
        norm = _Affine.of(s, layer.norm) if layer.norm is not None else None
        fit = _Fit(weight, layer.node, bias="bias" in layer.node.params or norm is not None)
        kept = s.plan.to_original().get((address, 0))
        rng = s.generator(self.id, address)
        dim = -1 if layer.node.op == "linear" else 1
        wanted = teacher.need(layer.add.id if layer.add is not None else layer.node.id)
        shortcut = model.need(layer.other) if layer.add is not None else [None] * len(wanted)
        for x, y, other in zip(model.need(layer.fed), wanted, shortcut, strict=True):
            if kept is not None and y.shape[dim] != weight.shape[0]:
                y = y.index_select(dim, torch.tensor(kept, device=y.device))
            if layer.add is not None:
                y = y - other
                y = norm.inverse(y, dim) if norm is not None else y
            fit.see(x, y, self.options.points, rng)
        fit.share()
        keep = s.mask(address)
        new, shift = fit.solve(self.options.ridge, keep)
        with torch.no_grad():
            s.parameter(address).copy_(new)
            if "bias" in layer.node.params:
                s.parameter(layer.node.params["bias"]).copy_(shift)
            elif norm is not None:
                norm.mean.sub_(shift)  # BatchNorm subtracts what the layer cannot add


@dataclass(frozen=True)
class _Affine:
    """BatchNorm in eval mode: y = (x - mean) * slope + offset, each (channels,)."""

    mean: Tensor
    slope: Tensor
    offset: Tensor

    @classmethod
    def of(cls, s: Any, node: Node) -> "_Affine":
        module = s.model.get_submodule(node.module)
        std = (module.running_var + module.eps).sqrt()
        one = torch.ones_like(std)
        gamma = module.weight.detach() if module.weight is not None else one
        beta = module.bias.detach() if module.bias is not None else 0 * one
        return cls(module.running_mean, gamma / std, beta)

    def inverse(self, y: Tensor, dim: int) -> Tensor:
        """x that gives y; the mean where the scale is zero, as nothing passes there."""
        shape = [1] * y.dim()
        shape[dim] = -1
        mean, slope, offset = (v.reshape(shape) for v in (self.mean, self.slope, self.offset))
        dead = slope.abs() < 1e-6
        return torch.where(dead, mean, (y - offset) / torch.where(dead, 1.0, slope) + mean)


class _Fit(Responses):
    """The least squares of one layer."""

    def solve(self, ridge: float, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """(weight, bias) of the least squares; where `keep` is False the weight is 0."""
        size = self.now.shape[1]
        pull = ridge * self.gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-12
        left = self.gram + pull[:, None, None] * torch.eye(size, dtype=torch.float64)
        if self.bias:
            left[:, -1, -1] -= pull  # a bias is not pulled
            left[:, -1, -1] += 1e-12
        right = self.right + pull[:, None, None] * self.now
        if keep is None:
            found = torch.linalg.solve(left, right)
        else:
            found = self._masked(left, right, keep)
        inner = size - int(self.bias)
        weight = found[:, :inner].transpose(1, 2).reshape(self.shape)
        shift = found[:, -1].reshape(-1) if self.bias else weight.new_zeros(self.shape[0])
        return weight.float(), shift.float()

    def _masked(self, left: Tensor, right: Tensor, keep: Tensor) -> Tensor:
        """Each output by itself over the inputs it keeps; outputs that keep the same, together."""
        out = torch.zeros_like(right)
        rows = keep.reshape(self.groups, right.shape[2], -1)
        for g in range(self.groups):
            kinds, of = torch.unique(rows[g], dim=0, return_inverse=True)
            for k, kind in enumerate(kinds):
                inputs = kind.nonzero().flatten()
                if self.bias:
                    inputs = torch.cat([inputs, torch.tensor([right.shape[1] - 1])])
                outputs = (of == k).nonzero().flatten()
                if len(inputs):
                    part = right[g][inputs][:, outputs]
                    found = torch.linalg.solve(left[g][inputs][:, inputs], part)
                    out[g, inputs[:, None], outputs] = found
        return out


def _around(graph: Graph, node: Node, residual: bool) -> _Layer:
    last, norm = node, None
    readers = graph.consumers(node.id)
    if len(readers) == 1 and readers[0].op == "batch_norm":
        last = norm = readers[0]
        readers = graph.consumers(norm.id)
    fed = node.inputs[0]
    if residual and len(readers) == 1 and readers[0].op == "add":
        add = readers[0]
        others = [i for i in add.inputs if i != last.id]
        if len(add.inputs) == 2 and len(others) == 1 and others[0] in _free(graph, node):
            return _Layer(node, fed, norm, add, others[0])
    return _Layer(node, fed, norm)


def _free(graph: Graph, node: Node) -> set[str]:
    """Nodes that do not depend on this one."""
    reached = {node.id}
    for n in graph:
        if reached & set(n.inputs):
            reached.add(n.id)
    return set(graph.nodes) - reached
