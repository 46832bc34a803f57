"""What the tests of methods share that judge candidates by their loss: networks, data, sessions."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gracile.recipe.load import loads
from gracile.train.session import Session


class Net(nn.Module):
    """A stem of 8 channels, a branch of 12 that returns to it, a layer of 10, a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.outer = nn.Conv2d(12, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.bn(self.stem(x))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Three(nn.Module):
    """1 -> 2 -> 3 -> 1, linear: what each channel does to the output is a product."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(*n, bias=False) for n in ((1, 2), (2, 3), (3, 1)))
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[1.0], [2.0]]))
            self.b.weight.copy_(torch.tensor([[0.95, 0.0], [0.05, 2.0], [0.0, 3.0]]))
            self.c.weight.fill_(1.0)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def images(labels=True):
    g = torch.Generator().manual_seed(1)
    made = [
        (torch.randn(8, 3, 8, 8, generator=g), torch.randint(4, (8,), generator=g))
        for _ in range(2)
    ]
    return made if labels else [x for x, _ in made]


def session_of(method, options, more="", model=None, **given):
    torch.manual_seed(0)
    text = f"recipe: 1\ntrain: {{epochs: 4}}\nmethods:\n  m: {{prune: {method}, {options}}}\n{more}"
    model = model or Net()
    return Session(
        model,
        loads(text, name="r.yaml"),
        torch.optim.SGD(model.parameters(), lr=0.1),
        **{
            "example": torch.randn(2, 3, 8, 8),
            "steps_per_epoch": 1,
            "calibration": images(),
            "loss_of": cross_entropy,
            **given,
        },
    )


def widths(s):
    m = s.model
    assert m.outer.weight.shape[0] == m.stem.weight.shape[0] == m.last.weight.shape[1]
    return m.stem.weight.shape[0], m.inner.weight.shape[0], m.last.weight.shape[0]


def begin(s, epochs=4):
    for epoch in range(epochs):
        s.on_epoch_begin(epoch)
