"""What PACT, DoReFa and WRPN share: activations behind a ReLU are clipped to [0, clip]."""

from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gracile.benchmark.processor import FULL_RANGE
from gracile.quantize.affine import qrange
from gracile.quantize.dorefa import DorefaGrid, dorefa_spec, squeezed
from gracile.quantize.engine import LAYER
from gracile.quantize.grid import WeightGrid
from gracile.quantize.learned import LearnedOptions, LearnedQuantizer
from gracile.quantize.learned_ranges import LearnedRange, Step
from gracile.quantize.placement import ActivationSpec, Placement, WeightSpec
from gracile.quantize.sensitivity import perturbation
from gracile.recipe.fields import kernel

OBSERVED = ("per_channel", "weight_symmetric", "weight_observer")  # of grids that are observed


class ClippedOptions(LearnedOptions):
    """Options of the methods that clip, added to `LearnedOptions`."""

    @property
    def rule(self) -> str:
        """Which rule weights follow; the options of observed grids count with `observer` alone."""
        return "own"

    @model_validator(mode="after")
    def _one_scale(self) -> Self:
        if self.rule != "observer":
            plain = (None, kernel("observer", "min_max"))
            set_ = [name for name in OBSERVED if getattr(self, name) not in plain]
            if set_:
                raise ValueError(
                    f"{set_[0]} does not count here: its weights have one scale, which follows "
                    "from the rule. Leave it out."
                )
        return self


class SqueezedOptions(ClippedOptions):
    """Options of the methods that have DoReFa's weights, added to `ClippedOptions`.

    Attributes:
        bits: of activations and weights; of weights 1 is sign(w) mean|w|.
        weight_bits: of weights, where they differ.
        zero: whether 0 is on the grid of weights (2^k - 1 levels instead of the paper's 2^k). What
            is pruned needs it; 8 bits have it in any case.
    """

    least_bits: ClassVar[int] = 1

    bits: int = Field(default=8, ge=1, le=16)
    weight_bits: int | None = Field(default=None, ge=1, le=16)
    zero: bool = False

    @model_validator(mode="after")
    def _two_levels(self) -> Self:
        if self.least_of_weights == 1 and (self.zero or self.rule == "observer"):
            raise ValueError("1 bit has no level for 0; write weight_bits: 2, or leave zero out")
        return self


class FixedGrid(WeightGrid):
    """The overlay of a weight with one symmetric grid whose end is given: [-end, end]."""

    def __init__(self, spec: WeightSpec, make_observer: Any, end: float):
        super().__init__(spec, make_observer)
        self.end = end

    def params(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The same scale for every weight, zero point 0."""
        scale = torch.tensor(self.end / self.qmax, device=weight.device)
        return scale, torch.zeros_like(scale, dtype=torch.int32)


class ClippedQuantizer(LearnedQuantizer):
    """Base of the methods that clip. The papers quantize what a ReLU gives and nothing else.

    Integer runtimes need more: the model's input and the branches of additions, which may be
    negative, have a learned step as in `quantize: lsq`, from the observed range on.
    """

    def clip(self) -> float | None:
        """The end of activations that cannot be negative, at first; None: as observed."""
        return 1.0

    def clip_range(self, spec: ActivationSpec) -> LearnedRange | None:
        """What is learned of the clip; None if it stands still."""
        return None

    def activation_range(self, spec: ActivationSpec) -> LearnedRange | None:
        return self.clip_range(spec) if spec.nonnegative else Step(spec)

    def observe(self, s: Any) -> None:
        """See the ranges of the float network.

        What these rules do to the size of weights is undone by batch norm once it trains; the
        running statistics that calibration uses are still those of the float weights.
        """
        for address in self.grids:
            s.overlays.remove(address, LAYER)
        super().observe(s)
        for address, grid in self.grids.items():
            s.overlays.set(address, LAYER, grid)

    def _place(self, s: Any) -> Placement:
        placement = super()._place(s)
        # One bit has no level on one of the sides of 0.
        activations = tuple(
            a if a.nonnegative else replace(a, bits=max(a.bits, 2)) for a in placement.activations
        )
        return replace(placement, activations=activations)

    def _params(self, members: list[ActivationSpec]) -> tuple[Tensor, Tensor]:
        clip = self.clip()
        scale, zero_point = super()._params(members)
        if clip is None or not members[0].nonnegative:
            return scale, zero_point
        qmin, qmax = qrange(members[0].bits, members[0].signed)
        return torch.full_like(scale, clip / (qmax - qmin)), torch.full_like(zero_point, qmin)


class SqueezedQuantizer(ClippedQuantizer):
    """Base of the methods that have DoReFa's weights; what is deployed is the squeezed weight."""

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        self.odd: dict[str, bool] = {}  # weight -> on the paper's levels, without 0

    def on_detach(self, s: Any) -> Any:
        lost = [a for a, odd in self.odd.items() if odd and s.overlays.get(a, "mask") is not None]
        if lost and self.laid:
            s.warn(
                "zeros-lost",
                f"'{self.id}' has no level for 0, so what was pruned of {lost[0]} is not zero "
                "any more. Set zero: true.",
            )
        return super().on_detach(s)

    def moved(self, weight: Tensor, spec: WeightSpec) -> float:
        """Of the squeezed weight, which has other units; told in those of the weight."""
        if not self._squeezes() or spec.bits - self.odd[spec.address] == 1:
            return super().moved(weight, spec)
        unit = float(weight.tanh().abs().max()) ** 2
        return unit * perturbation(squeezed(weight), self.rounded(weight, spec))

    def _squeezes(self) -> bool:
        return bool(self.options.rule != "observer")

    def _place(self, s: Any) -> Placement:
        placement = super()._place(s)
        if not self._squeezes():
            return placement
        specs = []
        for spec in placement.weights:
            stored, self.odd[spec.address] = dorefa_spec(
                spec, self._weight_bits(FULL_RANGE), self.options.zero
            )
            specs.append(stored)
        return replace(placement, weights=tuple(specs))

    def _grid(self, spec: WeightSpec) -> WeightGrid:
        if self._squeezes():
            return DorefaGrid(spec, self.options.weight_observer.fn, self.odd[spec.address])
        return super()._grid(spec)
