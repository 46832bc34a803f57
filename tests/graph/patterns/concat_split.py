"""Concatenations and splits: index maps that shift, double, interleave and share."""

import torch
from torch import nn
from torch.nn import functional as F

from patterns.base import pattern

SQUARE = (2, 3, 8, 8)


@pattern(SQUARE, free={"a.weight": (4, 27 + 1 + 2 + 3), "b.weight": (5, 27 + 1 + 2 + 3)})
class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(9)
        self.c = nn.Conv2d(9, 3, 1)

    def forward(self, x):
        return self.c(torch.sigmoid(self.bn(torch.cat([self.a(x), self.b(x)], 1))))


@pattern(SQUARE, free={"a.weight": (4, 27 + 1 + 2 * 3)})
class ConcatTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.a(x)
        return self.b(torch.cat([x, F.relu(x)], dim=1))


@pattern(
    SQUARE,
    free={
        "stem.weight": (4, 27 + 1 + 2 + 9 * 2 + 2 + 9 * 2 + 2 + 3),
        "a.weight": (2, 9 * 4 + 1 + 2 + 9 * 2 + 2 + 3),
        "b.weight": (2, 9 * 6 + 1 + 2 + 3),
    },
)
class Dense(nn.Module):  # DenseNet: each layer reads all before it, through a norm of its own
    def __init__(self):
        super().__init__()
        self.stem, self.n1, self.a = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, 1, 1)
        self.n2, self.b = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3, 1, 1)
        self.n3, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.a(F.relu(self.n1(x)))], 1)
        x = torch.cat([x, self.b(F.relu(self.n2(x)))], 1)
        return self.fc(F.relu(self.n3(x)).mean((2, 3)))


@pattern(SQUARE, free={"a.weight": (4, 27 + 1 + 2)})
class ConcatInput(nn.Module):  # the model's input stays
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        return self.b(torch.cat([x, F.relu(self.a(x))], 1))


@pattern(
    SQUARE,
    free={
        "a.weight": (2, 3 + 1 + 3),
        "b.weight": (3, 3 + 1 + 9 * 4),
        "d.weight": (4, 9 * 3 + 1 + 3),
    },
)
class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 1)
        self.d, self.e = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(9, 3, 1)

    def forward(self, x):
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        return self.e(torch.cat((self.a(x), self.d(self.b(x)), pooled), 1))


@pattern(SQUARE, free={"a.weight": (4, 27 + 1 + 27 + 1 + 3)})
class ConcatSpace(nn.Module):  # joined along the height: the channels are the same
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(x)], 2))


@pattern(SQUARE, free={"a.weight": (4, 27 + 1 + 3)})
class ConcatBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = self.a(x)
        return self.c(torch.cat([x, x.flip(3)], 0))


@pattern(SQUARE, free={"a.weight": (4, 2 * (27 + 1) + 3)})
class ChunkAdd(nn.Module):  # halves that are added go together
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        left, right = self.a(x).chunk(2, dim=1)
        return self.b(left + F.relu(right))


@pattern(SQUARE, free={"a.weight": (8, 27 + 1 + 3)})
class SplitSizes(nn.Module):  # parts of 2 and 6 that go different ways: all can be cut
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b, self.c = nn.Conv2d(2, 3, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        left, right = torch.split(self.a(x), [2, 6], dim=1)
        return self.b(left) + self.c(F.relu(right))


@pattern(SQUARE, free={"a.weight": (6, 27 + 1 + 3)})
class SplitEqual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3)
        self.b, self.c, self.d = (nn.Conv2d(2, 3, 1) for _ in range(3))

    def forward(self, x):
        p, q, r = self.a(x).split(2, dim=1)
        return self.b(p) + self.c(q) + self.d(r)


@pattern(SQUARE, free={"a.weight": (6, 27 + 1 + 3)})
class SplitInALoop(nn.Module):  # fx cannot iterate over the parts, torch.export can
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3)
        self.parts = nn.ModuleList(nn.Conv2d(2, 3, 1) for _ in range(3))

    def forward(self, x):
        parts = self.a(x).split(2, dim=1)
        return sum(conv(part) for conv, part in zip(self.parts, parts, strict=True))


@pattern(SQUARE, free={"a.weight": (6, None), "b.weight": (2, 4 + 1 + 3)})
class SliceByNumber(nn.Module):  # x[:, :2] passes, x[:, 2:] goes through a convolution (GhostNet)
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.c(torch.cat([x[:, :2], self.b(x[:, 2:])], 1))


@pattern(SQUARE, free={"a.weight": (4, None)})
class IndexByList(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.b(self.a(x)[:, [2, 0, 2]])


@pattern((2, 5, 6), free={"a.weight": (4, 2 * (6 + 1) + 3)})
class StackSum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.c(torch.stack([self.a(x), torch.tanh(self.b(x))], dim=1).sum(1))


@pattern((2, 6), free={"a.weight:inner": (4, 3 * (6 + 1) + 3)})
class Unbind(nn.Module):  # (N, 12) -> (N, 3, 4) -> three times (N, 4)
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(4, 3)

    def forward(self, x):
        p, q, r = self.a(x).unflatten(-1, (3, -1)).unbind(1)
        return self.b(torch.tanh(p) * q + r)


# Left half of stem passes; a reads the right half, b writes what joins it; then both interleave.
@pattern(
    SQUARE,
    free={
        "stem.weight": (8, None),
        "a.weight": (4, 4 + 1 + 9 + 2 + 4),
        "b.weight": (4, 4 + 1 + 3),
    },
)
class ShuffleUnit(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 1)
        self.dw, self.b = nn.Conv2d(4, 4, 3, 1, 1, groups=4, bias=False), nn.Conv2d(4, 4, 1)
        self.bn, self.fc = nn.BatchNorm2d(4), nn.Linear(8, 3)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, dim=1)
        x = torch.cat((left, self.b(self.bn(self.dw(F.relu(self.a(right)))))), dim=1)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.fc(x.mean((2, 3)))


@pattern(SQUARE, more=True)
class NarrowAndSelect(nn.Module):  # the first 4 channels, and channel 5 by itself
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        x = self.a(x)
        return self.b(torch.cat([x.narrow(1, 0, 4), x.select(1, 5).unsqueeze(1)], 1))
