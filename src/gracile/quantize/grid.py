"""The grid of one weight as an overlay: its scale follows the weight until it is kept."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gracile.graph.graph import Graph, Node
from gracile.quantize.affine import (
    Scale,
    Zero,
    along,
    asymmetric_params,
    qrange,
    quantize,
    symmetric_params,
)
from gracile.quantize.fake_quant.affine import affine
from gracile.quantize.observers.base import Observer
from gracile.quantize.placement import ActivationSpec, WeightSpec

Params = Callable[[Tensor, Tensor, WeightSpec | ActivationSpec], tuple[Tensor, Tensor]]


def params_of(
    low: Tensor,
    high: Tensor,
    spec: WeightSpec | ActivationSpec,
    scale: Scale = "float",
    zero: Zero = "nudge",
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range on the grid a spec asks for."""
    if spec.symmetric:
        narrow = getattr(spec, "narrow", False)
        return symmetric_params(low, high, spec.bits, spec.signed, narrow, scale)
    return asymmetric_params(low, high, spec.bits, spec.signed, scale, zero)


class WeightGrid:
    """The overlay that puts one weight on its grid.

    The scale is computed from the weight at every call, so it follows training and surgery, until
    `fix` keeps it. Rounding passes gradients straight through; the scale gets none.
    """

    def __init__(
        self,
        spec: WeightSpec,
        make_observer: Callable[[], Observer],
        make_params: Params = params_of,
    ):
        self.spec, self.make_observer, self.make_params = spec, make_observer, make_params
        self.qmin, self.qmax = qrange(spec.bits, spec.signed, spec.narrow)
        self.scale: Tensor | None = None
        self.zero_point: Tensor | None = None

    def params(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point: the kept ones, else those of this weight."""
        if self.scale is not None and self.zero_point is not None:
            return self.scale, self.zero_point
        return self.fresh(weight)

    def fresh(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of this weight, whatever is kept."""
        observer = observer_for(self.spec, self.make_observer)
        observer.observe(weight.detach())
        return self.make_params(*observer.range(), self.spec)

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight as the integer kernels will see it."""
        scale, zero_point = self.params(weight)
        return affine(weight, scale, zero_point, self.qmin, self.qmax, self.spec.axis)

    def integers(self, weight: Tensor) -> Tensor:
        """The weight on its grid, as integers less their zero point."""
        scale, zero_point = self.params(weight)
        q = quantize(weight, scale, zero_point, self.qmin, self.qmax, self.spec.axis)
        return q - along(zero_point, q, self.spec.axis)

    def fix(self, weight: Tensor) -> None:
        """Keep this weight's scale and zero point from now on."""
        self.scale, self.zero_point = self.params(weight)

    def keep(self, index: Tensor) -> None:
        """Output channels were removed: only these are left."""
        if self.scale is not None and self.zero_point is not None:
            self.scale, self.zero_point = self.scale[index], self.zero_point[index]


class FoldedGrid(WeightGrid):
    """One grid for a weight as it is with its BatchNorm folded in.

    The weight w is put on (q s) / f, f = |gamma| / sqrt(running variance + eps) per output channel,
    so that what a runtime stores, w f, lies on q s. BatchNorm itself trains on as ever.

    Args:
        factor: f as it is now, (channels,).
    """

    def __init__(
        self,
        spec: WeightSpec,
        make_observer: Callable[[], Observer],
        make_params: Params,
        factor: Callable[[], Tensor],
    ):
        super().__init__(spec, make_observer, make_params)
        self.factor = factor

    def fresh(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point per channel."""
        f = self.factor().abs()
        f = torch.where(f > 0, f, torch.ones_like(f))
        whole = replace(self.spec, axis=None)
        observer = observer_for(whole, self.make_observer)
        observer.observe(weight.detach() * along(f, weight, self.spec.axis))
        scale, zero_point = self.make_params(*observer.range(), whole)
        return scale / f, zero_point.expand(f.numel()).clone()


def observer_for(
    spec: WeightSpec | ActivationSpec, make_observer: Callable[[], Observer]
) -> Observer:
    """A new observer that knows the grid its range is for."""
    made = make_observer()
    made.axis = getattr(spec, "axis", None)
    made.bits, made.signed, made.symmetric = spec.bits, spec.signed, spec.symmetric
    made.narrow = getattr(spec, "narrow", False)
    return made


def norms_behind(graph: Graph) -> dict[str, Node]:
    """Weight of a layer -> the BatchNorm that alone reads it and is folded into it at export."""
    out = {}
    for node in graph.of_op("conv", "linear"):
        readers, weight = graph.consumers(node.id), node.params.get("weight")
        alone = len(readers) == 1 and readers[0].op == "batch_norm"
        if weight is not None and alone and "running_var" in readers[0].params:
            out[weight] = readers[0]
    return out


def norm_factor(s: Any, norm: Node) -> Tensor:
    """gamma / sigma of a BatchNorm as it is now, (channels,)."""
    layer = s.model.get_submodule(norm.module)
    sigma: Tensor = (layer.running_var + layer.eps).sqrt()
    return 1 / sigma if layer.weight is None else layer.weight.detach() / sigma
