"""A small network, its data and sessions for tests of distillation."""

import torch
from torch import nn
from torch.nn import functional as F

from gracile.recipe.load import loads
from gracile.train.session import Session

STEPS, BATCH = 2, 6


class Net(nn.Module):
    """Stem, a residual block of its own module, pooling, a head: 3 x 8 x 8 -> 4."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.block = Block(width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.pool(self.block(self.stem(x))).flatten(1))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Conv2d(width, width + 2, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width + 2)
        self.act = nn.ReLU()
        self.outer = nn.Conv2d(width + 2, width, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.outer(self.act(self.bn(self.inner(x)))))


def data(epoch):
    g = torch.Generator().manual_seed(epoch)
    return [
        (torch.randn(BATCH, 3, 8, 8, generator=g), torch.randint(0, 4, (BATCH,), generator=g))
        for _ in range(STEPS)
    ]


def recipe(*methods, epochs=3, train=""):
    lines = "".join(f"  {m}\n" for m in methods)
    return loads(f"recipe: 1\ntrain: {{epochs: {epochs}{train}}}\nmethods:\n{lines}", name="r.yaml")


def session(*methods, epochs=3, lr=0.05, train="", seed=0, width=6, **options) -> Session:
    torch.manual_seed(seed)
    model = Net(width)
    return Session(
        model,
        recipe(*methods, epochs=epochs, train=train),
        torch.optim.SGD(model.parameters(), lr=lr),
        example=data(99)[0][0][:2],
        steps_per_epoch=STEPS,
        calibration=data(77),
        loss_of=F.cross_entropy,
        val=lambda: data(55),
        **options,
    )


def step(s: Session, epoch, batch, x, y, *, train=True, **known):
    """One mini-batch; returns the task's loss and the whole one."""
    s.on_minibatch_begin(epoch, batch, STEPS)
    s.model.train(train)
    hard = F.cross_entropy(s.model(x), y)
    total = s.before_backward_pass(epoch, batch, STEPS, hard, **known)
    s.optimizer.zero_grad()
    total.backward()
    s.before_parameter_optimization(epoch, batch, STEPS)
    s.optimizer.step()
    s.on_minibatch_end(epoch, batch, STEPS)
    return hard.detach(), total.detach()


def train_epoch(s: Session, epoch):
    s.on_epoch_begin(epoch)
    for batch, (x, y) in enumerate(data(epoch)):
        step(s, epoch, batch, x, y, labels=y)
    s.on_epoch_end(epoch)


def trained(s: Session):
    for epoch in range(s.epochs):
        train_epoch(s, epoch)
    return s
