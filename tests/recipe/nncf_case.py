"""Configurations of NNCF, written shorter, and a network for their scopes."""

import json

import torch
from torch import nn

from gracile.recipe.document import dump
from gracile.recipe.load import loads
from gracile.recipe.nncf import convert


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class Net(nn.Module):
    """Stem, two blocks, a head: 3 x 8 x 8 -> 4."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.pool(self.layer1(torch.relu(self.stem(x)))).flatten(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 4, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.o(a.transpose(1, 2).reshape(b, n, -1))


class Encoder(nn.Module):
    """One block of a transformer, four heads and six units: 5 x 8 -> 4."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.norm = nn.LayerNorm(8)
        self.up, self.down, self.classifier = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = x + self.attention(x)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.classifier(x.mean(1))


WEIGHTED = [
    *("stem", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"),
    "fc",
]


def converted(*algorithms, model=None, epochs=None, **root):
    """(plain recipe, warnings) of a configuration with these algorithms."""
    text = json.dumps(
        {"input_info": {"sample_size": [1, 3, 8, 8]}, "compression": [*algorithms], **root}
    )
    return convert(text, name="c.json", epochs=epochs, model_names=model)


def entry(algorithm, **more):
    """The first entry an algorithm becomes."""
    return next(iter(converted(algorithm, **more)[0]["methods"].values()))


def loaded(*algorithms, **more):
    """The recipe of a configuration, read from the YAML it would be written as."""
    return loads(dump(converted(*algorithms, **more)[0]))
