"""Folded networks compute the same, exactly where folding is right and nowhere else."""

import copy

import pytest
import torch
from torch import nn

from gracile.graph.capture import capture
from gracile.graph.fold import fold_batchnorm


def ready(model, seed=0):
    """BatchNorms with statistics; one gamma negative, one 0."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.normal_(0, 1, generator=g)
            m.running_var.uniform_(0.1, 3, generator=g)
            if m.affine:
                m.weight.data.normal_(0, 1, generator=g)
                m.weight.data[0], m.weight.data[1] = -1.5, 0.0
                m.bias.data.normal_(0, 1, generator=g)
    return model.eval()


def fold(model, x):
    return fold_batchnorm(capture(model, x).module)


def norms(module):
    return [n for n in module.graph.nodes if n.op == "call_module" and "bn" in str(n.target)]


class Pair(nn.Module):
    def __init__(self, layer, bn):
        super().__init__()
        self.layer, self.bn = layer, bn

    def forward(self, x):
        return torch.relu(self.bn(self.layer(x)))


PAIRS = {
    "conv1d": (nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4), (2, 3, 8)),
    "conv2d": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), (2, 3, 8, 8)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 8, 8)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), (2, 4, 8, 8)),
    "conv3d": (nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), (2, 3, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4), (2, 3, 4, 4)),
    "transposed in groups": (
        nn.ConvTranspose2d(4, 6, 2, 2, groups=2, bias=False),
        nn.BatchNorm2d(6),
        (2, 4, 4, 4),
    ),
    "linear": (nn.Linear(5, 4), nn.BatchNorm1d(4), (3, 5)),
    "no affine": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), (2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_computes_the_same_without_the_norm(name):
    layer, bn, shape = copy.deepcopy(PAIRS[name])
    model, x = ready(Pair(layer, bn)), torch.randn(shape)
    result = fold(model, x)
    assert not norms(result.module)
    torch.testing.assert_close(result.module(x), model(x), rtol=1e-5, atol=1e-5)


def test_factors_are_gamma_over_sigma_with_sign():
    model = ready(Pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    result = fold(model, torch.randn(2, 3, 8, 8))
    bn = model.bn
    want = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
    torch.testing.assert_close(result.scaled["layer.weight"], want.detach())
    assert result.scaled["layer.weight"][0] < 0
    assert result.merged == {"bn": "layer"}


def test_the_model_is_untouched():
    model = ready(Pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).train()
    before = copy.deepcopy(model.state_dict())
    fold(model, torch.randn(2, 3, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training


class ReadTwice(Pair):
    def forward(self, x):
        y = self.layer(x)
        return self.bn(y) + y


class CalledTwice(Pair):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.bn2 = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn2(self.layer(self.bn(self.layer(x))))


class Tied(Pair):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.other = nn.Conv2d(3, 3, 1)
        self.other.weight = self.layer.weight

    def forward(self, x):
        return self.bn(self.layer(x)) + self.other(x)


class WeightRead(Pair):
    def forward(self, x):
        return self.bn(self.layer(x)) * self.layer.weight.sum()


@pytest.mark.parametrize(
    "model",
    [
        ReadTwice(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
        CalledTwice(),
        Tied(),
        WeightRead(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
        Pair(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
    ],
    ids=["read twice", "called twice", "tied weight", "weight read alone", "no statistics"],
)
def test_stays_where_folding_would_change_something_else(model):
    ready(model)
    x = torch.randn(2, 3, 4, 4)
    result = fold(model, x)
    assert result.scaled == {}
    torch.testing.assert_close(result.module(x), model(x))
