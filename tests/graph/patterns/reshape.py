"""Changes of shape: exact maps from channels to the indices they become."""

import torch
from torch import nn
from torch.nn import functional as F

from patterns.base import pattern

SQUARE = (2, 3, 8, 8)
CONV = 27 + 1  # parameters of one 3x3 filter over 3 channels with its bias


@pattern(SQUARE, free={"a.weight": (4, CONV + 36 * 3)})
class FlattenPixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 3)

    def forward(self, x):
        return self.b(torch.flatten(F.relu(self.a(x)), 1))


@pattern(SQUARE, free={"a.weight": (4, CONV + 36 * 3)})
class ViewPixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 3)

    def forward(self, x):
        x = self.a(x)
        return self.b(x.view(x.size(0), -1))


@pattern(SQUARE, free={"a.weight": (4, CONV + 36 * 3)})
class HardCodedFlatten(nn.Module):  # 144 is 4 channels of 36 pixels
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(144, 3)

    def forward(self, x):
        return self.b(F.relu(self.a(x)).view(-1, 144))


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class HardCodedReshape(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.a(x).reshape(-1, 4, 36).mean(2))


@pattern(SQUARE, free={"a.weight": (4, CONV + 36 * 3)})
class ChannelsLastFlatten(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(144, 3)

    def forward(self, x):
        return self.b(self.a(x).permute(0, 2, 3, 1).flatten(1))


@pattern(SQUARE, free={"a.weight": (4, CONV + 5), "b.weight": (5, 4 + 1 + 3)})
class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Conv2d(5, 3, 1)

    def forward(self, x):
        x = F.gelu(self.b(self.a(x).permute(0, 2, 3, 1)))
        return self.c(x.movedim(-1, 1))


@pattern(SQUARE, free={"a.weight:outer": (3, 4 * CONV + 2)})
class PixelShuffle(nn.Module):  # 4 filters make one channel of four times the pixels
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.b(F.pixel_shuffle(self.a(x), 2))


@pattern(SQUARE, free={"a.weight": (3, CONV + 4 * 2)})
class PixelUnshuffle(nn.Module):  # one channel becomes four
    def __init__(self):
        super().__init__()
        self.a, self.b, self.down = nn.Conv2d(3, 3, 3), nn.Conv2d(12, 2, 1), nn.PixelUnshuffle(2)

    def forward(self, x):
        return self.b(self.down(F.relu(self.a(x))))


@pattern(SQUARE, free={"a.weight": (8, CONV + 3)})
class ChannelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.shuffle, self.b = nn.Conv2d(3, 8, 3), nn.ChannelShuffle(2), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.b(self.shuffle(F.relu(self.a(x))))


@pattern(SQUARE, free={"a.weight": (4, CONV + 4 * 2)})
class SpaceToDepth(nn.Module):  # by hand: (N, C, h, 2, w, 2) -> (N, 4C, h, w)
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        x = self.a(x)
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return self.b(x.reshape(n, c * 4, h // 2, w // 2))


@pattern(SQUARE, free={"a.weight": (4, CONV + 4 * 5), "b.weight": (5, 4 * 4 + 2)})
class PatchMerging(nn.Module):  # Swin: four shifted views of (N, H, W, C) side by side
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Linear(16, 5, bias=False), nn.Linear(5, 2)

    def forward(self, x):
        x = self.a(x).permute(0, 2, 3, 1)
        views = [x[..., i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        return self.c(self.b(torch.cat(views, -1)))


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class SqueezeUnsqueeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = F.adaptive_max_pool2d(self.a(x), 1).squeeze(-1).squeeze(-1)
        return self.b(x[:, None].unsqueeze(2)).squeeze(2).squeeze(1)


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class TokensAndBack(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = self.a(x)
        n, c, h, w = x.shape
        x = torch.tanh(x.flatten(2).transpose(1, 2))
        return self.b(x.transpose(1, 2).reshape(n, c, h, w))


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class RollFlipExpand(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = torch.roll(self.a(x), shifts=(1, 2), dims=(2, 3)).flip(3)
        x = x + x.mean((2, 3), keepdim=True).expand(-1, -1, 6, 6)
        return self.b(x.repeat(1, 1, 2, 1))


@pattern(SQUARE, free={"a.weight": (4, CONV + 2 * 3)})
class RepeatChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.b(self.a(x).repeat(1, 2, 1, 1))


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class PadAndResize(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.pad, self.b = nn.Conv2d(3, 4, 3), nn.ReflectionPad2d(1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = F.interpolate(self.pad(self.a(x)), scale_factor=2, mode="bilinear", align_corners=False)
        return self.b(F.pad(x, (1, 0, 1, 0)))


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class PadChannels(nn.Module):  # option A written by hand: two zero channels behind
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        return self.b(F.pad(self.a(x), (0, 0, 0, 0, 0, 2)))


@pattern(SQUARE, free={"a.weight": (2, CONV + 9 * 3)})
class Unfold(nn.Module):  # im2col: one channel becomes nine rows
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 3), nn.Linear(18, 3)

    def forward(self, x):
        return self.b(F.unfold(self.a(x), 3).transpose(1, 2))


@pattern(SQUARE, free={"a.weight": (2, CONV + 3)})
class UnfoldAndFold(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 3, 1)
        self.fold, self.unfold = nn.Fold((6, 6), 3), nn.Unfold(3)

    def forward(self, x):
        return self.b(self.fold(self.unfold(self.a(x))))


@pattern(SQUARE, free={"a.weight": (4, None)})
class IndexByBuffer(nn.Module):  # an order that is kept as a buffer, under torch.export
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    def forward(self, x):
        if x.shape[2] > 99:
            raise ValueError("too large")
        return self.b(torch.relu(self.a(x))[:, self.order])


@pattern(SQUARE, more=True)
class ShuffleTwice(nn.Module):  # the second split crosses the first; c // 2 is computed
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.a(x)
        for _ in range(2):
            n, c, h, w = x.size()
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.b(x)


@pattern(SQUARE, more=True)
class ShuffleOfTwo(nn.Module):  # 2 channels as (2, c // 2): one left would be (1, 0) or (2, 0)
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 3, 1)

    def forward(self, x):
        x = self.a(x)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.b(x)


@pattern((2, 5, 6), free={"a.weight": (4, 6 + 1 + 3)})
class MatrixTransposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.a(x).mT.relu().mT)


@pattern((2, 5, 6), free={"a.weight": (4, 6 + 1 + 3)})
class NamedResult(nn.Module):  # the largest over time, by the name of the result
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.max(self.a(x), 1).values)
