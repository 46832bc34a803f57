"""Normalizations: whose statistics they take decides what a cut means."""

import torch
from torch import nn
from torch.nn import functional as F

from patterns.base import pattern

SQUARE = (2, 3, 8, 8)
CONV = 27 + 1


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class BatchNormBare(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4, affine=False),
            nn.Conv2d(4, 3, 1),
        )

    def forward(self, x):
        return self.b(F.relu(self.bn(self.a(x))))


@pattern((4, 3, 4, 4), free={"a.weight": (4, CONV + 2 * 4 + 4 * 3)})
class BatchNormFlat(nn.Module):  # after flattening: a scale for each pixel of each channel
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(self.bn(self.a(x).flatten(1)))


@pattern((4, 5, 6), free={"a.weight": (4, 6 + 1 + 2 + 3)})
class BatchNormTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.bn(self.a(x).transpose(1, 2)).transpose(1, 2))


@pattern(SQUARE, free={"a.weight": (4, CONV + 2 + 3)})
class InstanceNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = (
            nn.Conv2d(3, 4, 3),
            nn.InstanceNorm2d(4, affine=True),
            nn.Conv2d(4, 3, 1),
        )

    def forward(self, x):
        return self.b(F.relu(self.n(self.a(x))))


@pattern(SQUARE, kinds=[("outer", 2)], masked=False)
class GroupNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.b(F.relu(self.n(self.a(x))))


@pattern(SQUARE, free={"a.weight": (6, CONV + 2 + 3)}, masked=False)
class GroupNormOfOne(nn.Module):  # statistics over all channels
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 6, 3), nn.GroupNorm(1, 6), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        return self.b(F.relu(self.n(self.a(x))))


@pattern(SQUARE, free={"a.weight": (4, CONV + 2 + 5), "b.weight": (5, 4 + 1 + 3)}, masked=False)
class LayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 4, 3), nn.LayerNorm(4)
        self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.n(self.a(x).permute(0, 2, 3, 1))
        return self.c(F.gelu(self.b(x)))


# The stream: stem 27 + 1, depthwise 9 + 1, norm 2, up 6, down 6 + 1, scale 1, fc 3.
@pattern(
    SQUARE,
    free={
        "stem.weight": (4, CONV + 9 + 1 + 2 + 6 + 6 + 1 + 1 + 3),
        "up.weight": (6, 4 + 1 + 4),
    },
    masked=False,
)
class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.dw = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.scale, self.fc = nn.Parameter(torch.rand(4, 1, 1)), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return self.fc((x + self.scale * y).mean((2, 3)))


@pattern((2, 5, 6), free={"a.weight": (4, 6 + 1 + 1 + 3)}, masked=False)
class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(6, 4), nn.RMSNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.n(self.a(x)))


@pattern((2, 5, 6), free={"a.weight": (4, 6 + 1 + 1 + 3)}, masked=False)
class RMSNormByHand(nn.Module):  # as Llama writes it: the mean of squares over the channels
    def __init__(self):
        super().__init__()
        self.a, self.w, self.b = nn.Linear(6, 4), nn.Parameter(torch.rand(4)), nn.Linear(4, 3)

    def forward(self, x):
        x = self.a(x)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.b(self.w * x)


@pattern(SQUARE, more=True, masked=False)
class LayerNormOverAll(nn.Module):  # statistics and parameters over (C, H, W)
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 6, 6]), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.b(self.n(self.a(x)))


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class LayerNormOverSpace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.b(F.layer_norm(self.a(x), (6, 6)))


@pattern(SQUARE, more=True, masked=False)
class Normalize(nn.Module):  # length 1 over the channels
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.b(F.normalize(self.a(x), dim=1))


@pattern(SQUARE, more=True, masked=False)
class LocalResponseNorm(nn.Module):  # neighbouring channels
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 4, 3), nn.LocalResponseNorm(3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.b(self.n(self.a(x)))


class _BatchNormAct2d(nn.BatchNorm2d):
    """As timm writes it: counts batches itself, and ends with its activation."""

    def __init__(self, channels, act=None):
        super().__init__(channels)
        self.act = act or nn.SiLU()

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        return self.act(
            F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                self.momentum,
                self.eps,
            )
        )


_BatchNormAct2d.__module__, _BatchNormAct2d.__qualname__ = (
    "timm.layers.norm_act",
    "BatchNormAct2d",
)  # rules know it by this name


@pattern(SQUARE, free={"a.weight": (4, CONV + 2 + 3)})
class BatchNormWithActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 4, 3), _BatchNormAct2d(4), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.b(self.n(self.a(x)))


@pattern(SQUARE, protected={"a.weight": "has 'act.weight' in its activation"})
class BatchNormWithTensorsInItsActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)
        self.n = _BatchNormAct2d(4, nn.PReLU(4))

    def forward(self, x):
        return self.b(self.n(self.a(x)))
