"""WRPN: weights clipped to [-1, 1], activations to [0, 1], with few bits, in a wider network."""

from dataclasses import replace
from typing import Any

from pydantic import Field

from gracile.core.method import method
from gracile.quantize.clipped import ClippedOptions, ClippedQuantizer, FixedGrid
from gracile.quantize.grid import WeightGrid
from gracile.quantize.placement import Placement, WeightSpec


class WrpnOptions(ClippedOptions):
    """Options of `quantize: wrpn`, added to `ClippedOptions`.

    Attributes:
        clip: activations that cannot be negative are clipped to [0, clip].
        weight_clip: weights are clipped to [-weight_clip, weight_clip].
    """

    clip: float = Field(default=1.0, gt=0)
    weight_clip: float = Field(default=1.0, gt=0)


@method("quantize", "wrpn", source="Mishra et al. 2017, arXiv:1709.01134, section 3")
class Wrpn(ClippedQuantizer):
    """Train with weights and activations clipped to ends that stand still."""

    Options = WrpnOptions

    def clip(self) -> float:
        return float(self.options.clip)

    def _place(self, s: Any) -> Placement:
        placement = super()._place(s)
        return replace(placement, weights=tuple(_one_grid(w) for w in placement.weights))

    def _grid(self, spec: WeightSpec) -> WeightGrid:
        return FixedGrid(spec, self.options.weight_observer.fn, self.options.weight_clip)


def _one_grid(spec: WeightSpec) -> WeightSpec:
    """2^(k-1) - 1 levels of each sign and 0, whatever the profile would prefer."""
    return replace(spec, signed=True, symmetric=True, narrow=True, axis=None)
