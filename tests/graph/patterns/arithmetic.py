"""Arithmetic: functions of one element, comparisons, operators along a channel's pixels."""

import torch
from torch import nn
from torch.nn import functional as F

from patterns.base import pattern

SQUARE = (2, 3, 6, 6)
CONV = 27 + 1
ONE = (
    torch.atan, torch.sin, torch.cos, torch.sinh, torch.cosh, torch.log1p, torch.exp2, torch.expm1,
    torch.erf, torch.erfc, torch.sinc, torch.frac, torch.floor, torch.ceil, torch.trunc,
    torch.round, torch.sign, torch.square, F.tanhshrink, torch.positive, torch.nan_to_num,
)  # fmt: skip


class _Around(nn.Module):
    """A convolution of 4 channels, what is to be tried, and a convolution that reads 4."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.b(self.between(self.a(x)))


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class FunctionsOfOne(_Around):
    def between(self, x):
        y = 0.8 * x.sigmoid() + 0.1
        total = torch.clamp_min(y, 0.2) + torch.clamp_max(y, 0.8)
        for f in ONE:
            total = total + f(y)
        return total.to(x.dtype)


@pattern(SQUARE, more=True)
class InfiniteAtZero(_Around):  # a masked zero must not get there
    def between(self, x):
        y = torch.reciprocal(x.sigmoid() + 1)
        return torch.log(y) + torch.log2(y) + torch.log10(y)


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class FunctionsOfTwo(_Around):
    def between(self, x):
        y, z = torch.tanh(x), x.sigmoid() + 1
        total = torch.addcmul(y, y, z) + torch.lerp(y, z, 0.3) + torch.atan2(y, z)
        return total + torch.remainder(y, 2) + torch.fmod(y, 3) + torch.floor_divide(y.detach(), 2)


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class Comparisons(_Around):
    def between(self, x):
        inside = torch.logical_and(x > -1, x <= 1) | (x >= 2) & (x < 3)
        odd = torch.logical_or(x == 0, torch.logical_not(x != 0)) ^ ~torch.isfinite(x)
        odd = torch.logical_xor(odd, torch.logical_or(torch.isnan(x), torch.isinf(x)))
        return torch.where(inside, x, 0.5 * x).masked_fill(odd, 0.25)


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class AlongThePixels(_Around):
    def between(self, x):
        y = torch.cumsum(x, 3) + torch.cumprod(x.sigmoid(), 2) + torch.logcumsumexp(x, 3)
        y = y + torch.cummax(x, 3)[0] + torch.cummin(x, 2)[0]
        y = y + torch.logsumexp(x, (2, 3), keepdim=True) + torch.norm(x, dim=3, keepdim=True)
        y = y + x.prod(3, keepdim=True) + x.median(3, keepdim=True)[0]
        y = y + x.max(2, keepdim=True)[0] + x.min(3, keepdim=True)[0]
        return y + torch.triu(x) + torch.tril(x) + torch.topk(x, 1, dim=3)[0]


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class Places(_Around):  # where in each row something is
    def between(self, x):
        places = torch.argmax(x, 3, keepdim=True) + torch.argmin(x, 3, keepdim=True)
        some = torch.any(x > 0, 3, keepdim=True).float() + torch.all(x > 0, 3, keepdim=True).float()
        return torch.gather(x, 3, torch.argsort(x, dim=3)) + 0.1 * places.float() + some


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class MadeAlike(_Around):
    def between(self, x):
        y = torch.zeros_like(x) + x.new_full((), 0.5) + torch.ones_like(x) * x
        return y + torch.full_like(x, 0.1) + torch.relu(x).flatten(1).view_as(x)


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class GridSample(_Around):
    def __init__(self):
        super().__init__()
        self.register_buffer("grid", 2 * torch.rand(2, 4, 4, 2) - 1)

    def between(self, x):
        return F.grid_sample(x, self.grid, align_corners=False)


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class RowsByNumber(_Around):
    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.tensor([3, 1, 0]))

    def between(self, x):
        return torch.index_select(x, 2, self.rows) + x.new_zeros(1) + torch.zeros(1)


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class Windows(_Around):  # sliding windows of 2 pixels
    def between(self, x):
        return x.unfold(2, 2, 2).mean(-1)


@pattern((2, 5, 6), more=True, masked=False)
class CosineSimilarity(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(5, 3)

    def forward(self, x):
        return self.c(F.cosine_similarity(self.a(x), self.b(x), dim=-1))
