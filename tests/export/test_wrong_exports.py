"""An artifact of a slightly wrong model is caught in every runtime, and the unit is named."""

import copy
from functools import cache

import pytest
import torch
from small_nets import EMPTY, as_if_trained, export, load
from torch import nn
from torch.nn import functional as F

from gracile import Recipe, Session
from gracile.errors import ParityError
from gracile.export import parity
from gracile.nn.quantized import ActivationQuantizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
RUNTIMES = ("onnxruntime", "openvino", "ncnn", "executorch", "litert", "pytorch", "pytorch:x86")
X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three convolutions of one width behind each other, so that one can be left out."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.middle(x)))
        x = F.relu(self.last(x))
        return self.head(x.mean((2, 3)))


def compressed(model, runtime, integer):
    """(model, plan, tensors), with the quantizers where the runtime wants them."""
    if not integer:
        return model, EMPTY, {}
    recipe = Recipe.build(methods={"q": {"quantize": "ptq", "when": {"at": "end"}}})
    name = "portable" if runtime.startswith("pytorch") else runtime
    session = Session(copy.deepcopy(model), recipe, example=X, calibration=[X], profile=name)
    result = session.finish()
    return result.model, result.plan, result.tensors


def checked(model, exported, runtime, folder):
    """What parity says of the artifact of one model beside another."""
    name, _, device = runtime.partition(":")
    artifact = export(name, *exported, X, folder)
    return parity.check(model, load(artifact, device=device or "CPU"), X)


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """(runtime, integer) -> (model, plan, tensors), whose own artifact passes."""

    @cache
    def make(runtime, integer):
        made = compressed(trained(), runtime, integer)
        parity.require(checked(made[0], made, runtime, tmp_path_factory.mktemp("right")))
        return made

    return make


def trained():
    torch.manual_seed(0)
    return as_if_trained(Net())


def places(runtime):
    """Floats, integers, or both: ExecuTorch's exports take long."""
    only = {"pytorch": [False], "pytorch:x86": [True], "executorch": [True]}
    return only.get(runtime, [False, True])


@pytest.mark.parametrize(
    ("runtime", "integer"), [(r, integer) for r in RUNTIMES for integer in places(r)]
)
@pytest.mark.parametrize("fault", ["weight", "layer"])
def test_a_changed_weight_and_a_skipped_layer_are_named(runtime, integer, fault, right, tmp_path):
    model, *rest = right(runtime, integer)
    if fault == "weight":
        wrong = (copy.deepcopy(model), *rest)
        with torch.no_grad():
            wrong[0].get_submodule("middle").weight[5, 2, 1, 1] *= -1
    else:
        other = trained()
        other.middle = nn.Identity()
        wrong = compressed(other, runtime, integer)
    report = checked(model, wrong, runtime, tmp_path)
    assert report.first_bad == "relu_1"  # behind the middle layer
    if fault == "weight":
        assert "middle" in report.layers
    with pytest.raises(ParityError, match="First differing unit: 'relu_1'"):
        parity.require(report)


@pytest.mark.parametrize("runtime", [r for r in RUNTIMES if r != "pytorch"])
def test_a_changed_scale_is_named(runtime, right, tmp_path):
    model, *rest = right(runtime, True)
    wrong = (copy.deepcopy(model), *rest)
    behind = {name: m for name, m in wrong[0].named_modules() if isinstance(m, ActivationQuantizer)}
    with torch.no_grad():
        next(q for name, q in behind.items() if "relu_1" in name).scale.mul_(1.05)
    report = checked(model, wrong, runtime, tmp_path)
    assert report.first_bad == "relu_1"
    assert "middle" in report.layers
