"""Four bits on real digits: accuracy is kept, and the runtimes compute what was trained."""

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile import registry
from gracile.benchmark.runtimes.base import load
from gracile.export import parity
from gracile.recipe.load import loads
from gracile.train.session import Session

BATCH, STEPS = 100, 14
TRAINED = BATCH * STEPS
METHODS = {
    "lsq": "lsq, bits: 4",
    "learned": "learned, bits: 4, weight_symmetric: true",
    "pact": "pact, bits: 4, clip_init: observed",
    "dorefa": "dorefa, bits: 4",
    "wrpn": "wrpn, bits: 4, weight_clip: 0.3, clip: 4",
    "edges": "lsq, bits: 2, edges_bits: 8, half_range: true",
}


class Net(nn.Module):
    """Three convolutions with a residual branch, 1 x 8 x 8 -> 10."""

    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.nb = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.c, self.nc = nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.na(self.a(x)))
        x = F.relu(x + self.nb(self.b(x)))
        return self.head(self.pool(F.relu(self.nc(self.c(x)))).flatten(1))


@cache
def digits():
    found = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images / 16, dtype=torch.float32)[order, None]
    return images, torch.tensor(found.target)[order]


def train(model, methods, epochs, lr):
    """The Result after a training on 1400 digits."""
    x, y = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    recipe = loads(f"recipe: 1\ntrain: {{epochs: {epochs}}}\nmethods: {methods}\n", name="r")
    s = Session(
        model, recipe, optimizer, example=x[:4], steps_per_epoch=STEPS, calibration=[x[:200]]
    )
    for epoch in range(epochs):
        order = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(epoch))
        s.model.train()
        with s.epoch():
            for at in order.split(BATCH):
                s.model.train()
                s.loss(F.cross_entropy(s.model(x[at]), y[at])).backward()
                s.step()
    return s.finish()


def accuracy(model):
    x, y = digits()
    with torch.no_grad():
        return (model(x[TRAINED:]).argmax(1) == y[TRAINED:]).float().mean().item()


@cache
def trained():
    torch.manual_seed(0)
    return train(Net(), "{}", 6, 0.1).model


@cache
def quantized(name):
    model = copy.deepcopy(trained())
    return train(model, f"{{m: {{quantize: {METHODS[name]}, when: {{start: 0ep}}}}}}", 4, 0.05)


@pytest.mark.parametrize("name", METHODS)
def test_four_bits_keep_the_accuracy_of_digits(name):
    assert accuracy(trained()) > 0.93
    assert accuracy(quantized(name).model) > 0.9


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", METHODS)
def test_the_runtimes_compute_what_was_trained(name, runtime, tmp_path):
    """Grids of fewer than 8 bits use part of 8-bit integers, clipped before they are rounded."""
    result, x = quantized(name), digits()[0][TRAINED:][:64]
    exporter = registry.get("exporter", runtime).obj
    artifact = exporter(
        result.model, result.plan, result.tensors, example=x, path=tmp_path, metadata={}
    )
    assert artifact.precision == "int8"
    loaded = load(artifact)
    report = parity.check(result.model, loaded, x)
    assert report.first_bad is None  # every unit alone is right
    assert report.max_lsb <= 1
    parity.require(report, result.plan)
    # Nothing is off but ties: means of a few integers, and 8-bit sums with their integer biases.
    off = {u.id for u in report.units if u.lsb}
    assert off <= ({"relu", "pool", "flatten"} if name == "edges" else {"pool", "flatten"})


class Block(Net):
    """The branch has two convolutions, so that OpenVINO adds in the second's accumulator."""

    def forward(self, x):
        x = F.relu(self.na(self.a(x)))
        y = self.nb(self.b(F.relu(self.nb(self.b(x)))))
        return self.head(self.pool(F.relu(self.nc(self.c(F.relu(y + x))))).flatten(1))


@pytest.mark.parametrize("profile", ["openvino", "portable"])
def test_openvino_adds_to_unrounded_sums_and_its_profile_knows(profile, tmp_path):
    torch.manual_seed(0)
    model = train(Block(), "{}", 2, 0.1).model
    method = f"{{m: {{quantize: lsq, bits: 3, profile: {profile}, when: {{start: 0ep}}}}}}"
    result, x = train(model, method, 2, 0.02), digits()[0][TRAINED:][:64]
    exporter = registry.get("exporter", "openvino").obj
    artifact = exporter(
        result.model, result.plan, result.tensors, example=x, path=tmp_path, metadata={}
    )
    report = parity.check(result.model, load(artifact), x)
    assert report.first_bad is None
    if profile == "openvino":
        assert report.cosine > 0.999
    else:
        assert report.cosine < 0.99  # here a quantizer stood, whose rounding OpenVINO drops
