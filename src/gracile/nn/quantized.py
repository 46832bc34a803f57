"""The activation quantizer that stays in a quantized model, and the affine rule it applies."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gracile.errors import UserError

Mode = Literal["off", "observe", "quantize"]
Rule = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
) -> Tensor:
    """Put a tensor on an affine grid and return it as floats: what integer arithmetic will see.

    q = clamp(round_half_even(x / scale) + zero_point, qmin, qmax), then (q - zero_point) * scale.
    It divides: multiplying by 1/scale breaks ties differently from the runtimes.

    Args:
        x: any shape; float.
        scale: > 0; one number, or 1-D with one value per index of `axis`.
        zero_point: integers of scale's shape.
        qmin: smallest integer of the grid.
        qmax: largest integer of the grid.
        axis: the axis kept by a per-channel scale; None for one scale.

    Returns:
        Tensor of x's shape and dtype. The gradient to x is 1 where x lies within the range of the
        grid and 0 outside it; none flows to scale and zero_point.

    Raises:
        ValueError: a per-channel scale does not have one value per index of `axis`.

    Source:
        Jacob et al. 2017, arXiv:1712.05877, eq. 1 and 12; straight-through gradient with the range
        decided before rounding as in Esser et al. 2019, arXiv:1902.08153, eq. 3.

    >>> fake_quantize(torch.tensor([0.5, 1.5, 9.0]), torch.tensor(1.0), torch.tensor(0), 0, 3)
    tensor([0., 2., 3.])
    """
    if axis is not None:
        shape = [1] * x.ndim
        shape[axis] = -1
        if scale.numel() != x.shape[axis] or zero_point.numel() != scale.numel():
            raise ValueError(
                f"axis {axis} of x has {x.shape[axis]} indices, but there are {scale.numel()} "
                f"scales and {zero_point.numel()} zero points."
            )
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    result: Tensor = _StraightThrough.apply(x, scale, zero_point, qmin, qmax)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
    ) -> Tensor:
        # At least float32: in half precision x / scale has not enough digits for 8 bits.
        dtype = torch.promote_types(x.dtype, scale.dtype)
        level = x.to(dtype) / scale
        if ctx.needs_input_grad[0]:
            shifted = level + zero_point
            ctx.save_for_backward((shifted >= qmin) & (shifted <= qmax))
        q = torch.clamp(torch.round(level) + zero_point, qmin, qmax)
        return ((q - zero_point) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None, None


class ActivationQuantizer(nn.Module):
    """Quantizes the tensor it is called on; laid on a captured graph by `graph.instrument`.

    `scale` (float32) and `zero_point` (int32) are buffers and so part of a checkpoint. `mode` and
    `observer` are not: "off" passes tensors through, "observe" also shows them to `observer`,
    "quantize" applies `rule` (by default `fake_quantize`).

    Raises:
        ValueError: bits outside 1..16, or a narrow range without a sign.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        bits: int = 8,
        *,
        signed: bool = False,
        symmetric: bool = False,
        narrow: bool = False,
    ):
        super().__init__()
        if not 1 <= bits <= 16:
            raise ValueError(f"bits of an activation must be in 1..16, got {bits}.")
        if narrow and not signed:
            raise ValueError("narrow leaves out the most negative integer; it needs signed=True.")
        self.bits, self.signed, self.symmetric, self.narrow = bits, signed, symmetric, narrow
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.mode: Mode = "off"
        self.rule: Rule = fake_quantize
        self.observer: Any = None  # an object with observe(x)

    @property
    def qmin(self) -> int:
        """Smallest integer on the grid."""
        return -(1 << self.bits - 1) + self.narrow if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest integer on the grid."""
        return (1 << self.bits - 1) - 1 if self.signed else (1 << self.bits) - 1

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep an observer out of the submodules, whatever it is: it must not be saved."""
        if name == "observer":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """The tensor itself ("off", "observe") or on its grid ("quantize")."""
        if self.mode == "quantize":
            return self.rule(x, self.scale, self.zero_point, self.qmin, self.qmax)
        if self.mode == "observe":
            if self.observer is None:
                raise UserError("an ActivationQuantizer in mode 'observe' needs an observer.")
            self.observer.observe(x.detach())
        return x

    def extra_repr(self) -> str:
        """What print() shows."""
        sign = "int" if self.signed else "uint"
        return f"{sign}{self.bits}, mode={self.mode}, scale={float(self.scale):.4g}"
