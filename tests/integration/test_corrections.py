"""Corrections of post-training quantization survive export, saving and loading."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gracile
from gracile.recipe.load import loads
from gracile.train.session import Session

X = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
METHODS = """recipe: 1
methods:
  even: {recover: equalize}
  int8: {quantize: ptq, weight_bits: 4, half_range: true}
  keep: {recover: accuracy, max_drop: 6}
  bias: {recover: bias, mode: full}
"""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.point(F.relu(self.deep(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(1)
    model = Net()
    with torch.no_grad():
        for _ in range(20):
            model(X)
        model.eval()
        y = (model(X) - model(X).mean(0)).argmax(1)
        model.head.bias.sub_(model(X).mean(0))
    s = Session(
        model, loads(METHODS, name="r.yaml"), example=X[:4], calibration=[X], val=lambda: [(X, y)]
    )
    return s.finish()


def test_some_operators_were_reverted_and_others_not(result):
    weights = {e.at for e in result.plan.of_kind("bits") if e.role == "weight"}
    assert 0 < len(weights) < 4


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_exported_network_computes_the_same(result, runtime, tmp_path):
    pytest.importorskip(runtime)
    gracile.export(result, runtime, tmp_path, example=X[:4], inputs=X)  # proves it


def test_what_is_saved_is_loaded(result, tmp_path):
    from gracile.train.checkpoint import load_model

    gracile.save_model(tmp_path, result)
    again = load_model(tmp_path, X[:4], factory=lambda: type("Spec", (), {"model": Net()})())
    with torch.no_grad():
        assert torch.equal(again.model(X), result.model(X))
