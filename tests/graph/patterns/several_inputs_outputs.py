"""Several inputs, several outputs, outputs that are read inside as well."""

import torch
from torch import nn
from torch.nn import functional as F

from patterns.base import pattern

SQUARE = (2, 3, 6, 6)
CONV = 27 + 1


@pattern(
    SQUARE, SQUARE,
    free={"a.weight": (4, 2 * CONV + 5)},
    protected={"c.weight": "output of the model", "d.weight": "output of the model"},
)  # fmt: skip
class Dictionary(nn.Module):  # "features" is an output and is read by d
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.c, self.d = nn.Conv2d(4, 5, 1), nn.Conv2d(5, 3, 1)

    def forward(self, x, y):
        c = self.c(F.relu(self.a(x) + self.b(y)))
        return {"features": c, "scores": self.d(torch.relu(c))}


@pattern(SQUARE, free={"a.weight": (4, CONV + 3 + 5 * 9), "b.weight": (5, 4 * 9 + 1 + 2)})
class AuxiliaryHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.aux, self.head = nn.Linear(4, 3), nn.Linear(5, 2)

    def forward(self, x):
        x = F.relu(self.a(x))
        early = self.aux(x.mean((2, 3)))
        return self.head(F.relu(self.b(x)).mean((2, 3))), early


@pattern(
    (2, 4),
    (2, 5),
    (2, 6),
    free={"a.weight": (4, 5 + 3), "b.weight": (3, 6 + 3), "c.weight": (2, 7 + 3)},
)
class ThreeInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(5, 3), nn.Linear(6, 2)
        self.d = nn.Linear(9, 3)

    def forward(self, x, y, z):
        return self.d(torch.tanh(torch.cat([self.a(x), self.b(y), self.c(z)], dim=-1)))


@pattern(
    SQUARE,
    free={
        "c1.weight": (4, CONV + 45 + 3),
        "c2.weight": (5, 36 + 1 + 3),
        "p2.weight": (3, 5 + 6 + 2),
    },
)
class FeaturePyramid(nn.Module):  # two levels, laterals added top down, one head for both
    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, 2, 1)
        self.p1, self.p2 = nn.Conv2d(4, 3, 1), nn.Conv2d(5, 3, 1)
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        c1 = F.relu(self.c1(x))
        p2 = self.p2(F.relu(self.c2(c1)))
        p1 = self.p1(c1) + F.interpolate(p2, size=c1.shape[-2:], mode="nearest")
        return [self.head(p) for p in (p1, p2)]


@pattern(SQUARE, free={"a.weight": (4, CONV + 5), "b.weight": (5, 4 + 1 + 3)})
class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 3, 1)

    def forward(self, x):
        y = self.c(torch.relu(self.b(self.a(x))))
        return {"maps": (y, y * 2), "mean": [y.mean()]}


@pattern(SQUARE, (2, 4), protected={"a.weight": "input"}, more=True)
class AddedToInput(nn.Module):  # as wide as an input, so it stays
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x, y):
        return self.b(self.a(x).mean((2, 3)) + y)
