"""Ranges of a grid as trained parameters: a step, its two ends, or a clip.

Each turns its parameters into a scale and a zero point that carry gradients; rounding, and with it
the rest of the gradient, is `fake_quantize`. What is deployed are the same two numbers.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from gracile.nn.rounding import fake_quantize
from gracile.quantize.affine import qrange
from gracile.quantize.placement import ActivationSpec, WeightSpec

MOST = 2.0  # factor by which one step of the optimizer may change a parameter that stays positive


class LearnedRange:
    """The range of one grid; the activation's rule, or what a weight's overlay asks.

    A subclass says what its parameters are. They exist from `start` on.

    Args:
        spec: of the weight, or of the activation that leads those who share the scale.

    Attributes:
        values: name -> parameter, shape () or (channels,).
    """

    positive: ClassVar[tuple[str, ...]] = ()  # parameters that never leave (0, inf)
    residue: ClassVar[bool] = True

    def __init__(self, spec: WeightSpec | ActivationSpec):
        weight = isinstance(spec, WeightSpec)
        self.spec = spec
        self.axis = spec.axis if isinstance(spec, WeightSpec) else None
        self.batched = not weight
        self.qmin, self.qmax = qrange(spec.bits, spec.signed, getattr(spec, "narrow", False))
        self.values: dict[str, nn.Parameter] = {}

    def start(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take a grid over, as the first values."""
        raise TypeError(f"{type(self).__name__} does not say how it starts")

    def grid(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point with gradients; `x` is what they are for, if they depend on it."""
        raise TypeError(f"{type(self).__name__} does not say what its grid is")

    def __call__(self, x: Tensor, *_fixed: object) -> Tensor:
        """x on the grid; takes and ignores what else a rule is given."""
        scale, zero_point = self.grid(x)
        axis = self.axis if scale.ndim else None
        return fake_quantize(x, scale, zero_point, self.qmin, self.qmax, axis, residue=self.residue)

    @torch.no_grad()
    def fixed(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as they are deployed: float32 and int32."""
        scale, zero_point = self.grid()
        return scale.detach().clone(), zero_point.detach().to(torch.int32)

    @torch.no_grad()
    def limit(self, before: dict[str, Tensor]) -> None:
        """After a step of the optimizer: no positive parameter more than doubled or halved."""
        for name in self.positive:
            value, old = self.values[name], before[name]
            value.copy_(torch.minimum(torch.maximum(value, old / MOST), old * MOST))

    def cut(self, index: Tensor) -> None:
        """Output channels were removed: only these are left."""
        for name, value in self.values.items():
            if value.ndim:
                self.values[name] = nn.Parameter(value.detach()[index])

    def _set(self, **values: Tensor) -> None:
        self.values = {k: nn.Parameter(v.detach().float().clone()) for k, v in values.items()}


class Step(LearnedRange):
    """Learned step size: the scale itself, with LSQ's gradient (Esser et al. 2019, eq. 3).

    The gradient is multiplied by 1 / sqrt(N Qp), N the numbers of one image (of the weight) that
    share the scale, Qp the largest level (section 2.2). The zero point stays: 0, or the middle of
    an unsigned grid for values of both signs.
    """

    positive = ("step",)

    def __init__(self, spec: WeightSpec | ActivationSpec):
        super().__init__(spec)
        middle = self.qmin == 0 and not getattr(spec, "nonnegative", False)
        self.zero = (self.qmax + 1) // 2 if middle else (0 if spec.symmetric else self.qmin)
        self.levels = self.qmax - self.zero  # Qp

    def start(self, scale: Tensor, zero_point: Tensor) -> None:
        """The smallest step that covers the grid's range; the same where the zero point is ours."""
        low, high = (self.qmin - zero_point) * scale, (self.qmax - zero_point) * scale
        below = low / min(self.qmin - self.zero, -1)
        cover = torch.maximum(high / self.levels, below)
        self._set(step=torch.where(zero_point == self.zero, scale, cover))

    def grid(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        step: Tensor = self.values["step"]
        zero = torch.full_like(step, self.zero, dtype=torch.int32)
        if x is None:
            return step, zero
        each = x.numel() // (x.shape[0] if self.batched else step.numel())
        return _slowed(step, 1 / math.sqrt(max(each, 1) * self.levels)), zero


class End(LearnedRange):
    """Learned symmetric range [-end, end] or [0, end] (NNCF's `scale`), with zero point 0."""

    positive = ("end",)

    def start(self, scale: Tensor, zero_point: Tensor) -> None:
        self._set(end=scale * self.qmax)

    def grid(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale = self.values["end"] / self.qmax
        return scale, torch.zeros_like(scale, dtype=torch.int32)


class Span(LearnedRange):
    """Learned asymmetric range [low, low + span], 0 inside (NNCF's `input_low`, `input_range`).

    The zero point is the nearest integer to where 0 falls, with the span kept; to the gradient this
    rounding is the identity, too. NNCF widens the range instead.
    """

    positive = ("span",)

    def start(self, scale: Tensor, zero_point: Tensor) -> None:
        low = (self.qmin - zero_point) * scale
        self._set(low=low, span=scale * (self.qmax - self.qmin))

    def grid(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale = self.values["span"] / (self.qmax - self.qmin)
        exact = self.qmin - self.values["low"] / scale
        nearest = exact.detach().round().clamp(self.qmin, self.qmax)
        return scale, nearest + (exact - exact.detach())

    def limit(self, before: dict[str, Tensor]) -> None:
        """Keep 0 inside as well."""
        super().limit(before)
        low, span = self.values["low"], self.values["span"]
        with torch.no_grad():
            low.copy_(torch.maximum(low.clamp(max=0), -span))


class Clip(LearnedRange):
    """Learned clip alpha of [0, alpha]: d/d alpha is 1 above it, 0 elsewhere (PACT, eq. 3)."""

    positive = ("alpha",)
    residue = False

    def start(self, scale: Tensor, zero_point: Tensor) -> None:
        self._set(alpha=scale * (self.qmax - self.qmin))

    def grid(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale = self.values["alpha"] / (self.qmax - self.qmin)
        return scale, torch.full_like(scale, self.qmin, dtype=torch.int32)


def _slowed(x: Tensor, factor: float) -> Tensor:
    """x itself, its gradient multiplied by a factor."""
    still = x.detach()
    return still + factor * (x - still)
