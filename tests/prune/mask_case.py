"""A small network under one pruning method: trained for a few steps, stopped, stored, resumed."""

import pytest
import torch
from torch import nn

from gracile.errors import GracileError
from gracile.recipe.load import loads
from gracile.train.checkpoint import load_state, save_state
from gracile.train.session import Session

EPOCHS, STEPS = 3, 4


class Net(nn.Module):
    """Conv, BatchNorm, conv, a head: 4 x 4 x 4 -> 3."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.inner(torch.relu(self.bn(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class Row(nn.Module):
    """One linear layer without bias, its weights given."""

    def __init__(self, *rows):
        super().__init__()
        self.fc = nn.Linear(len(rows[0]), len(rows), bias=False)
        self.fc.weight.data = torch.tensor(rows)

    def forward(self, x):
        return self.fc(x)


def data(epoch):
    g = torch.Generator().manual_seed(epoch)
    return [
        (torch.randn(6, 4, 4, 4, generator=g), torch.randint(3, (6,), generator=g))
        for _ in range(STEPS)
    ]


def session(options, model=None, *, epochs=EPOCHS, steps=STEPS, before="", train="", lr=0.1):
    """A session of `Net` (or a `Row`) with one method `m: {prune: <options>}`."""
    torch.manual_seed(0)
    model = Net() if model is None else model
    methods = f"{before}  m: {{prune: {options}}}\n"
    text = f"recipe: 1\ntrain: {{epochs: {epochs}{train}}}\nmethods:\n{methods}"
    x = torch.ones(2, model.fc.in_features) if isinstance(model, Row) else data(99)[0][0]
    return Session(
        model,
        loads(text, name="r.yaml"),
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3),
        example=x,
        steps_per_epoch=steps,
        calibration=[(x, torch.zeros(len(x), dtype=torch.long))],
        loss_of=nn.functional.cross_entropy,
    )


def train_epoch(s, epoch, each=lambda s: None):
    """One epoch of steps; `each` is called in every one, after its forward."""
    s.on_epoch_begin(epoch)
    for batch, (x, y) in enumerate(data(epoch)):
        s.on_minibatch_begin(epoch, batch, STEPS)
        s.model.train()
        loss = nn.functional.cross_entropy(s.model(x), y)
        each(s)
        loss = s.before_backward_pass(epoch, batch, STEPS, loss)
        s.optimizer.zero_grad()
        loss.backward()
        s.before_parameter_optimization(epoch, batch, STEPS)
        s.optimizer.step()
        s.on_minibatch_end(epoch, batch, STEPS)
    s.on_epoch_end(epoch)


def finished(s):
    for epoch in range(EPOCHS):
        train_epoch(s, epoch)
    return s.finish()


def masks(s, address="fc.weight", epochs=EPOCHS):
    """The mask after each epoch's firing, without training; rows of 0 and 1."""
    out = []
    for epoch in range(epochs):
        s.on_epoch_begin(epoch)
        out.append(s.own_mask("m", address).int().tolist())
    return out


def check_resume(options, tmp_path, make=Net, **more):
    """Stopped after any epoch, stored and resumed in a fresh session: the same in every bit."""

    def fresh():
        torch.manual_seed(0)
        return session(options, make(), **more)

    whole = finished(fresh())
    for stop in range(1, EPOCHS):
        first = fresh()
        for epoch in range(stop):
            train_epoch(first, epoch)
        save_state(tmp_path / "s", first.state_dict())
        second = fresh()
        second.load_state_dict(load_state(tmp_path / "s"))
        for epoch in range(stop, EPOCHS):
            train_epoch(second, epoch)
        resumed = second.finish()
        assert resumed.plan == whole.plan
        assert resumed.history == whole.history
        for name, value in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], value), (stop, name)
    return whole


def refused(options, match, **more):
    """The recipe is refused with one message that begins with its place."""
    with pytest.raises(GracileError, match=rf"^r\.yaml:\d+: .*{match}") as error:
        session(options, **more)
    assert "\n" not in str(error.value)
