"""Weights and activations of one bit: XNOR-Net's and DoReFa's weights, NNCF's scale and threshold.

sign(0) is -1 throughout, as in NNCF's code; XNOR-Net leaves it open.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from gracile.nn.binary import step
from gracile.quantize.affine import along
from gracile.quantize.grid import WeightGrid
from gracile.quantize.learned_ranges import LearnedRange
from gracile.quantize.placement import WeightSpec

TINY = 1e-12  # scale of weights that are all zero
CHANNELS = {"conv": 1, "linear": -1}  # operator -> dim of its input that the channels lie along
FIRST = 0.5  # threshold at the start, as a share of the scale: a sigmoid of 0

Gradient = Literal["straight", "xnor"]


def magnitude(weight: Tensor, axis: int | None) -> Tensor:
    """Mean |w|: the scale with which signs are nearest to the weights.

    Args:
        weight: (O, I, ...).
        axis: kept; 0 for each filter (Rastegari et al. 2016, arXiv:1603.05279, eq. 6), 1 for each
            input channel, None for one number (Zhou et al. 2016, arXiv:1606.06160, eq. 7).

    >>> magnitude(torch.tensor([[1.0, -3.0], [0.0, 1.0]]), 0)
    tensor([2.0000, 0.5000])
    """
    mean = weight.abs().mean([d for d in range(weight.ndim) if d != axis])
    return mean.clamp(min=TINY)


def signed_scale(weight: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    """scale where a weight is above 0, -scale elsewhere; without gradients."""
    wide = along(scale, weight, axis).to(weight.dtype)
    return torch.where(weight > 0, wide, -wide)


class BinaryGrid(WeightGrid):
    """The overlay that gives a weight the sign of its numbers times their mean magnitude.

    Args:
        spec: of one bit.
        gradient: straight, the gradient is passed on unchanged, as DoReFa (eq. 7) and NNCF do; or
            xnor, it is multiplied by 1 / n + scale 1[|w| <= 1], n the numbers that share a scale
            (Rastegari et al. 2016, section 3.1).
    """

    def __init__(self, spec: WeightSpec, gradient: Gradient = "straight"):
        super().__init__(spec, None)  # type: ignore[arg-type]  # nothing is observed
        self.gradient = gradient

    def fresh(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean |w|; zero point 0."""
        scale = magnitude(weight.detach(), self.spec.axis)
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def __call__(self, weight: Tensor) -> Tensor:
        scale, axis, still = self.params(weight)[0], self.spec.axis, weight.detach()
        value = signed_scale(still, scale, axis)
        moved = weight - still
        if self.gradient == "xnor":
            n = still.numel() / scale.numel()
            moved = moved * (1 / n + along(scale, still, axis) * (still.abs() <= 1))
        return value + moved

    def integers(self, weight: Tensor) -> Tensor:
        """-1 and 1."""
        return torch.where(weight > 0, 1, -1).to(torch.int32)


class ScaleThreshold(LearnedRange):
    """scale H(x - scale threshold), both learned (Kozlov et al. 2020, arXiv:2002.08679).

    scale = exp(log_scale) is one number, threshold = sigmoid(logit) one for each channel.

    Args:
        channels: of what is read.
        dim: of it that they lie along.
    """

    def __init__(self, channels: int, dim: int):
        self.channels, self.dim, self.values = channels, dim, {}

    def start(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Begin with this scale and all thresholds at half of it."""
        logit = torch.full((self.channels,), math.log(FIRST / (1 - FIRST)), device=scale.device)
        self._set(log_scale=scale.reshape(()).log(), logit=logit)

    def grid(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and thresholds (as shares of it) with gradients."""
        return self.values["log_scale"].exp(), self.values["logit"].sigmoid()

    def __call__(self, x: Tensor, *_fixed: object) -> Tensor:
        """x on one bit."""
        return step(x, *self.grid(), self.dim)

    @torch.no_grad()
    def fixed(self) -> tuple[Tensor, Tensor]:
        """The scale, and the thresholds in the units of x: what is deployed."""
        scale, threshold = self.grid()
        return scale.clone(), scale * threshold

    def cut(self, index: Tensor) -> None:
        """Channels were removed: only these are left."""
        super().cut(index)
        self.channels = len(index)


def binary_spec(address: str, axis: int | None) -> WeightSpec:
    """The grid {-1, 1} of a weight, with one scale for each index of `axis`."""
    return WeightSpec(address, 1, signed=True, symmetric=True, axis=axis, narrow=True)


def input_axis(attrs: dict[str, Any], weight: Tensor) -> int | None:
    """Axis of a weight along which the channels lie that its layer reads; None if in groups."""
    groups = int(attrs.get("groups", 1))
    if groups == 1:
        return 1
    return 0 if groups == weight.shape[0] and weight.shape[1] == 1 else None
