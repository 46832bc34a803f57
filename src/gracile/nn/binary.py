"""Activations of one bit: above its channel's threshold a value is `scale`, else 0 (NNCF)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gracile.nn.quantized import ActivationQuantizer


def step(x: Tensor, scale: Tensor, threshold: Tensor, dim: int = 1) -> Tensor:
    """scale where x > scale * threshold, else 0, with gradients to all three.

    Args:
        x: any shape; float.
        scale: shape (); > 0.
        threshold: (channels,), as shares of the scale.
        dim: of x that the channels lie along.

    Returns:
        Tensor of x's shape. Gradients: to x, 1 on 0 <= x <= scale and 0 elsewhere; to scale,
        (result - x) / scale where x <= scale and 1 above; to threshold, -1 on 0 < x < scale.

    Source:
        Kozlov et al. 2020, arXiv:2002.08679, section 3.2, with the backward of NNCF 1.x's code.

    >>> step(torch.tensor([[0.2, 0.9]]), torch.tensor(2.0), torch.tensor([0.5, 0.4]))
    tensor([[0., 2.]])
    """
    result: Tensor = _Step.apply(x, scale, threshold, dim)  # type: ignore[no-untyped-call]
    return result


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, threshold: Tensor, dim: int) -> Tensor:
        y = stepped(x, scale, scale * threshold, dim)
        ctx.save_for_backward(x, scale, y)
        ctx.dim = dim
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, y = ctx.saved_tensors
        below = x <= scale
        to_x = g * ((x >= 0) & below)
        to_scale = (g * torch.where(below, (y - x) / scale, torch.ones_like(x))).sum()
        others = [d for d in range(x.ndim) if d != ctx.dim % x.ndim]
        to_threshold = -(g * ((x > 0) & (x < scale))).sum(others)
        return to_x, to_scale.to(scale.dtype), to_threshold.to(scale.dtype), None


def stepped(x: Tensor, scale: Tensor, level: Tensor, dim: int = 1) -> Tensor:
    """scale where x > level, else 0; without gradients.

    Args:
        x: any shape.
        scale: shape ().
        level: (channels,), in x's units.
        dim: of x that the channels lie along.
    """
    shape = [1] * x.ndim
    shape[dim] = -1
    return (x > level.reshape(shape)).to(x.dtype) * scale.to(x.dtype)


class Binarizer(ActivationQuantizer):
    """What one layer reads, on one bit: an `ActivationQuantizer` that compares by channel.

    Its grid {0, scale} is that of an unsigned integer of one bit. `learned` is what is trained in
    the place of `scale` and `threshold`, which are what is deployed.

    Args:
        channels: of what the layer reads.
        dim: of the tensor that they lie along.

    Attributes:
        threshold: (channels,), in the tensor's units.
    """

    threshold: Tensor

    def __init__(self, channels: int, dim: int = 1):
        super().__init__(1, signed=False, symmetric=True)
        self.dim = dim
        self.register_buffer("threshold", torch.full((channels,), 0.5))
        self.learned: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The tensor itself ("off", "observe") or on one bit ("quantize")."""
        if self.mode != "quantize":
            return super().forward(x)
        if self.learned is not None:
            return self.learned(x)
        return stepped(x, self.scale, self.threshold, self.dim)

    def extra_repr(self) -> str:
        """What print() shows."""
        return f"{len(self.threshold)} channels, {super().extra_repr()}"


class Step(nn.Module):
    """What a `Binarizer` computes once it is deployed, as an operator of its own."""

    level: Tensor
    scale: Tensor

    def __init__(self, scale: Tensor, level: Tensor, dim: int = 1):
        super().__init__()
        self.dim = dim
        self.register_buffer("scale", scale.detach().clone().reshape(()))
        self.register_buffer("level", level.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """scale where x > level, else 0."""
        return stepped(x, self.scale, self.level, self.dim)
