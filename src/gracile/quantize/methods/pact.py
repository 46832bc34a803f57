"""PACT: the end at which activations are clipped is trained, with weight decay."""

from typing import Any, Literal

from pydantic import Field

from gracile.core.method import method
from gracile.quantize.clipped import SqueezedOptions, SqueezedQuantizer
from gracile.quantize.learned_ranges import Clip, LearnedRange
from gracile.quantize.placement import ActivationSpec


class PactOptions(SqueezedOptions):
    """Options of `quantize: pact`, added to `SqueezedOptions`.

    Attributes:
        clip_init: first end of activations that cannot be negative; observed: that of `observer`.
        clip_decay: weight decay of the ends; default the training's.
        weight_rule: dorefa, as in the paper, or observer: weights as in `quantize: qat`.
    """

    clip_init: float | Literal["observed"] = 8.0
    clip_decay: float | None = Field(default=None, ge=0)
    weight_rule: Literal["dorefa", "observer"] = "dorefa"

    @property
    def rule(self) -> str:
        return self.weight_rule


@method("quantize", "pact", source="Choi et al. 2018, arXiv:1805.06085")
class Pact(SqueezedQuantizer):
    """Train with activations clipped to [0, alpha], alpha learned."""

    Options = PactOptions

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
