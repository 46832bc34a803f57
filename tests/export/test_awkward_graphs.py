"""What exporters and runtimes get wrong unless the graph is written with care."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gracile
from gracile.export.constants import fold_written
from gracile.graph.capture import capture
from gracile.recipe.build import build, quantize

RUNTIMES = ("onnxruntime", "openvino")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Reordered(nn.Module):
    """OpenVINO moves a reordering of all channels into the convolution behind it, inverted."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
        self.register_buffer("order", torch.tensor([1, 2, 3, 0]))

    def forward(self, x):
        return self.b(torch.relu(self.a(x)).index_select(1, self.order))


class Scaled(nn.Module):
    """A parameter that an operator in integers reads."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.5))
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        return self.c(self.scale * self.b(self.a(x)))


class Written(nn.Module):
    """A mask that is written part by part, the same at every call."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.a(x)
        mask = x.new_zeros((8, 8))
        mask[:4] = 1
        mask[:, 6:] = 2
        return x + (mask - 1)


class ReadTwice(nn.Module):
    """A layer's weight that the forward reads, too."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(F.linear(self.up(x).relu(), self.up.weight).relu())


class Optional(nn.Module):
    """Arguments beyond the inputs, which keep their defaults."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)

    def forward(self, x, approximate="tanh", factor=2.0):
        return F.gelu(self.a(x), approximate=approximate) * factor


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("net", [Reordered, Scaled, Written, ReadTwice, Optional])
def test_artifacts_compute_what_the_model_computes(net, runtime, tmp_path):
    torch.manual_seed(0)
    model = net().eval()
    gracile.export(model, runtime, tmp_path / "f32", example=X)
    recipe = build(methods={"int8": quantize("ptq")})
    int8 = gracile.compress(model, recipe, example=X, calibration=[X])
    gracile.export(int8, runtime, tmp_path / "int8", example=X)


def test_what_is_written_becomes_a_constant():
    model = Written().eval()
    module = capture(model, X).module
    gone = fold_written(module)
    assert gone
    assert not any(
        "fill" in str(n.target) or "setitem" in str(n.target) for n in module.graph.nodes
    )
    torch.testing.assert_close(module(X), model(X))


def test_a_graph_without_writes_stays_as_it_is():
    module = capture(Scaled(), X).module
    nodes = list(module.graph.nodes)
    assert fold_written(module) == frozenset()
    assert list(module.graph.nodes) == nodes
