"""Layers without modules: parameters that the forward reads by itself."""

import torch
from torch import nn
from torch.nn import functional as F

from patterns.base import pattern

SQUARE = (2, 3, 6, 6)


def weight(*shape):
    return nn.Parameter(torch.randn(shape))


@pattern(SQUARE, free={"w": (4, 27 + 1 + 3)})
class FunctionalConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.c = weight(4, 3, 3, 3), weight(4), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.c(F.relu(F.conv2d(x, self.w, self.b, stride=2, padding=1)))


@pattern((2, 6), free={"w": (4, 6 + 1 + 3)}, protected={"v": "output of the model"})
class FunctionalLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.v = weight(4, 6), weight(4), weight(3, 4)

    def forward(self, x):
        return F.linear(torch.sigmoid(F.linear(x, self.w, self.b)), self.v)


@pattern((4, 6), free={"a.weight": (4, 6 + 1 + 2 + 1 + 3)})
class FunctionalNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.slope = nn.Linear(6, 4), nn.Linear(4, 3), weight(4)
        self.scale, self.shift = weight(4), weight(4)
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x):
        x = F.batch_norm(self.a(x), self.mean, self.var, self.scale, self.shift, self.training)
        return self.b(F.prelu(x, self.slope))


@pattern(SQUARE, free={"a.weight": (4, 27 + 1 + 9 + 3)})
class FunctionalDepthwise(nn.Module):  # the number of groups stands in the forward
    def __init__(self):
        super().__init__()
        self.a, self.w, self.b = nn.Conv2d(3, 4, 3), weight(4, 1, 3, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.b(F.conv2d(self.a(x), self.w, padding=1, groups=4))


@pattern((2, 5, 6), more=True)
class BareMatmul(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w, self.b = nn.Linear(6, 4), weight(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x) @ self.w))


@pattern((2, 5, 6), more=True)
class EinsumWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w, self.b = nn.Linear(6, 4), weight(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.einsum("btc,cd->btd", self.a(x), self.w))


@pattern((2, 6), more=True)
class Addmm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w, self.c = nn.Linear(6, 4), weight(4, 5), weight(5)
        self.b = nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.addmm(self.c, self.a(x), self.w))


@pattern(SQUARE, free={"a.weight": (4, 27 + 1 + 1 + 1 + 3)})
class FreeParameters(nn.Module):  # scale (4, 1, 1) and shift (1, 4, 1, 1)
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)
        self.scale, self.shift = weight(4, 1, 1), weight(1, 4, 1, 1)

    def forward(self, x):
        return self.b(torch.relu(self.a(x) * self.scale + self.shift))


@pattern(SQUARE, free={"a.weight": (4, 3 + 1 + 36 + 3)})
class SpatialBias(nn.Module):  # a learned shift of each channel and pixel
    def __init__(self):
        super().__init__()
        self.a, self.b, self.shift = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1), weight(4, 6, 6)

    def forward(self, x):
        return self.b(self.a(x) + self.shift)


@pattern((6, 5), more=True)
class MatrixTimesVector(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.v, self.b = nn.Linear(5, 4), weight(4), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.relu(torch.mv(self.a(x), self.v)))
