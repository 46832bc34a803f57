"""Embeddings: tables whose columns are channels, tied or added to positions."""

import torch
from torch import nn

from patterns.base import pattern, tokens


@pattern(tokens(2, 5, of=9), free={"embed.weight": (4, 9 + 3)})
class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.b = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.embed(x))


@pattern(tokens(2, 5, of=9), free={"embed.weight": (4, 9 + 5 + 3)})
class PositionParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.b = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.position = nn.Parameter(torch.randn(1, 8, 4)[:, :5].clone())

    def forward(self, x):
        return self.b(torch.relu(self.embed(x) + self.position))


@pattern(tokens(2, 5, of=9), free={"word.weight": (4, 9 + 8 + 3)})
class PositionEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.word, self.place, self.b = nn.Embedding(9, 4), nn.Embedding(8, 4), nn.Linear(4, 3)
        self.register_buffer("ids", torch.arange(8))

    def forward(self, x):
        return self.b(self.word(x) + self.place(self.ids[: x.shape[1]]))


# Columns of the table, of the reader, of what writes back: 9 + (4 + 1) + 4 with the output tied.
@pattern(tokens(2, 5, of=9), free={"embed.weight": (4, 9 + 3 + 3 + 1), "up.weight": (3, 4 + 1 + 4)})
class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(3, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.down(torch.tanh(self.up(x))))


@pattern(tokens(2, 5, of=9), free={"embed.weight": (4, 9 + 3)})
class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.b = nn.EmbeddingBag(9, 4, mode="mean"), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.embed(x))


@pattern(tokens(2, 5, of=9), (2, 4), free={"embed.weight": (4, 9 + 3), "a.weight": (5, 4 + 1 + 3)})
class WithNumbers(nn.Module):  # categories and numbers side by side
    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(9, 3)

    def forward(self, x, y):
        return self.b(torch.cat([self.embed(x).sum(1), torch.relu(self.a(y))], -1))
