"""Learned step size quantization: every scale is trained with the weights."""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gracile.core.method import method
from gracile.distribute.collective import all_reduce_mean_
from gracile.quantize.learned import LearnedOptions, LearnedQuantizer
from gracile.quantize.learned_ranges import LearnedRange, Step
from gracile.quantize.observers.base import Observer
from gracile.quantize.placement import ActivationSpec, WeightSpec
from gracile.recipe.fields import Kernel, KernelRef

PAPER = "lsq"


class LsqOptions(LearnedOptions):
    """Options of `quantize: lsq`, added to `LearnedOptions`.

    Attributes:
        observer: first range of an activation; lsq: the step 2 mean|x| / sqrt(Qp) of the paper.
        weight_observer: first range of a weight; lsq: the same of the weight.
    """

    observer: KernelRef("observer", PAPER) = Field(default=PAPER)  # type: ignore[valid-type]
    weight_observer: KernelRef("observer", PAPER) = Field(  # type: ignore[valid-type]
        default=PAPER
    )


class Magnitude(Observer):
    """Mean magnitude of all batches of one size; `range` is (-mean, mean)."""

    saved = ("high",)

    def __init__(self) -> None:
        self.batches = 0

    def observe(self, x: Tensor) -> None:
        """Take one more tensor into the mean."""
        mean = x.detach().float().abs().mean()
        self.batches += 1
        self.high = mean if self.high is None else self.high + (mean - self.high) / self.batches
        self.low = -self.high

    def sync(self) -> None:
        """The mean of all ranks."""
        if self.high is not None:
            self.high = all_reduce_mean_(self.high)
            self.low = -self.high


def first_step(mean: Tensor, levels: int) -> Tensor:
    """2 mean|v| / sqrt(Qp) (Esser et al. 2019, section 2.1); zeros have the largest of all.

    >>> first_step(torch.tensor([0.7, 0.0]), 49)
    tensor([0.2000, 0.2000])
    """
    step = 2 * mean / math.sqrt(levels)
    most = step.max()
    return torch.where(step > 0, step, torch.where(most > 0, most, torch.ones_like(most)))


@method("quantize", "lsq", source="Esser et al. 2019, arXiv:1902.08153")
class Lsq(LearnedQuantizer):
    """Train with weights and activations on grids whose steps are trained, too."""

    Options = LsqOptions

    def weight_range(self, spec: WeightSpec) -> LearnedRange:
        return Step(spec)

    def activation_range(self, spec: ActivationSpec) -> LearnedRange:
        return Step(spec)

    def first_weight(self, weight: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
        if isinstance(self.options.weight_observer, Kernel):
            return super().first_weight(weight, spec)
        others = [d for d in range(weight.ndim) if d != spec.axis]
        return self._first(weight.abs().mean(others), spec)

    def _params(self, members: list[ActivationSpec]) -> tuple[Tensor, Tensor]:
        if isinstance(self.options.observer, Kernel):
            return super()._params(members)
        means = [self.found[a.id].high for a in members if a.observed]
        return self._first(torch.tensor(means).mean(), members[0])

    def _first(self, mean: Tensor, spec: WeightSpec | ActivationSpec) -> tuple[Tensor, Tensor]:
        step = Step(spec)
        scale = first_step(mean, step.levels)
        return scale, torch.full_like(scale, step.zero, dtype=torch.int32)

    def _observer(self, a: ActivationSpec) -> Any:
        paper = not isinstance(self.options.observer, Kernel)
        return Magnitude() if paper else super()._observer(a)
