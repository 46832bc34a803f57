"""Constants, buffers and frozen parts."""

import torch
from torch import nn
from torch.nn import functional as F

from patterns.base import pattern

SQUARE = (2, 3, 6, 6)
CONV = 27 + 1


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class BufferPerChannel(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)
        self.register_buffer("mean", torch.randn(1, 4, 1, 1))
        self.register_buffer("std", torch.rand(4, 1, 1) + 0.5, persistent=False)

    def forward(self, x):
        return self.b((self.a(x) - self.mean) * self.std)


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class Numbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.b(2 * self.a(x).clamp(-1, 1) ** 2 / 3 - 1)


@pattern(SQUARE, more=True)
class OnesInForward(nn.Module):  # a constant as wide as the channels, made anew in each forward
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.a(x).mean((2, 3)) + torch.ones(4))


@pattern((2, 5, 6), free={"a.weight": (4, 6 + 1 + 3)})
class PositionBuffer(nn.Module):  # sines of (steps, channels)
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)
        self.register_buffer("sines", torch.randn(5, 4))

    def forward(self, x):
        return self.b(self.a(x) + self.sines)


@pattern((2, 5, 6), free={"a.weight": (4, 6 + 1 + 3)})
class MaskOverSteps(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])[None, :, None])

    def forward(self, x):
        return self.b(self.a(x) * self.mask)


@pattern(SQUARE, free={"a.weight": (4, CONV + 2 + 5 * 9), "b.weight": (5, 36 + 1 + 3)})
class FrozenStem(nn.Module):  # weights that are not trained are cut all the same
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)
        self.c = nn.Conv2d(5, 3, 1)
        for p in (*self.a.parameters(), *self.bn.parameters()):
            p.requires_grad_(False)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.bn(self.a(x))))))
