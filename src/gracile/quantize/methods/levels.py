"""Levels in buckets: quantized distillation, and differentiable quantization, without the teacher.

The teacher is `distill: kd`, an entry of its own.
"""

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gracile.core.method import method
from gracile.quantize.bucketed import Bucketed, ranges, unit
from gracile.quantize.codebook import Shared
from gracile.quantize.kmeans import density_start
from gracile.quantize.sharing import Sharing, SharingOptions, no_gain


class LevelsOptions(SharingOptions):
    """Options of `quantize: levels`, added to `SharingOptions`.

    Of these `train`, `codebook_lr` and `codebook_optimizer` are about learned levels.

    Attributes:
        bits: each bucket has 2^bits levels.
        bucket: weights in a row of the whole tensor that share their ends; null for all of it.
        levels: uniform, evenly spaced between the ends; or learned, places between the ends that
            all buckets of a tensor share, which start at the quantiles of its weights.
        rounding: nearest; or stochastic while training, so that a weight has its own value on
            average. The finished network has the nearest.
        train_weights: gradients at the rounded weights act on the float ones. Default as published:
            true with uniform levels, false with learned ones, which then move alone.
    """

    bits: int = Field(default=4, ge=1, le=8)
    bucket: int | None = Field(default=256, ge=2)
    levels: Literal["uniform", "learned"] = "uniform"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    train_weights: bool | None = None

    @model_validator(mode="after")
    def _one_rounding(self) -> Self:
        if self.levels == "learned" and self.rounding == "stochastic":
            raise ValueError(
                "learned levels are rounded to the nearest; write rounding: nearest, or levels: "
                "uniform"
            )
        if self.levels == "learned" and self.when.at_end:
            raise ValueError(
                "learned levels start at quantiles, which are poor before any training; write "
                "when: {start: 0ep}, or levels: uniform (or quantize: share) after training"
            )
        return self

    @property
    def moves_weights(self) -> bool:
        """Whether the float weights are trained."""
        return self.levels == "uniform" if self.train_weights is None else self.train_weights


@method(
    "quantize",
    "levels",
    source="Polino et al. 2018, arXiv:1802.05668, sections 2-4, algorithms 1 and 2",
)
class Levels(Sharing):
    """Train with weights on a few levels of each bucket, even ones or learned ones."""

    Options = LevelsOptions

    def on_batch_start(self, s: Any) -> None:
        if self.options.rounding == "stochastic":
            self._draw_from(lambda a: s.generator(self.id, a, s.epoch_number, s.batch))

    def on_batch_end(self, s: Any) -> None:
        self._draw_from(lambda a: None)

    def _draw_from(self, noise: Callable[[str], torch.Generator | None]) -> None:
        for address, x in self.shared.items():
            if isinstance(x, Bucketed):
                x.noise = noise(address)

    def _tunes(self) -> bool:
        return bool(super()._tunes() and self.options.levels == "learned")

    def _share(self, s: Any, address: str, weight: Tensor) -> Shared | str:
        if s.mask(address) is not None:
            self._refuse_masked(address)
        o, k = self.options, 2**self.options.bits
        size = o.bucket or weight.numel()
        low, width = ranges(weight, size)
        if not bool((width > 0).any()):
            return "all weights of a bucket are equal"
        why = no_gain(weight, codes=weight.numel(), levels=k, entries=k + 2 * len(low))
        if why is not None:
            return why
        if o.levels == "uniform":
            return self._again({"levels": torch.linspace(0, 1, k, device=weight.device)})
        return self._again({"levels": density_start(unit(weight, low, width, size), k)})

    def _again(self, state: dict[str, Any]) -> Shared:
        o = self.options
        learned = o.levels == "learned"
        return Bucketed(state["levels"], o.bucket, learned=learned, straight=o.moves_weights)
