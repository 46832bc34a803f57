"""DoReFa's rules: weights squeezed by tanh, gradients rounded with noise (Zhou et al. 2016)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gracile.nn.rounding import fake_quantize
from gracile.quantize.grid import WeightGrid
from gracile.quantize.placement import WeightSpec

TINY = 1e-12  # what an all-zero tensor is divided by


def squeezed(weight: Tensor) -> Tensor:
    """tanh(w) / max |tanh(w)|, in [-1, 1], with gradients (arXiv:1606.06160, eq. 9).

    >>> squeezed(torch.tensor([0.5, -1.0]))
    tensor([ 0.6068, -1.0000])
    """
    bounded = weight.tanh()
    unit: Tensor = bounded / bounded.abs().max().clamp(min=TINY)
    return unit


def odd_levels(unit: Tensor, bits: int) -> Tensor:
    """2 quantize_k(x / 2 + 1/2) - 1 as integers: the odd numbers from -(2^k - 1) to 2^k - 1.

    The value is the integer divided by 2^k - 1. 0 is none of them.

    >>> odd_levels(torch.tensor([-1.0, -0.2, 0.1, 0.9]), 2)
    tensor([-3., -1.,  1.,  3.])
    """
    top = 2**bits - 1
    levels: Tensor = 2 * torch.round((unit + 1) / 2 * top) - top
    return levels


def rounded_gradient(grad: Tensor, bits: int, noise: Tensor) -> Tensor:
    """2 m (quantize_k(g / (2 m) + 1/2 + noise / (2^k - 1)) - 1/2), m = max |g| of each image.

    The noise makes the mean of the rounded gradient that of the exact one (arXiv:1606.06160,
    eq. 12). Clipped to [0, 1] before rounding, as in the released code.

    Args:
        grad: (B, ...).
        bits: k.
        noise: of grad's shape, uniform in [-1/2, 1/2].
    """
    top = 2**bits - 1
    most = grad.abs().amax(tuple(range(1, grad.ndim)), keepdim=True).clamp(min=TINY)
    unit = (grad / (2 * most) + 0.5 + noise / top).clamp(0, 1)
    rounded: Tensor = 2 * most * (torch.round(unit * top) / top - 0.5)
    return rounded


class DorefaGrid(WeightGrid):
    """The overlay that puts a squeezed weight on DoReFa's grid; what it gives is deployed.

    Args:
        spec: how it is stored; on the odd levels with one bit more than the grid has.
        make_observer: unused.
        odd: the paper's 2^k levels without 0; else the 2^k - 1 symmetric ones with it.
    """

    def __init__(self, spec: WeightSpec, make_observer: Any, odd: bool):
        super().__init__(spec, make_observer)
        self.bits = spec.bits - 1 if odd else spec.bits
        self.odd = odd

    def fresh(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """1 / (largest integer); of one bit the mean magnitude, until it is kept."""
        fixed = torch.tensor(1 / self.qmax, device=weight.device)
        scale = weight.detach().abs().mean().clamp(min=TINY) if self.bits == 1 else fixed
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def __call__(self, weight: Tensor) -> Tensor:
        scale, zero_point = self.params(weight)
        if self.bits == 1:  # sign(w) E|w|, straight through (eq. 7)
            value = torch.where(weight.detach() >= 0, scale, -scale)
            return value + (weight - weight.detach())
        unit = squeezed(weight)
        if not self.odd:
            return fake_quantize(unit, scale, zero_point, self.qmin, self.qmax)
        value = odd_levels(unit.detach(), self.bits) * scale
        return value + (unit - unit.detach())


def dorefa_spec(spec: WeightSpec, widest: int, zero: bool) -> tuple[WeightSpec, bool]:
    """How a weight is stored, and whether on the odd levels.

    Args:
        spec: as placed; its bits are those of the grid.
        widest: bits an integer of a weight may have; where one more than the grid's are too many,
            the levels with 0 are used.
        zero: 0 must be on the grid.
    """
    odd = not zero and spec.bits < widest
    bits = spec.bits + odd
    return replace(spec, bits=bits, signed=True, symmetric=True, narrow=True, axis=None), odd
