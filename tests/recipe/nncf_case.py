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
