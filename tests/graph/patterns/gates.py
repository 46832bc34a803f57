"""Gates: one part of the channels decides how much of the others passes."""

import torch
from torch import nn
from torch.nn import functional as F

from patterns.base import pattern

SQUARE = (2, 3, 8, 8)
CONV = 27 + 1
TOKENS = (2, 5, 6)


@pattern(SQUARE, free={"a.weight": (4, CONV + 2 + 2 + 1 + 3), "down.weight": (2, 4 + 1 + 4)})
class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.down, self.up = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.b = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = self.a(x)
        gate = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))
        return self.b(x * F.hardsigmoid(gate))


@pattern(SQUARE, free={"a.weight": (4, CONV + 2 + 2 + 1 + 3), "down.weight": (2, 4 + 1 + 4)})
class SqueezeExciteLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.down, self.up = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Linear(2, 4)
        self.b = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = self.a(x)
        n, c, _, _ = x.size()
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3)).view(n, c)))))
        return self.b(x * gate.view(n, c, 1, 1).expand_as(x))


@pattern(SQUARE, more=True)
class EfficientChannelAttention(nn.Module):  # a convolution along the channels cannot lose one
    def __init__(self):
        super().__init__()
        self.a, self.k, self.b = (
            nn.Conv2d(3, 4, 3),
            nn.Conv1d(1, 1, 3, padding=1),
            nn.Conv2d(4, 3, 1),
        )

    def forward(self, x):
        x = self.a(x)
        y = self.k(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
        return self.b(x * torch.sigmoid(y))


@pattern(SQUARE, free={"a.weight": (4, 2 * CONV + 3)})
class GLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.b(F.glu(self.a(x), dim=1))


@pattern(TOKENS, free={"gate.weight": (5, 6 + 6 + 4)})
class SwiGLU(nn.Module):  # Llama's feed-forward
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)
        self.down = nn.Linear(5, 4, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pattern(TOKENS, free={"up.weight": (5, 2 * (6 + 1) + 4)})
class GEGLU(nn.Module):  # both halves from one layer
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(5, 4)

    def forward(self, x):
        x, gate = self.up(x).chunk(2, dim=-1)
        return self.down(x * F.gelu(gate))


@pattern(TOKENS, free={"up.weight": (5, 2 * (6 + 1) + 4)})
class SlicedGate(nn.Module):  # the same with the width written in two slices
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(5, 4)

    def forward(self, x):
        x = self.up(x)
        return self.down(x[..., :5] * torch.sigmoid(x[..., 5:]))


@pattern(SQUARE, more=True)
class SpatialAttention(nn.Module):  # CBAM: mean and largest over the channels
    def __init__(self):
        super().__init__()
        self.a, self.k, self.b = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(2, 1, 3, padding=1),
            nn.Conv2d(4, 3, 1),
        )

    def forward(self, x):
        x = F.relu(self.a(x))
        y = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.b(x * torch.sigmoid(self.k(y)))


@pattern(SQUARE, more=True)
class SelectiveKernel(nn.Module):  # softmax over two branches, channel by channel
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.s, self.c = nn.Linear(4, 8), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        u, v = self.a(x), self.b(x)
        g = self.s((u + v).mean((2, 3))).view(-1, 2, 4).softmax(1)[..., None, None]
        return self.c(u * g[:, 0] + v * g[:, 1])


@pattern(TOKENS, free={"a.weight": (4, 6 + 1 + 3)}, protected={"g.weight": "broadcasts"})
class ScalarGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.g, self.b = nn.Linear(6, 4), nn.Linear(6, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.a(x) * torch.sigmoid(self.g(x)))
