"""Modules called more than once and tensors with more than one name."""

import torch
from torch import nn
from torch.nn import functional as F

from patterns.base import pattern

SQUARE = (2, 3, 6, 6)


@pattern(SQUARE, free={"stem.weight": (6, 3 + 1 + 9 * 11 + 1 + 1 + 3)})
class CalledTwice(nn.Module):  # what it reads is what it writes; a scale of one number a channel
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.scale, self.fc = nn.Parameter(torch.rand(1, 6, 1, 1)), nn.Linear(6, 3)

    def forward(self, x):
        x = self.scale * self.conv(F.gelu(self.conv(self.stem(x))))
        return self.fc(x.mean((2, 3)))


@pattern(SQUARE, SQUARE, free={"a.weight": (4, 27 + 1 + 2 * 3)})
class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(8, 3)

    def forward(self, x, y):
        x, y = (F.relu(self.a(z)).mean((2, 3)) for z in (x, y))
        return self.b(torch.cat([x, y], 1))


@pattern(SQUARE, free={"a.weight": (4, 2 * (27 + 1) + 2 + 3 + 3)})
class SharedNorm(nn.Module):  # one norm for two layers makes them one group
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.c, self.d = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.c(self.bn(self.a(x))) + self.d(self.bn(self.b(x)))


@pattern((2, 6), free={"up.weight": (5, 6 + 1 + 1 + 6), "stem.weight": (6, None)})
class TiedLinear(nn.Module):  # one weight under two names, two biases
    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 6)
        self.up2, self.fc = nn.Linear(6, 5), nn.Linear(6, 3)
        self.up2.weight = self.up.weight

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(F.relu(self.up(x)))
        x = x + self.down(F.relu(self.up2(x)))
        return self.fc(x)


@pattern((2, 6), more=True)
class TiedAutoencoder(nn.Module):  # the decoder reads the encoder's weight transposed
    def __init__(self):
        super().__init__()
        self.stem, self.enc, self.fc = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.fc(F.linear(torch.tanh(self.enc(x)), self.enc.weight.t()))


@pattern(SQUARE, free={"a.weight": (4, 2 * 27 + 1 + 5 + 3), "b.weight": (5, 4 + 1 + 3)})
class SharedBias(nn.Module):  # two layers with one bias: their outputs go together
    def __init__(self):
        super().__init__()
        self.a, self.a2 = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.a2.bias = self.a.bias
        self.b, self.c = nn.Conv2d(4, 5, 1), nn.Conv2d(9, 3, 1)

    def forward(self, x):
        return self.c(torch.cat([self.b(self.a(x)), F.relu(self.a2(x))], 1))
