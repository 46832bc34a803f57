"""Networks and sessions for regularizers, small enough to train in milliseconds."""

import torch
from torch import nn
from torch.nn import functional as F

from gracile.recipe.load import loads
from gracile.train.session import Session

EPOCHS, STEPS = 4, 3


class Chain(nn.Module):
    """Conv, BatchNorm, Conv, BatchNorm, head: 3 x 6 x 6 -> 4; channels of `a` and `b` are free."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        return self.head(torch.relu(self.norm2(self.b(x))).mean((2, 3)))


class Plain(Chain):
    """Without BatchNorm, behind which a zero filter has a gradient 300 times as large.

    Filters 2 and 5 of `a` are weak, the others strong.
    """

    def __init__(self):
        super().__init__()
        self.norm = self.norm2 = nn.Identity()
        with torch.no_grad():
            self.a.weight.mul_(3.0)[[2, 5]] *= 0.1


class Residual(Chain):
    """Both convolutions write one stream of 8 channels, each behind its BatchNorm."""

    def __init__(self):
        super().__init__()
        self.b, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        return self.head(torch.relu(x + self.norm2(self.b(x))).mean((2, 3)))


class Half(nn.Module):
    """Channels 0-3 come from `a`, 4-7 from `b` behind a BatchNorm; an addition ties them to `c`."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.c, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        both = torch.cat([self.a(x), self.norm(self.b(x))], 1)
        return self.head((both + self.c(x)).mean((2, 3)))


def recipe(*methods, epochs=EPOCHS):
    entries = "methods:\n" + "".join(f"  {m}\n" for m in methods) if methods else ""
    return loads(f"recipe: 1\ntrain: {{epochs: {epochs}}}\n{entries}", name="r.yaml")


def session(*methods, net=Chain, momentum=0.9, steps=STEPS, **options) -> Session:
    torch.manual_seed(0)
    model = net()
    return Session(
        model,
        recipe(*methods, **options),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum),
        example=torch.randn(2, 3, 6, 6),
        steps_per_epoch=steps,
    )


def train(s: Session, *epochs: int, sees=lambda s: None) -> Session:
    """Some epochs; `sees` is called after each optimizer step, before `on_minibatch_end`."""
    for epoch in epochs:
        g = torch.Generator().manual_seed(epoch)
        s.model.train()
        s.on_epoch_begin(epoch)
        for batch in range(STEPS):
            s.on_minibatch_begin(epoch, batch, STEPS)
            x = torch.randn(8, 3, 6, 6, generator=g)
            y = torch.randint(4, (8,), generator=g)
            loss = s.before_backward_pass(epoch, batch, STEPS, F.cross_entropy(s.model(x), y))
            s.optimizer.zero_grad()
            loss.backward()
            s.before_parameter_optimization(epoch, batch, STEPS)
            s.optimizer.step()
            sees(s)
            s.on_minibatch_end(epoch, batch, STEPS)
        s.on_epoch_end(epoch)
    return s


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
