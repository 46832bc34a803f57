"""Learned ranges: the two ends of every grid are trained with the weights (NNCF)."""

from typing import Literal

from pydantic import Field

from gracile.core.method import method
from gracile.quantize.learned import LearnedOptions, LearnedQuantizer
from gracile.quantize.learned_ranges import End, LearnedRange, Span
from gracile.quantize.placement import ActivationSpec, WeightSpec


class RangesOptions(LearnedOptions):
    """Options of `quantize: learned`, added to `LearnedOptions`.

    Attributes:
        range_lr: learning rate of the ranges; no schedule changes it.
        range_optimizer: adam, whose steps do not depend on how many numbers share a range, or sgd.
    """

    range_lr: float | None = Field(default=1e-3, gt=0)
    range_optimizer: Literal["sgd", "adam"] = "adam"


@method(
    "quantize",
    "learned",
    source="Kozlov et al. 2020, arXiv:2002.08679, section 3.1 (NNCF), with the gradients of "
    "Esser et al. 2019, arXiv:1902.08153, eq. 3",
)
class Ranges(LearnedQuantizer):
    """Train with weights and activations on grids whose ranges are trained, too.

    Symmetric grids learn their end, asymmetric ones where they begin and how far they reach.
    """

    Options = RangesOptions

    def weight_range(self, spec: WeightSpec) -> LearnedRange:
        return End(spec) if spec.symmetric else Span(spec)

    def activation_range(self, spec: ActivationSpec) -> LearnedRange:
        return End(spec) if spec.symmetric else Span(spec)
