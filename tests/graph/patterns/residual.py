"""Streams that several layers write: everything along one stream is one group."""

import torch
from torch import nn
from torch.nn import functional as F

from gracile.nn.shortcut import ChannelPad
from patterns.base import pattern

SQUARE = (2, 3, 8, 8)


@pattern(
    SQUARE,
    free={
        "stem.weight": (6, 27 + 3 + 5 * 9 + 5 * 9 + 2 + 4),
        "conv1.weight": (5, 6 * 9 + 2 + 6 * 9),
    },
)
class BasicBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.bn0(self.stem(x)))
        y = F.dropout(F.relu(self.bn1(self.conv1(x))), 0.5, self.training)
        return self.fc(F.relu(x + self.bn2(self.conv2(y))).mean((2, 3)))


@pattern(
    SQUARE,
    free={
        "stem.weight": (4, 27 + 1 + 3 + 6),  # read by the block and by the shortcut
        "a.weight": (3, 4 + 1 + 6 * 9),
        "b.weight": (6, 3 * 9 + 1 + 4 + 1 + 2 + 5),
    },
)
class Downsample(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)
        self.b = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.short, self.bn = nn.Conv2d(4, 6, 1, stride=2), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.b(F.relu(self.a(x)))
        return self.fc(F.relu(y + self.bn(self.short(x))).mean((2, 3)))


# A 3x3 convolution of 5 channels that reads and writes one stream loses 9 x (5 + 5 - 1) weights.
@pattern(SQUARE, free={"stem.weight": (5, 27 + 1 + 2 + 9 * 9 + 1 + 3)})
class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.conv, self.fc = nn.Conv2d(5, 5, 3, padding=1), nn.Linear(5, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv(F.relu(self.bn(x)))
        return self.fc(x.mean((2, 3)))


@pattern(SQUARE, free={"stem.weight": (4, 27 + 1 + 1 + 7 + 1 + 3)})
class LayerScale(nn.Module):  # one learned factor per channel on the branch
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.gamma, self.fc = nn.Parameter(torch.rand(4, 1, 1)), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + F.gelu(self.conv(x)) * self.gamma
        return self.fc(x.mean((2, 3)))


@pattern(SQUARE, free={"stem.weight": (8, None)})
class OptionA(nn.Module):  # a padding shortcut: 4 of the 8 units have no filter in the stem
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1)
        self.pad, self.fc = ChannelPad(4, 2, 2, stride=2), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.conv(x) + self.pad(x))
        return self.fc(x.mean((2, 3)))


@pattern(SQUARE, free={"a.weight": (4, 27 + 1 + 27 + 1 + 3)})
class BroadcastOverSpace(nn.Module):  # (N, C, H, W) + (N, C, 1, 1)
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.c(F.relu(self.a(x) + F.adaptive_avg_pool2d(self.b(x), 1)))


@pattern(SQUARE, free={"a.weight": (4, 27 + 1 + 3)}, protected={"g.weight": "broadcasts"})
class BroadcastOverChannels(nn.Module):  # (N, C, H, W) * (N, 1, H, W): one gate for all channels
    def __init__(self):
        super().__init__()
        self.a, self.g, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 1, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.c(self.a(x) * torch.sigmoid(self.g(x)))


@pattern((3, 6), free={"a.weight": (5, 6 + 1 + 4 + 4 + 1 + 2), "b.weight": (4, 5 + 1 + 5)})
class ResidualLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)
        self.c, self.d = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        x = x + 0.5 * self.c(F.selu(self.b(x)))
        return self.d(x)


@pattern((3, 6), free={"a.weight": (5, 2 * (6 + 1) + 2 * (5 + 1) + 4 + 4 + 2)})
class MaximumAndDifference(nn.Module):  # a, b, c and d write one stream; c and d read it too
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)
        self.c, self.d = nn.Linear(5, 5), nn.Linear(5, 5)
        self.e = nn.Linear(5, 2)

    def forward(self, x):
        y = torch.maximum(self.a(x), self.b(x))
        z = torch.minimum(self.c(y), y - self.d(y))
        return self.e(z / 3)


@pattern(SQUARE, free={"a.weight": (4, 27 + 1 + 2 * (9 * 7 + 1) + 3)})
class TwoBlocks(nn.Module):  # a stream through two blocks is still one group
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.b, self.c = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.d = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = self.a(x)
        x = x + F.mish(self.b(x))
        x = x.add(F.hardswish(self.c(x)))
        return self.d(x)


@pattern(SQUARE, free={"a.weight": (4, 27 + 1 + 4 + 1 + 3), "g.weight": (4, 27 + 1 + 4)})
class Highway(nn.Module):  # t * h + (1 - t) * x, with one gate a channel
    def __init__(self):
        super().__init__()
        self.a, self.g, self.h = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.c = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        y = self.a(x)
        t = torch.sigmoid(self.h(F.relu(self.g(x))))
        return self.c(t * y + (1 - t) * y.neg())
