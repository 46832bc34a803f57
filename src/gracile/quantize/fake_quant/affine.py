"""Uniform affine fake quantization: the rule that integer runtimes compute."""

from torch import Tensor

from gracile.core.kinds import fake_quant
from gracile.nn.rounding import fake_quantize


@fake_quant(
    "affine",
    source="Jacob et al. 2018, arXiv:1712.05877, eq. 1, 12; Krishnamoorthi 2018, arXiv:1806.08342",
)
def affine(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
) -> Tensor:
    """Round x to the grid (q - zero_point) * scale, q in [qmin, qmax], and return floats.

    q = clamp(round half to even(x / scale) + zero_point, qmin, qmax).

    The gradient is the straight-through estimator: rounding counts as the identity, so dL/dx is
    dL/d(result) where x lies within the grid's range and 0 where it is clipped. Scale and zero
    point get theirs where they ask for one, see `nn.rounding.fake_quantize`.

    Args:
        x: any shape.
        scale: > 0, shape () or (channels,).
        zero_point: integers of scale's shape.
        qmin, qmax: the grid's ends.
        axis: the axis of x that per-channel scales belong to.

    Returns:
        Tensor of x's shape and type.

    >>> affine(torch.tensor([-1.0, 0.3, 9.0]), torch.tensor(0.5), torch.tensor(1), 0, 7)
    tensor([-0.5000,  0.5000,  3.0000])
    """
    return fake_quantize(x, scale, zero_point, qmin, qmax, axis)
