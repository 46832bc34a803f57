"""Networks with residual blocks of every kind, small."""

import torch
from torch import nn

from gracile.models.spec import resolve


class Transformer(nn.Module):
    """Two pre-norm layers of attention and MLP, a position added to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.position = nn.Parameter(torch.randn(5, 8))
        self.layers = nn.ModuleList([Layer() for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.Dropout(0.1))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Branch(nn.Module):
    """A stem, one block whose forward is given, a head."""

    def __init__(self, block):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.f = nn.Conv2d(4, 4, 3, padding=1)
        self.g = nn.Conv2d(4, 4, 1)
        self.relu_ = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)
        self.block = block

    def forward(self, x):
        return self.head(self.block(self, self.stem(x)).mean((2, 3)))


class Shared(nn.Module):
    """One layer called in two blocks, as in ALBERT, with a tied name nobody calls."""

    def __init__(self):
        super().__init__()
        self.stem, self.f, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.alias = nn.Module()
        self.alias.weight = self.f.weight

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.f(x)
        return self.head(x + self.f(x))


NETS = {
    "resnet20": (lambda: resolve("resnet20_cifar?num_classes=10").model, (2, 3, 32, 32)),
    "mobilenet": (lambda: resolve("mobilenet_v2?num_classes=10").model, (2, 3, 32, 32)),
    "transformer": (Transformer, (2, 5, 6)),
}


def build(name: str):
    """A network and an input for it."""
    torch.manual_seed(0)
    make, shape = NETS[name]
    return make().eval(), torch.randn(shape)
