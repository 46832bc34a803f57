"""Schedules of Distiller in a line or two, what they become, and what they do to small networks."""

import textwrap

import torch
from torch import nn

from gracile.recipe import loads
from gracile.recipe.distiller import Training, convert
from gracile.recipe.document import dump
from gracile.train.session import Session

SECTIONS = {
    "pruner": "pruners", "regularizer": "regularizers", "quantizer": "quantizers",
    "extension": "extensions", "lr_scheduler": "lr_schedulers",
}  # fmt: skip
TEN = "starting_epoch: 0, ending_epoch: 10, frequency: 1"


def schedule(kind, component, timing=TEN, args=""):
    """One component `c`, used by one policy."""
    inner = f"instance_name: c, args: {{{args}}}" if args else "instance_name: c"
    return (
        f"{SECTIONS[kind]}: {{c: {{{component}}}}}\npolicies: [{{{kind}: {{{inner}}}, {timing}}}]"
    )


def converted(text, *, strict=False, **training):
    """The plain recipe and the codes of the warnings; the recipe is loaded where it can be."""
    found = convert(textwrap.dedent(text), "old.yaml", Training(**training), strict=strict)
    codes = [code for code, _ in found.warnings]
    if "no-method" not in codes:
        loads(dump(found.document.data), "new.yaml")
    return found.document.data, codes


def methods(kind, component, timing=TEN, args="", *, warns=(), **more):
    """The entries one component becomes."""
    data, codes = converted(schedule(kind, component, timing, args), **more)
    assert codes == list(warns)
    return list(data["methods"].values())


class Row(nn.Module):
    """One linear layer without bias, its weights given; `fc.weight`."""

    def __init__(self, *rows):
        super().__init__()
        self.fc = nn.Linear(len(rows[0]), len(rows), bias=False)
        self.fc.weight.data = torch.tensor(rows)

    def forward(self, x):
        return self.fc(x)


class Convs(nn.Module):
    """Convolutions of given filters whose sum a last one reads: their filters go together."""

    def __init__(self, **filters):
        super().__init__()
        self.names = list(filters)
        for name, values in filters.items():
            conv = nn.Conv2d(1, len(values), 1, bias=False)
            conv.weight.data = torch.tensor(values).reshape(-1, 1, 1, 1)
            self.add_module(name, conv)
        self.last = nn.Conv2d(len(values), 2, 1, bias=False)

    def forward(self, x):
        return self.last(torch.relu(sum(getattr(self, name)(x) for name in self.names)))


def session(text, model, example, *, steps=2, lr=0.0, strict=False, **training):
    """A session of the converted schedule; the optimizer moves nothing unless `lr` is given."""
    data, _ = converted(text, strict=strict, **training)
    optimizer = torch.optim.SGD(model.parameters(), lr=max(lr, 1e-9))
    return Session(
        model, loads(dump(data)), optimizer, example=example, steps_per_epoch=steps,
        calibration=[(example, None)],
    )  # fmt: skip


def kept(s, address, id="c"):
    """The mask after each epoch's firing, without training: rows of 0 and 1."""
    out = []
    for epoch in range(s.epochs):
        s.on_epoch_begin(epoch)
        out.append(s.own_mask(id, address).flatten().int().tolist())
    return out


def step(s, x, batch, epoch=0):
    """One mini-batch with a loss that pulls on nothing; returns what the methods add to it."""
    steps = s.calendar.steps
    s.on_minibatch_begin(epoch, batch, steps)
    loss = s.before_backward_pass(epoch, batch, steps, (s.model(x) * 0).sum())
    s.optimizer.zero_grad()
    loss.backward()
    s.before_parameter_optimization(epoch, batch, steps)
    s.optimizer.step()
    s.on_minibatch_end(epoch, batch, steps)
    return float(loss.detach())
