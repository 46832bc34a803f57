"""Channel maps: what a forward does with numbers of channels in it, with the numbers as data.

Each takes the place of one call (`x.view(b, n, 12, 64)`, `x.chunk(2, dim=1)`, `x[:, 8:]`), computes
the same, and can be cut: surgery edits the attributes named here like any weight. `takes` names the
parameters that one is given at the call.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Reshape(nn.Module):
    """``x.reshape(sizes)``; a size that is None is given at the call, in order.

    A tuple stands for dims of the input that become one: a batch and the heads in it.

    >>> Reshape([None, 2, 3])(torch.zeros(4, 6), 4).shape
    torch.Size([4, 2, 3])
    >>> Reshape([(0, 1), 3])(torch.zeros(4, 2, 3)).shape
    torch.Size([8, 3])
    """

    def __init__(self, sizes: Sequence[int | tuple[int, ...] | None]):
        super().__init__()
        self.sizes = list(sizes)

    def forward(self, x: Tensor, *given: int) -> Tensor:
        """x in the new shape."""
        return x.reshape(self._at(x, given))

    def _at(self, x: Tensor, given: tuple[int, ...]) -> list[int]:
        rest = iter(given)
        sizes = [next(rest) if n is None else n for n in self.sizes]
        return [prod(x.shape[d] for d in n) if isinstance(n, tuple) else n for n in sizes]

    def extra_repr(self) -> str:
        """The sizes."""
        return f"sizes={self.sizes}"


class Expand(Reshape):
    """``x.expand(sizes)``; a size that is None is given at the call, in order."""

    def forward(self, x: Tensor, *given: int) -> Tensor:
        """x with dims of size 1 repeated."""
        return x.expand(self._at(x, given))


class Split(nn.Module):
    """``x.split(sizes, dim)``.

    >>> [t.shape[1] for t in Split([2, 3], 1)(torch.zeros(1, 5))]
    [2, 3]
    """

    def __init__(self, sizes: Sequence[int], dim: int):
        super().__init__()
        self.sizes, self.dim = list(sizes), dim

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts."""
        return tuple(x.split(self.sizes, self.dim))

    def extra_repr(self) -> str:
        """The sizes."""
        return f"sizes={self.sizes}, dim={self.dim}"


class Take(nn.Module):
    """Indices of one dim, in an order of their own; then, if given, an ordinary index.

    Attributes:
        source: for each output channel the input channel it copies.
        size: channels of the input.

    >>> Take([2, 0], 3, 1)(torch.tensor([[5, 6, 7]]))
    tensor([[7, 5]])
    """

    def __init__(self, source: Sequence[int], size: int, dim: int, then: Any = None):
        super().__init__()
        self.source, self.size, self.dim, self.then = list(source), size, dim, then

    def forward(self, x: Tensor) -> Tensor:
        """The chosen channels."""
        first, n = self.source[0], len(self.source)
        if self.source == list(range(first, first + n)):
            out = x if n == self.size else x.narrow(self.dim, first, n)
        else:
            out = x.index_select(self.dim, torch.tensor(self.source, device=x.device))
        return out if self.then is None else out[self.then]

    def cut(self, dim: int, keep: Sequence[int]) -> None:
        """Keep only these outputs (dim 0) or inputs (dim 1); an input still copied must stay."""
        if dim == 0:
            self.source = [self.source[i] for i in keep]
            return
        place = {old: new for new, old in enumerate(keep)}
        self.source, self.size = [place.get(i, -1) for i in self.source], len(keep)

    def extra_repr(self) -> str:
        """How many of how many."""
        return f"{len(self.source)} of {self.size}, dim={self.dim}"


class Convolution(nn.Module):
    """``F.conv1d``, ``conv2d`` or ``conv3d`` with the number of groups as data."""

    takes = ("weight", "bias")

    def __init__(self, groups: int, stride: Any = 1, padding: Any = 0, dilation: Any = 1):
        super().__init__()
        self.groups, self.stride, self.padding, self.dilation = groups, stride, padding, dilation

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """(N, I, ...), (O, I / groups, k...) -> (N, O, ...)."""
        function = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
        options = (self.stride, self.padding, self.dilation, self.groups)
        return function(x, weight, bias, *options)


class LayerNorm(nn.Module):
    """``F.layer_norm`` with its shape as data."""

    takes = ("weight", "bias")

    def __init__(self, normalized_shape: Sequence[int], eps: float = 1e-5):
        super().__init__()
        self.normalized_shape, self.eps = tuple(normalized_shape), eps

    def forward(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """x normalized over its last dims."""
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """``F.rms_norm`` with its shape as data."""

    takes = ("weight",)

    def __init__(self, normalized_shape: Sequence[int], eps: float | None = None):
        super().__init__()
        self.normalized_shape, self.eps = tuple(normalized_shape), eps

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """x normalized over its last dims."""
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class ScaledDotProduct(nn.Module):
    """``F.scaled_dot_product_attention`` with the scale of the width it was trained with.

    Attributes:
        width: channels of each head's queries and keys now.
        scale: factor of the scores; does not follow the width.
    """

    def __init__(self, width: int, scale: float):
        super().__init__()
        self.width, self.scale = width, scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """(..., L, E), (..., S, E), (..., S, V) -> (..., L, V)."""
        kwargs["scale"] = self.scale
        return F.scaled_dot_product_attention(query, key, value, *args[:3], **kwargs)


class Zeros(nn.Module):
    """``torch.zeros(sizes)``; a size that is None is given at the call, in order.

    >>> Zeros([2, None])(3).shape
    torch.Size([2, 3])
    """

    def __init__(self, sizes: Sequence[int | None]):
        super().__init__()
        self.sizes = list(sizes)

    def forward(self, *given: int, like: Tensor | None = None, **options: Any) -> Tensor:
        """Zeros of the type and device of `like`, if that is given."""
        rest = iter(given)
        sizes = [next(rest) if n is None else n for n in self.sizes]
        return torch.zeros(sizes, **options) if like is None else like.new_zeros(sizes, **options)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"sizes={self.sizes}"
