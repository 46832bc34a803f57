"""Weights on a few levels between the ends of their bucket, which follow the weights until kept.

Polino et al. 2018, arXiv:1802.05668: linear scaling of each bucket to [0, 1] (section 2.1), uniform
levels with nearest or stochastic rounding (section 2), or levels that are learned (section 4).
"""

from typing import Any

import torch
from torch import Tensor

from gracile.quantize.codebook import Shared
from gracile.quantize.groups import in_groups


def in_buckets(weight: Tensor, size: int) -> Tensor:
    """All weights in a row, cut into buckets: (buckets, size); the last is filled by its last one.

    >>> in_buckets(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), 4)
    tensor([[1., 2., 3., 4.],
            [5., 6., 6., 6.]])
    """
    flat = weight.flatten()
    return in_groups(torch.cat([flat, flat[-1:].expand(-len(flat) % size)]), size)


def ranges(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Smallest weight of each bucket, and how far the largest is from it: (buckets,) each.

    >>> ranges(torch.tensor([1.0, 3.0, -2.0, 5.0]), 2)
    (tensor([ 1., -2.]), tensor([2., 7.]))
    """
    low, high = in_buckets(weight, size).aminmax(dim=1)
    return low, high - low


def spread(values: Tensor, like: Tensor, size: int) -> Tensor:
    """The value of each weight's bucket, of the weight's shape."""
    return values.repeat_interleave(size)[: like.numel()].reshape(like.shape)


def unit(weight: Tensor, low: Tensor, width: Tensor, size: int) -> Tensor:
    """Weights as places in [0, 1] between the ends of their bucket; 0 where all are equal."""
    width = torch.where(width > 0, width, 1)
    return (weight - spread(low, weight, size)) / spread(width, weight, size)


def uniform_codes(places: Tensor, levels: int, noise: Tensor | None = None) -> Tensor:
    """Places in [0, 1] on evenly spaced levels, as numbers of levels.

    Args:
        places: any shape.
        levels: 2 or more, from 0 to 1.
        noise: uniform in [0, 1), of the same shape: rounds up with a chance that is the share of
            the way to the next level, so that the mean of many tries is the place itself. None
            takes the nearest, a half to the even one.

    >>> uniform_codes(torch.tensor([0.0, 0.3, 1.0]), 3), uniform_codes(
    ...     torch.tensor([0.3, 0.3]), 3, torch.tensor([0.39, 0.4]))
    (tensor([0, 1, 2]), tensor([0, 1]))
    """
    at = places * (levels - 1)
    whole = at.round() if noise is None else (at + noise).floor()
    return whole.clamp(0, levels - 1).long()


def nearest_codes(places: Tensor, levels: Tensor) -> Tensor:
    """Number of the nearest of some levels, in whatever order they are; halves to the smaller.

    >>> nearest_codes(torch.tensor([0.1, 0.6, 2.0]), torch.tensor([1.0, 0.0]))
    tensor([1, 0, 0])
    """
    sorted_, order = levels.detach().sort()
    middle = (sorted_[1:] + sorted_[:-1]) / 2
    return order[torch.searchsorted(middle, places.contiguous())]


def restore(codebook: Tensor, codes: Tensor, low: Tensor, width: Tensor, size: int) -> Tensor:
    """The weight that levels, codes and the ends of buckets stand for.

    Args:
        codebook: (K,) levels, as places between the ends of a bucket.
        codes: of the weight's shape.
        low, width: (buckets,), see `ranges`.
        size: weights in a bucket.

    Returns:
        low + width * level, of codes' shape. A level's gradient is the sum of those of its
        weights, each times the width of its bucket (Polino et al. 2018, section 4.1).

    >>> restore(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), *torch.tensor([[-2.0], [5.0]]), 2)
    tensor([-2.,  3.])
    """
    level = codebook.index_select(0, codes.long().flatten()).reshape(codes.shape)
    return spread(low, codes, size) + spread(width, codes, size) * level


class Bucketed(Shared):
    """The overlay of one weight; ends of buckets and codes are those of the weight as it is.

    Args:
        levels: (K,), as places between the ends of a bucket.
        bucket: weights in a bucket, None for one of all.
        learned: the levels get a gradient, and a weight has the nearest; else they are even.
        straight: gradients pass straight through to the weight; else it stands still.

    Attributes:
        noise: draws for stochastic rounding; None rounds to the nearest.
        low, width: of each bucket, once `settle` kept them, with `codes`.
    """

    def __init__(self, levels: Tensor, bucket: int | None, *, learned: bool, straight: bool):
        super().__init__(levels, torch.zeros(0))
        self.size, self.learned, self.straight = bucket, learned, straight
        self.noise: torch.Generator | None = None
        self.low = self.width = torch.zeros(0)

    @property
    def bucket(self) -> int | None:
        return self.size or self.codes.numel()

    def described(self) -> str:
        where = "of the tensor" if self.size is None else f"of each {self.size} weights"
        return f"{self.levels} levels between the ends {where}"

    def __call__(self, weight: Tensor) -> Tensor:
        still = weight.detach()
        book = self.values if self.learned else self.values.detach()
        value = restore(book, *self._coded(still), self._size(still)).to(weight.dtype)
        return value + (weight - still) if self.straight else value

    def settle(self, weight: Tensor) -> None:
        self.codes, self.low, self.width = self._coded(weight)

    def cut(self, dim: int, index: Tensor) -> None:
        """Nothing is kept that a cut could change: buckets are those of what is left."""

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """With the ends of the buckets, `low` and `width`, and `bucket`, the weights in one."""
        bucket = torch.tensor(self.bucket, dtype=torch.int64)
        ends = {"low": self.low.float(), "width": self.width.float(), "bucket": bucket}
        return {**super().tensors(dtype), **ends}

    def state(self) -> dict[str, Any]:
        return {"levels": self.values.detach().clone()}

    def _size(self, weight: Tensor) -> int:
        return self.size or weight.numel()

    def _coded(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, and low and width of each bucket."""
        size = self._size(weight)
        low, width = ranges(weight, size)
        places = unit(weight, low, width, size)
        if self.learned:
            return nearest_codes(places, self.values), low, width
        noise = None
        if self.noise is not None:
            noise = torch.rand(weight.shape, generator=self.noise).to(weight.device)
        return uniform_codes(places, self.levels, noise), low, width
