"""The affine map between real numbers and small integers: ranges, scales, zero points, rounding.

x ~ (q - zero_point) * scale with q in [qmin, qmax] (Jacob et al. 2018, arXiv:1712.05877, eq. 1).
Pure functions; everything is vectorised over channels, a per-tensor range is a 0-d tensor. A range
tells what was seen; the parameters made from it always put 0.0 exactly on the grid, because zero
padding and dead activations must not carry an error.
"""

import math
from typing import Literal

import torch
from torch import Tensor

MAX_BITS = 16  # (q - zero_point) * scale must be recoverable from its float32 value
SMALLEST_SCALE = 2.0**-100  # keeps x / scale and 1 / scale finite in float32
NEAR_ZERO = 1e-6  # OpenVINO takes an end of a range that is nearer to zero than this for zero
CHANNEL_FLOOR = 2.0**-16  # share of the widest channel's scale that no channel goes below

Scale = Literal["float", "power_of_two"]  # of a grid: any number, or one that is a shift
Zero = Literal["nudge", "tune"]  # how 0.0 gets onto an asymmetric grid


def qrange(bits: int, signed: bool, narrow: bool = False) -> tuple[int, int]:
    """Smallest and largest integer of a grid.

    Args:
        bits: width of the integer, 1 to 32 (2 at least if signed; 1 if it is narrow: -1 and 1).
        signed: two's complement if True, else from 0.
        narrow: leave out the most negative integer, so that the grid is its own mirror image.

    Returns:
        (qmin, qmax), both included.

    Raises:
        ValueError: no such integer type.

    >>> qrange(8, True, narrow=True), qrange(8, False)
    ((-127, 127), (0, 255))
    """
    if signed and narrow and bits == 1:
        return -1, 1
    if not (2 if signed else 1) <= bits <= 32:
        kind = "a signed" if signed else "an unsigned"
        raise ValueError(f"{kind} grid needs {2 if signed else 1} to 32 bits, got {bits}.")
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def symmetric_params(
    low: Tensor,
    high: Tensor,
    bits: int,
    signed: bool,
    narrow: bool = False,
    scale: Scale = "float",
) -> tuple[Tensor, Tensor]:
    """Scale for a grid whose zero point is 0: the smallest one that covers [low, high].

    scale = max(high / qmax, low / qmin), one float up; max(|low|, |high|) / qmax if narrow.

    Args:
        low, high: ends of the range, shape () or (channels,).
        bits, signed, narrow: the grid, see `qrange`.
        scale: power_of_two rounds it up to one, and the grid covers more than the range.

    Returns:
        scale (float32, > 0) and zero_point (int32, all 0), of low's shape.

    Raises:
        ValueError: low > high, a value that is not finite, or low < 0 on an unsigned grid.

    >>> symmetric_params(torch.tensor(-0.5), torch.tensor(1.27), 8, True)[0]
    tensor(0.0100)
    """
    low, high = _checked(low, high)
    qmin, qmax = qrange(bits, signed, narrow)
    if not signed and bool((low < 0).any()):
        raise ValueError(
            f"an unsigned grid with zero point 0 cannot hold {low.min().item():.6g}; use a signed "
            "grid or an asymmetric one."
        )
    step = high.clamp(min=0) / qmax
    if signed:
        step = torch.maximum(step, low.clamp(max=0) / qmin)
    # One float up, so that the end itself never falls outside by rounding and keeps its gradient.
    step = _power_of_two(step) if scale == "power_of_two" else _up(step)
    return _usable(step), torch.zeros_like(step, dtype=torch.int32)


def asymmetric_params(
    low: Tensor,
    high: Tensor,
    bits: int,
    signed: bool,
    scale: Scale = "float",
    zero: Zero = "nudge",
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers [min(low, 0), max(high, 0)].

    The zero point is the nearest integer to where 0.0 falls. With `nudge` the scale is kept (Jacob
    et al. 2018, section 3.1): an end moves by at most scale / 2, so no value of the range is off by
    more than that. With `tune` (Kozlov et al. 2020, arXiv:2002.08679, section 3.1) the scale grows
    until both ends are on the grid; where 0.0 is next to an end, that end gets one integer, so
    that, unlike there, neither end moves inwards and 0.0 is on the grid always.
    `range_of` gives the range that came of it. An end within 1e-6 of zero, but not zero, is
    moved out to 2e-6; where both are nearer than half of that, zero is the middle of the grid.

    Args:
        low, high: ends of the range, shape () or (channels,).
        bits, signed: the grid, see `qrange`.
        scale: power_of_two rounds it up to one, and the grid covers more than the range.
        zero: nudge or tune.

    Returns:
        scale (float32, > 0) and zero_point (int32, in [qmin, qmax]), of low's shape.

    Raises:
        ValueError: low > high, or a value that is not finite.

    >>> asymmetric_params(torch.tensor(-1.0), torch.tensor(1.55), 8, False)
    (tensor(0.0100), tensor(100, dtype=torch.int32))
    """
    low, high = _checked(low, high)
    qmin, qmax = qrange(bits, signed)
    steps = qmax - qmin
    low, high = _distinct_from_zero(low.clamp(max=0), high.clamp(min=0), steps)
    step = high / steps - low / steps  # not (high - low) / steps, which may overflow
    if zero == "tune":
        return _tuned(low, high, step, qmin, steps, scale)
    step = _usable(_power_of_two(step) if scale == "power_of_two" else step)
    zero_point = (qmin - torch.round(low / step)).clamp(qmin, qmax)
    return step, zero_point.to(torch.int32)


def range_of(
    scale: Tensor, zero_point: Tensor, bits: int, signed: bool, narrow: bool = False
) -> tuple[Tensor, Tensor]:
    """The real numbers of the grid's two ends: inverse of the two functions above.

    >>> range_of(torch.tensor(0.5), torch.tensor(1), 2, False)
    (tensor(-0.5000), tensor(1.))
    """
    qmin, qmax = qrange(bits, signed, narrow)
    return (qmin - zero_point) * scale, (qmax - zero_point) * scale


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    """Integers of real numbers: clamp(round half to even(x / scale) + zero_point, qmin, qmax).

    Args:
        x: any shape.
        scale, zero_point: shape (), or (channels,) along `axis` of x.
        qmin, qmax: the grid.
        axis: the kept axis, None per tensor.

    Returns:
        int32 tensor of x's shape.

    >>> quantize(torch.tensor([0.5, 1.5, 99.0]), torch.tensor(1.0), torch.tensor(0), -4, 3)
    tensor([0, 2, 3], dtype=torch.int32)
    """
    scale, zero_point = along(scale, x, axis), along(zero_point, x, axis)
    return (torch.round(x / scale) + zero_point).clamp(qmin, qmax).to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    """Real numbers of integers: (q - zero_point) * scale, float32 of q's shape.

    >>> dequantize(torch.tensor([0, 3]), torch.tensor(0.5), torch.tensor(1))
    tensor([-0.5000,  1.0000])
    """
    return (q - along(zero_point, q, axis)) * along(scale, q, axis)


def along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """View per-channel values so that they broadcast along `axis` of x.

    Raises:
        ValueError: not one value per channel.
    """
    if axis is None or values.ndim == 0:
        return values
    if values.shape != (x.shape[axis],):
        raise ValueError(
            f"axis {axis} of shape {tuple(x.shape)} needs {x.shape[axis]} values, "
            f"got shape {tuple(values.shape)}."
        )
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)


def _checked(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    low, high = low.detach().float(), high.detach().float()
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError(
            f"a quantization range must be finite, got [{low.min().item()}, {high.max().item()}]; "
            "the network computes inf or NaN on this data."
        )
    if bool((low > high).any()):
        raise ValueError("a quantization range needs low <= high in every channel.")
    return low, high


def _distinct_from_zero(low: Tensor, high: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    half = (steps + 1) // 2
    middle = torch.maximum(-low / half, high / (steps - half))  # its scale, both ends on the grid
    around = (low < 0) & (high > 0)
    tiny = around & (torch.maximum(-low, high) < NEAR_ZERO / 2)
    away = torch.where(around & (low > -NEAR_ZERO), -2 * NEAR_ZERO, low)
    far = torch.where(around & (high < NEAR_ZERO), 2 * NEAR_ZERO, high)
    return torch.where(tiny, -half * middle, away), torch.where(tiny, (steps - half) * middle, far)


def _tuned(
    low: Tensor, high: Tensor, step: Tensor, qmin: int, steps: int, scale: Scale
) -> tuple[Tensor, Tensor]:
    """The smallest scale with both ends on the grid, for the nearest zero point.

    The published formula, which compares two widened ranges, is the larger of these two scales.
    """
    below = torch.round(-low / torch.where(step > 0, step, 1))
    below = torch.where(low < 0, below.clamp(min=1), below)
    below = torch.where(high > 0, below.clamp(max=steps - 1), below).clamp(0, steps)
    step = torch.maximum(-low / below.clamp(min=1), high / (steps - below).clamp(min=1))
    if scale == "power_of_two":
        step = _power_of_two(step)
        below = torch.ceil(-low / _usable(step))
        wide = below + torch.ceil(high / _usable(step)) > steps
        step = torch.where(wide, 2 * step, step)
        below = torch.where(wide, torch.ceil(-low / _usable(step)), below)
    else:
        step = _up(step)
    return _usable(step), (qmin + below).to(torch.int32)


def _power_of_two(scale: Tensor) -> Tensor:
    """The smallest power of two that is not less; 0 stays 0."""
    mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(scale > 0, torch.ldexp(torch.ones_like(scale), exponent), scale)


def _up(scale: Tensor) -> Tensor:
    """The next float above; 0 stays 0."""
    above = torch.nextafter(scale, torch.full_like(scale, math.inf))
    return torch.where(scale > 0, above, scale)


def _usable(scale: Tensor) -> Tensor:
    # A channel that is all zero may have any scale: it takes the widest channel's, so that a bias
    # stored at input scale * weight scale keeps its resolution. Others stay within a factor 2^16 of
    # the widest, so that such a bias fits 32 bits.
    widest = scale.max().clamp(min=SMALLEST_SCALE)
    if bool(scale.max() == 0):
        return torch.ones_like(scale)
    return torch.where(scale == 0, widest, scale.clamp(min=(widest * CHANNEL_FLOOR).item())).clamp(
        min=SMALLEST_SCALE
    )
