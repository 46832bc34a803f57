"""Models that fx cannot follow because their forwards look at sizes."""

import torch
from torch import nn
from torch.nn import functional as F

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Modules, a free parameter, a buffer that is not saved, functional dropout."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.fc = nn.Linear(4 * 16, 5)
        self.register_buffer("table", torch.arange(8.0), persistent=False)

    def forward(self, x):
        if x.shape[1] != 3:
            raise ValueError("three channels, please")
        x = self.act(self.bn(self.conv(x))) * self.scale
        x = F.dropout(x, 0.5, self.training)
        return self.fc(x.view(x.size(0), -1)) + self.table[:5]


class Layer(nn.Module):
    """Attention with its heads written out, and a feed-forward part."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x, mask):
        n, length, width = x.shape
        q, k, v = (
            f(x).view(n, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        scores = (q @ k.transpose(2, 3)) / (width // self.heads) ** 0.5 + mask
        probabilities = F.dropout(scores.softmax(-1), 0.2, self.training)
        y = (probabilities @ v).transpose(1, 2).contiguous().view(n, length, width)
        x = self.norm(x + self.out(y))
        return x + self.down(F.gelu(self.up(x)))


class Encoder(nn.Module):
    """A small language model: token ids in, a dict out, the head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Embedding(7, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        if ids.shape[1] > 7:
            raise ValueError("the sentence is too long")
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.drop(self.words(ids) + self.places(places))
        mask = torch.zeros(ids.shape[1], ids.shape[1], device=ids.device)
        mask = mask.masked_fill(places[None] > places[:, None], -1e4)
        for layer in self.layers:
            x = layer(x, mask)
        return {"hidden": x, "logits": self.head(x)}


class Attends(nn.Module):
    """Dropout inside one operator, and batch normalization without a module."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(36, 24)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        n, length, _ = x.shape
        x = F.batch_norm(x, self.mean, self.var, training=self.training)
        if length < 9:
            q, k, v = self.qkv(x).reshape(n, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        p = 0.25 if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p)


def build(name):
    """A model and an example for it."""
    torch.manual_seed(0)
    if name == "encoder":
        return Encoder(), torch.arange(10).reshape(2, 5)
    return {"mixed": (Mixed(), X), "attends": (Attends(), X.flatten(2))}[name]
