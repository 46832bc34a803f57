"""Convolutions: plain, in 1 to 3 dims, transposed, grouped, depthwise with any multiplier."""

import torch
from torch import nn
from torch.nn import functional as F

from patterns.base import pattern

SQUARE = (2, 3, 8, 8)


@pattern(SQUARE, free={"a.weight": (8, 66)}, protected={"b.weight": "output of the model"})
class Plain(nn.Module):  # 27 weights, a bias, scale and shift, and 4 x 9 weights that read it
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.b(F.relu(self.bn(self.a(x))))


@pattern(SQUARE, free={"a.weight": (6, 27 + 4)})
class Dilated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, dilation=2, padding=2, padding_mode="reflect", bias=False)
        self.b = nn.Conv2d(6, 4, 1, stride=2)

    def forward(self, x):
        return self.b(F.silu(self.a(x)))


@pattern((2, 4, 10), free={"a.weight": (6, 4 * 3 + 1 + 5), "b.weight": (5, 6 + 1 + 2 + 3 * 2)})
class OneDim(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv1d(4, 6, 3), nn.Conv1d(6, 5, 1), nn.BatchNorm1d(5)
        self.c = nn.Conv1d(5, 3, 2)

    def forward(self, x):
        return self.c(F.max_pool1d(self.bn(self.b(F.elu(self.a(x)))), 2))


@pattern((2, 2, 4, 4, 4), free={"a.weight": (4, 2 * 8 + 1 + 2 + 3)})
class ThreeDims(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), nn.Conv3d(4, 3, 1)

    def forward(self, x):
        return self.b(F.avg_pool3d(F.gelu(self.bn(self.a(x))), 2))


@pattern(SQUARE, free={"a.weight": (8, 27 + 1 + 6 * 4), "up.weight": (6, 8 * 4 + 1 + 2 + 2)})
class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.up = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.bn, self.b = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.b(F.leaky_relu(self.bn(self.up(F.relu(self.a(x))))))


@pattern(SQUARE, kinds=[("outer", 2), ("inner", 4), ("channels", 3)])
class TransposedGrouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.up = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.b = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.b(F.relu(self.up(F.relu(self.a(x)))))


@pattern(SQUARE, free={"a.weight": (6, 3 + 1 + 9 + 1 + 2 + 4)})
class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.bn, self.c = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.c(F.relu6(self.bn(self.b(self.a(x)))))


@pattern(SQUARE, kinds=[("channels", 4), ("inner", 2)])
class DepthwiseMultiplier(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4)
        self.bn, self.c = nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return self.c(F.relu(self.bn(self.b(F.relu(self.a(x))))))


@pattern(SQUARE, free={"a.weight": (5, 27 + 1 + 4 + 1 + 3)})
class TransposedDepthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.up = nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(5, 5, 2, stride=2, groups=5)
        self.b = nn.Conv2d(5, 3, 1)

    def forward(self, x):
        return self.b(F.relu(self.up(self.a(x))))


@pattern(SQUARE, kinds=[("outer", 2), ("inner", 4), ("inner", 6)])
class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=2)
        self.c = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


@pattern((2, 4, 6, 6), kinds=[("inner", 3)], protected={"a.weight:outer": "input"})
class GroupedInput(nn.Module):  # its groups read the model's input, so they stay
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


@pattern(SQUARE, free={"stem.weight": (4, None)}, kinds=[("outer", 3), ("inner", 2), ("inner", 2)])
class ResNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1)
        self.b, self.c = nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.Conv2d(6, 4, 1)
        self.norm, self.fc = nn.BatchNorm2d(6), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.c(F.relu(self.norm(self.b(F.relu(self.a(x))))))
        return self.fc(x.mean((2, 3)))


@pattern(
    SQUARE,
    free={"stem.weight": (4, 27 + 8 + 8 + 1 + 3), "up.weight": (8, 4 + 2 + 9 + 2 + 4)},
)
class InvertedResidual(nn.Module):  # MobileNetV2
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, bias=False)
        self.up, self.bn1 = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.mid, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.down, self.fc = nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu6(self.bn2(self.mid(F.relu6(self.bn1(self.up(x))))))
        return self.fc((x + self.down(y)).mean((2, 3)))


@pattern(SQUARE, free={"a.weight": (4, 9 * 3 + 1 + 9 + 9 + 2 * 3)})
class ManyKernels(nn.Module):  # MixConv without a split: two depthwise readers of one layer
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.b = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.c = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.d = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.a(x)
        return self.d(torch.cat([self.b(x), self.c(x)], 1))
