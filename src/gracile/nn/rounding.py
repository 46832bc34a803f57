"""Fake quantization: rounding to an affine grid, with straight-through gradients to all it has.

The hot path of quantization-aware training. On a CPU a tensor with one scale goes through it in
pieces that stay in the processor's cache, and only the tensor itself is kept for the backward;
while torch.compile traces, it is plain operators, which the compiler fuses.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 1 << 17  # elements for each thread; 512 KiB of float32


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    *,
    residue: bool = True,
) -> Tensor:
    """Put a tensor on an affine grid and return it as floats: what integer arithmetic will see.

    q = clamp(round_half_even(x / scale) + zero_point, qmin, qmax), then (q - zero_point) * scale.
    It divides: multiplying by 1/scale breaks ties differently from the runtimes.

    Args:
        x: any shape; float.
        scale: > 0; one number, or 1-D with one value per index of `axis`.
        zero_point: integers of scale's shape; floats where it is learned.
        qmin: smallest integer of the grid.
        qmax: largest integer of the grid.
        axis: the axis kept by a per-channel scale; None for one scale.
        residue: whether what rounding adds counts in the gradient of the scale (LSQ), or only what
            is clipped (PACT).

    Returns:
        Tensor of x's shape and dtype. Gradients, where they are asked for, with rounding as the
        identity: to x, 1 where it lies within the range of the grid and 0 outside it; to scale,
        round(x / scale) - x / scale inside and q - zero_point outside; to zero_point, 0 inside and
        -scale outside.

    Raises:
        ValueError: a per-channel scale does not have one value per index of `axis`.

    Source:
        Jacob et al. 2017, arXiv:1712.05877, eq. 1 and 12; gradients of Esser et al. 2019,
        arXiv:1902.08153, eq. 3, where the range is decided before rounding, and with a zero point
        Bhalgat et al. 2020, arXiv:2004.09576, eq. 5; Choi et al. 2018, arXiv:1805.06085, eq. 3.

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
    if torch.compiler.is_compiling():
        return _fusible(x, scale, zero_point, qmin, qmax, residue)
    in_pieces = x.device.type == "cpu" and scale.numel() == 1
    in_pieces &= x.dtype == scale.dtype == torch.float32 and _line(x) is not None
    function = _InPieces if in_pieces else _AtOnce
    result: Tensor = function.apply(x, scale, zero_point, qmin, qmax, residue)  # type: ignore[no-untyped-call]
    return result


class _AtOnce(torch.autograd.Function):
    """Any layout, type and device; one scale or many."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, residue: bool
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.grid = qmin, qmax, residue
        return _rounded(x, scale, zero, qmin, qmax).to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero = ctx.saved_tensors
        qmin, qmax, residue = ctx.grid
        inside = (x >= (qmin - zero) * scale) & (x <= (qmax - zero) * scale)
        to_x = g * inside
        to_scale = to_zero = None
        if ctx.needs_input_grad[1]:
            y = _rounded(x, scale, zero, qmin, qmax)
            moved = y - (x if residue else y) * inside
            to_scale = (g * moved).sum_to_size(scale.shape) / scale
        if ctx.needs_input_grad[2]:
            to_zero = -scale * (g - to_x).to(scale.dtype).sum_to_size(scale.shape)
        return to_x, to_scale, to_zero, None, None, None


class _InPieces(torch.autograd.Function):
    """The same for one scale, float32 and a CPU: every piece passes through all steps in cache."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, residue: bool
    ) -> Tensor:
        low, high = qmin - float(zero), qmax - float(zero)
        step, y = scale.reshape(()), torch.empty_like(x)
        for a, b in _pieces(x, y):
            torch.div(a, step, out=b).clamp_(low, high).round_().mul_(step)
        ctx.save_for_backward(x, y if ctx.needs_input_grad[1] else None, scale)
        ctx.grid = low, high, residue
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale = ctx.saved_tensors
        low, high, residue = ctx.grid
        if g.stride() != x.stride():
            g = torch.empty_like(x).copy_(g)
        # hardtanh's backward is the mask in one pass, with open ends: one float further out.
        ends = torch.tensor([low, high]) * scale.detach().reshape(())
        beyond = torch.nextafter(ends, torch.tensor([-torch.inf, torch.inf])).tolist()
        to_x, moved = torch.empty_like(x), torch.empty(_piece(), dtype=x.dtype)
        wants_scale, wants_zero = ctx.needs_input_grad[1:3]
        by_scale = clipped = 0.0
        for a, b, d, out in _pieces(x, x if y is None else y, g, to_x):
            inside(d, a, *beyond, grad_input=out)
            part = moved[: len(a)]
            if wants_scale:
                inside(a if residue else b, a, *beyond, grad_input=part)
                by_scale += float(torch.dot(d, torch.sub(b, part, out=part)))
            if wants_zero:
                clipped += float(torch.sub(d, out, out=part).sum())
        return (
            to_x,
            by_scale / scale if wants_scale else None,
            -scale * clipped if wants_zero else None,
            None,
            None,
            None,
        )


def _fusible(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, residue: bool) -> Tensor:
    """The same values and gradients by operators that torch knows."""
    wide = x.to(torch.promote_types(x.dtype, scale.dtype))
    low, high = qmin - zero, qmax - zero
    level = torch.clamp(wide / scale, low, high)
    if residue:
        y = (level.round().detach() + (level - level.detach())) * scale
    else:
        clipped = torch.clamp(wide, low * scale, high * scale)
        y = (level.round() * scale).detach() + (clipped - clipped.detach())
    return y.to(x.dtype)


inside = torch.ops.aten.hardtanh_backward.grad_input


def _rounded(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int) -> Tensor:
    # At least float32: in half precision x / scale has not enough digits for 8 bits.
    level = x.to(torch.promote_types(x.dtype, scale.dtype)) / scale
    return level.clamp_(qmin - zero, qmax - zero).round_().mul_(scale)


def _piece() -> int:
    return PIECE * torch.get_num_threads()


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same pieces of tensors with the same layout, one after another."""
    lines = [_line(t) for t in tensors]
    size = _piece()
    return zip(*(line.split(size) for line in lines if line is not None), strict=True)


def _line(x: Tensor) -> Tensor | None:
    """A tensor as its numbers lie in memory, without a copy; None if there are gaps or repeats."""
    if x.is_contiguous():
        return x.view(-1)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(-1)
    return None
