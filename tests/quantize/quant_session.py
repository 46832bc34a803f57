"""A small stand-in for the Session, with what quantizing methods see, and a net to quantize."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from gracile.core.address import select
from gracile.core.overlay import Overlays
from gracile.core.plan import Architecture, Plan
from gracile.core.schedule import Calendar, timetable
from gracile.core.state import derive_seed
from gracile.graph.capture import capture
from gracile.graph.dependency import channel_groups
from gracile.graph.instrument import instrument
from gracile.graph.surgery import remove_edits, verified_apply
from gracile.quantize.profile import Grid, Profile

PROFILE = Profile(
    name="test",
    activations=Grid(signed=False, symmetric=False),
    weights=Grid(signed=True, symmetric=True, axis=0, narrow=True),
    quantize_inputs=True,
    quantize_outputs=False,
    ops_integer=("conv", "linear", "add", "avg_pool", "adaptive_avg_pool", "mean"),
    ops_same_scale=("max_pool", "flatten", "reshape", "permute", "getitem", "cat"),
)


class Net(nn.Module):
    """conv-bn-relu, a residual branch, max pool, average pool, linear: 3 x 8 x 8 -> 5."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.pool = nn.MaxPool2d(2)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(torch.flatten(self.mean(self.pool(x)), 1))


def net(seed=0):
    """A Net whose batch norms have seen data, in eval mode."""
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for k in range(20):
            model(batch(k))
    return model.eval()


def batch(seed=0, n=8):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def labelled(seed):
    """A batch whose brightness tells the label."""
    labels = torch.arange(8) % 5
    return batch(seed) + labels[:, None, None, None] / 2 - 1, labels


class FakeSession:
    def __init__(self, model, *, epochs=3, steps=4, calibration=None):
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.recipe = SimpleNamespace(train=SimpleNamespace(autocast="none"), seed=0)
        self.inputs, self.methods = (), []
        self.example = batch(99, 2)
        self.device = torch.device("cpu")
        self.profile = "portable"
        self.calendar = Calendar(epochs, steps)
        self.epochs, self.steps = epochs, steps
        self.epoch_number = self.batch = 0
        self.overlays = Overlays(model)
        self.batches = [batch(k) for k in range(3)] if calibration is None else calibration
        self.warnings, self.notes = [], []
        self._graph = None

    @property
    def now(self):
        return self.epoch_number * self.steps + self.batch

    @property
    def graph(self):
        if self._graph is None:
            self._graph = capture(self.model, self.example)
        return self._graph

    def tensors(self, selector):
        types = {
            path: [c.__name__ for c in type(m).__mro__] for path, m in self.model.named_modules()
        }
        return select(selector, [n for n, _ in self.model.named_parameters()], types)

    def parameter(self, address):
        return self.model.get_parameter(address)

    def instrument(self, after):
        training = self.model.training
        self.model = instrument(self.graph, after).train(training)
        self.overlays = Overlays(self.model, self.overlays.pause())
        self._graph = None

    def cut(self, gone, method, optimizer):
        """Verified removal of channels in mid-training; `gone`: group id -> unit numbers."""
        layers = self.overlays.pause()
        edits = remove_edits(channel_groups(self.model, self.graph), gone, "thin")
        verified_apply(self.model, edits, examples=[self.example], optimizer=optimizer)
        self.overlays = Overlays(self.model, layers)
        self._graph = None
        method.on_surgery(self, edits)

    def calibrate(self, method):
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for x in self.batches:
                self.model(x)
                method.on_calibrate(self)
        self.model.train(training)

    def generator(self, *purpose):
        return torch.Generator().manual_seed(derive_seed(self.recipe.seed, *purpose))

    def warn(self, code, text):
        self.warnings.append((code, text))

    def note(self, *line):
        self.notes.append(line)

    def finish(self, *methods):
        """What Session.finish does with quantizers: edits, tensors, weights put on their grid."""
        edits = [e for m in methods for e in m.on_detach(self)]
        plan = Plan(architecture=Architecture(name="Net")).extended(edits)
        tensors = {k: v.clone() for m in methods for k, v in m.tensors().items()}
        with torch.no_grad():
            values = {a: self.overlays.effective(a) for a in self.overlays.addresses()}
            for address, value in values.items():
                self.parameter(address).copy_(value)
        self.overlays.detach()
        return self.model.eval(), plan, tensors


def run(session, method, optimizer, epochs, *, first=0):
    """Train on labelled noise from epoch `first`; returns the loss of every step."""
    table = timetable(method.options.timing, session.calendar)
    losses = []
    for epoch in range(first, epochs):
        session.epoch_number = epoch
        session.model.train()
        for k in range(session.steps):
            session.batch = k
            if table.index((epoch, k)) is not None:
                method.on_fire(session, 1.0)
            if k == 0:
                method.on_epoch_start(session)
            method.on_batch_start(session)
            x, y = labelled(100 + epoch * session.steps + k)
            loss = F.cross_entropy(session.model(x), y)
            optimizer.zero_grad()
            loss.backward()
            method.on_before_step(session)
            optimizer.step()
            method.on_batch_end(session)
            losses.append(loss.item())
        method.on_epoch_end(session)
    return losses
