"""PACT: the end at which activations are clipped is trained, with weight decay."""

from typing import Any, Literal

from pydantic import Field

from gracile.core.method import method
from gracile.errors import BindError
from gracile.quantize.clipped import SqueezedOptions, SqueezedQuantizer
from gracile.quantize.grid import WeightGrid
from gracile.quantize.learned_ranges import Clip, LearnedRange
from gracile.quantize.placement import ActivationSpec, Placement, WeightSpec
from gracile.quantize.sawb import MOST, ODD, WITH_ZERO, SawbGrid


class PactOptions(SqueezedOptions):
    """Options of `quantize: pact`, added to `SqueezedOptions`.

    Attributes:
        clip_init: first end of activations that cannot be negative; observed: that of `observer`.
        clip_decay: weight decay of the ends; default the training's.
        weight_rule: dorefa, as in the paper; sawb, levels up to the end that the moments of the
            weight say, for 2 to 5 bits (2 and 4 with `zero`); or observer: as in `quantize: qat`.
    """

    clip_init: float | Literal["observed"] = 8.0
    clip_decay: float | None = Field(default=None, ge=0)
    weight_rule: Literal["dorefa", "sawb", "observer"] = "dorefa"

    @property
    def rule(self) -> str:
        return self.weight_rule


@method(
    "quantize",
    "pact",
    source="Choi et al. 2018, arXiv:1805.06085; weights of SAWB: arXiv:1807.06964",
)
class Pact(SqueezedQuantizer):
    """Train with activations clipped to [0, alpha], alpha learned."""

    Options = PactOptions

    def _place(self, s: Any) -> Placement:
        placement = super()._place(s)
        if self.options.weight_rule == "sawb":
            for w in placement.weights:
                _check_sawb(self.id, w.bits - self.odd[w.address], self.odd[w.address])
        return placement

    def _grid(self, spec: WeightSpec) -> WeightGrid:
        if self.options.weight_rule == "sawb":
            return SawbGrid(spec, self.options.weight_observer.fn, self.odd[spec.address])
        return super()._grid(spec)

    def clip(self) -> float | None:
        first = self.options.clip_init
        return None if first == "observed" else float(first)

    def clip_range(self, spec: ActivationSpec) -> LearnedRange:
        return Clip(spec)

    def decay(self, s: Any, learned: LearnedRange) -> float:
        if not isinstance(learned, Clip):
            return 0.0
        if self.options.clip_decay is not None:
            return float(self.options.clip_decay)
        groups = [] if s.optimizer is None else s.optimizer.param_groups
        return float(groups[0].get("weight_decay", 0.0)) if groups else 0.0


def _check_sawb(id: str, bits: int, odd: bool) -> None:
    known = ODD if odd else WITH_ZERO
    if bits <= MOST and bits not in known:
        these = ", ".join(str(k) for k in known)
        raise BindError(
            f"'{id}': weight_rule: sawb has no end for {bits} bits {'without' if odd else 'with'} "
            f"a level for 0; it has {these}, and from {MOST + 1} on the largest weight. Take other "
            "bits, or weight_rule: dorefa."
        )
