"""A network, its data and sessions small enough to train in milliseconds."""

import torch
from torch import nn
from torch.nn import functional as F

from gracile.recipe.load import loads
from gracile.train.session import Session

EPOCHS, STEPS, BATCH, CLASSES = 3, 4, 8, 4
FILTERS = (
    'filters: {prune: gradual, weights: "type:Conv2d", granularity: filter, '
    "sparsity: {ramp: cubic, initial: 0.1, final: 0.5}, when: {start: 0ep, stop: 2ep}}"
)
THIN = "thin: {prune: thin, when: {at: 2ep}}"
ELEMENTS = "few: {prune: oneshot, weights: head, sparsity: 0.75, when: {at: 1ep}}"
KD = "kd: {distill: kd, temperature: 2, alpha: 0.3}"
PTQ = "int8: {quantize: ptq, when: {at: end}}"


class Net(nn.Module):
    """Conv, BatchNorm, a residual branch, dropout, pooling, a head: 3 x 8 x 8 -> 4."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(12)
        self.outer = nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.drop = nn.Dropout(0.1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu(x + self.outer(self.relu(self.bn2(self.inner(x)))))
        return self.head(self.drop(self.pool(x).flatten(1)))


class Batches:
    """The same random images every epoch."""

    def __init__(self, steps=STEPS, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.items = [
            (
                torch.randn(BATCH, 3, 8, 8, generator=g),
                torch.randint(CLASSES, (BATCH,), generator=g),
            )
            for _ in range(steps)
        ]

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(self.items)

    def batches(self, epoch):
        return iter(self.items)


def net(seed=0) -> Net:
    torch.manual_seed(seed)
    return Net()


def recipe(*methods, train=f"{{epochs: {EPOCHS}}}", seed=0):
    lines = "".join(f"  {m}\n" for m in methods)
    body = f"methods:\n{lines}" if lines else ""
    return loads(f"recipe: 1\nseed: {seed}\ntrain: {train}\n{body}", name="r.yaml")


def session(*methods, model=None, optimizer=None, **train) -> Session:
    model = net() if model is None else model
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Session(
        model,
        recipe(*methods, **train),
        optimizer,
        example=torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
        steps_per_epoch=STEPS,
        calibration=[x for x, _ in Batches(2, seed=7)],
    )


def by_callbacks(s: Session, loader=None, epochs=EPOCHS):
    """The user's own loop, all six call-backs written out."""
    loader = loader or Batches()
    n = len(loader)
    for epoch in range(epochs):
        torch.manual_seed(epoch)  # dropout
        s.model.train()
        s.on_epoch_begin(epoch)
        for batch, (x, y) in enumerate(loader):
            s.on_minibatch_begin(epoch, batch, n)
            s.model.train()
            loss = s.before_backward_pass(epoch, batch, n, F.cross_entropy(s.model(x), y))
            s.optimizer.zero_grad()
            loss.backward()
            s.before_parameter_optimization(epoch, batch, n)
            s.optimizer.step()
            s.on_minibatch_end(epoch, batch, n)
        s.on_epoch_end(epoch)
    return s.finish()


def by_short_forms(s: Session, loader=None, epochs=EPOCHS):
    """The same loop with `epoch()`, `loss()` and `step()`."""
    for epoch in range(epochs):
        torch.manual_seed(epoch)
        s.model.train()
        with s.epoch():
            for x, y in loader or Batches():
                s.model.train()
                s.loss(F.cross_entropy(s.model(x), y)).backward()
                s.step()
    return s.finish()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
