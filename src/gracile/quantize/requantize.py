"""What integer kernels do with their sums: bring them to the next grid by a multiply and a shift.

Bit exact after gemmlowp (Jacob et al. 2018, arXiv:1712.05877, section 2.2 and appendix B), in
int64 tensors that hold 32-bit numbers. Runtimes differ here: some multiply in float32. With these
functions a simulation can be compared with a kernel integer by integer, and the widths an
accumulator needs are known before the network is on its device.
"""

import math

import torch
from torch import Tensor

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def multiplier_of(real: float) -> tuple[int, int]:
    """A positive real number as mantissa * 2^-31 * 2^-shift.

    Args:
        real: input scale * weight scale / output scale of a layer.

    Returns:
        mantissa in [2^30, 2^31), and the right shift, negative for real >= 1.

    Raises:
        ValueError: not a positive finite number, or a shift outside -31..31.

    >>> multiplier_of(0.25), multiplier_of(1.0)
    ((1073741824, 1), (1073741824, -1))
    """
    if not (math.isfinite(real) and real > 0):
        raise ValueError(f"a multiplier must be a positive finite number, got {real}.")
    fraction, exponent = math.frexp(real)  # real = fraction * 2^exponent, fraction in [0.5, 1)
    mantissa = math.floor(fraction * 2**31 + 0.5)
    if mantissa == 2**31:
        mantissa, exponent = 2**30, exponent + 1
    if not -31 <= exponent <= 31:
        raise ValueError(f"a multiplier must be in [2^-32, 2^31), got {real:.3g}.")
    return mantissa, -exponent


def doubling_high_mul(a: Tensor, b: Tensor | int) -> Tensor:
    """a * b / 2^31 of 32-bit numbers, rounded to nearest, halves up.

    gemmlowp's SaturatingRoundingDoublingHighMul: the high 32 bits of 2 a b. The one product that
    does not fit, (-2^31)^2, becomes 2^31 - 1.

    Args:
        a, b: int64 values of 32 bits.

    >>> doubling_high_mul(torch.tensor([2**30, -(2**30), -(2**31)]), -(2**31)).tolist()
    [-1073741824, 1073741824, 2147483647]
    """
    product = a.long() * b
    nudge = torch.where(product >= 0, 2**30, 1 - 2**30)
    high = torch.div(product + nudge, 2**31, rounding_mode="trunc")
    return high.clamp(max=INT32_MAX)


def rounding_divide_by_pot(x: Tensor, exponent: int) -> Tensor:
    """x / 2^exponent, rounded to nearest, halves away from zero: gemmlowp's RoundingDivideByPOT.

    Args:
        x: int64 values.
        exponent: 0 to 31.

    Raises:
        ValueError: another exponent.

    >>> rounding_divide_by_pot(torch.tensor([5, 6, 7, -5, -6, -7]), 2).tolist()
    [1, 2, 2, -1, -2, -2]
    """
    if not 0 <= exponent <= 31:
        raise ValueError(f"exponent must be in 0..31, got {exponent}.")
    mask = (1 << exponent) - 1
    threshold = (mask >> 1) + (x < 0).long()
    return (x >> exponent) + ((x & mask) > threshold).long()


def requantize(
    sums: Tensor, real: float, zero_point: int = 0, qmin: int = -128, qmax: int = 127
) -> Tensor:
    """A layer's 32-bit sums as integers of its output's grid.

    clamp(zero_point + round(sums * real), qmin, qmax), in the two roundings of a kernel without
    floats: first the product's high half, then the shift.

    Args:
        sums: accumulators, bias included; any integer type.
        real: input scale * weight scale / output scale; see `multiplier_of`. One value: with scales
            per channel, call it for each.
        zero_point, qmin, qmax: the output's grid.

    Returns:
        int32 of sums' shape.

    >>> requantize(torch.tensor([100, -100, 9999]), 0.25).tolist()
    [25, -25, 127]
    """
    mantissa, shift = multiplier_of(real)
    wide = (sums.long() << max(-shift, 0)).clamp(INT32_MIN, INT32_MAX)
    scaled = rounding_divide_by_pot(doubling_high_mul(wide, mantissa), max(shift, 0))
    return (scaled + zero_point).clamp(qmin, qmax).to(torch.int32)


def accumulator_bits(weight: Tensor, low: int, high: int, axis: int = 0) -> int:
    """Width of the signed integer that no sum of a layer outgrows, whatever its input.

    The worst input takes for each weight the end of its range that moves the sum furthest. No
    partial sum, in whatever order, goes further.

    Args:
        weight: integers less their zero point, as the kernel multiplies them.
        low, high: ends of the input's integers less its zero point, low <= 0 <= high.
        axis: of output channels.

    Raises:
        ValueError: 0 is not in [low, high].

    >>> accumulator_bits(torch.full((1, 4), 127), 0, 255)
    18
    """
    if not low <= 0 <= high:
        raise ValueError(f"zero must be in the input's range, got [{low}, {high}].")
    each = weight.long().transpose(0, axis).flatten(1)
    above, below = each.clamp(min=0).sum(1), each.clamp(max=0).sum(1)
    largest = int((above * high + below * low).max())
    smallest = int((above * low + below * high).min())
    return 1 + max(largest.bit_length(), (-smallest - 1).bit_length() if smallest < 0 else 0)
