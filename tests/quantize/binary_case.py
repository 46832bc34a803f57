"""What the tests of binary networks share: a network, data, and a Session that trains it."""

import torch
from torch import nn
from torch.nn import functional as F

from gracile.recipe.build import build
from gracile.train.session import Session

STEPS, BATCH = 3, 8


class Tiny(nn.Module):
    """Stem, a residual block of two convolutions, pooling, a head: 3 x 8 x 8 -> 4."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.outer = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.outer(F.relu(self.bn2(self.inner(x)))))
        return self.head(self.pool(x).flatten(1))


def data(seed):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(BATCH, 3, 8, 8, generator=g), torch.randint(0, 4, (BATCH,), generator=g))
        for _ in range(STEPS)
    ]


def session(model=None, epochs=3, more=None, methods=None, optimizer=None, lr=None, **options):
    """A Session with `quantize: binary` and these options, or with `methods`."""
    torch.manual_seed(0)
    model = model or Tiny()
    entry = {"quantize": "binary", "when": {"start": "0ep"}, **options}
    methods = {**(more or {}), "b": entry} if methods is None else methods
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    return Session(
        model,
        build(train={"epochs": epochs, **({"lr": lr} if lr else {})}, methods=methods),
        optimizer or sgd,
        example=data(99)[0][0][:4],
        steps_per_epoch=STEPS,
        calibration=data(77),
        loss_of=F.cross_entropy,
    )


def train(s, first, last):
    """Epochs first to last - 1."""
    for epoch in range(first, last):
        s._next_epoch = epoch
        with s.epoch():
            for x, y in data(epoch):
                s.model.train()
                s.loss(F.cross_entropy(s.model(x), y)).backward()
                s.step()


def finished(model=None, epochs=3, **options):
    s = session(model, epochs, **options)
    train(s, 0, epochs)
    return s, s.finish()
