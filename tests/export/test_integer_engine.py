"""PyTorch's integer engines against our simulation: the same integers, up to a tie."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_nets import EMPTY, ResNet, as_if_trained, export, load, quantized
from torch import nn
from torch.nn import functional as F

from gracile.benchmark.artifact import open_artifact
from gracile.benchmark.integer_engine import ENGINES
from gracile.errors import ParityError, UserError
from gracile.export import parity

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.parametrize(
    "name", [e for e in ENGINES if e in torch.backends.quantized.supported_engines]
)


class Parts(nn.Module):
    """What ResNet lacks: pooling and moving of integers, concatenation, linear layers with ReLU."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 4, 1, bias=False)
        self.down = nn.Conv2d(12, 12, 3, stride=2, groups=3)
        self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU()
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x):
        both = torch.cat([self.left(x), self.relu(self.right(x))], 1)
        y = torch.flatten(self.pool(self.down(both)), 1)
        return self.fc2(F.relu(self.fc1(y)))


PLACES = ("x", "left", "relu", "cat", "down", "pool", "flatten", "relu_1", "fc2")


def on_shared_grids(module):
    """As the profiles lay them: what only moves values has the grid of its input."""
    quantizers = dict(module._quantizers.named_children())
    for id, of in (("pool", "down"), ("flatten", "pool")):
        quantizers[id].scale.copy_(quantizers[of].scale)
        quantizers[id].zero_point.copy_(quantizers[of].zero_point)
    return module


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    torch.manual_seed(0)
    model, plan, tensors = quantized(as_if_trained(ResNet()), X)
    return model, export("pytorch", model, plan, tensors, X, tmp_path_factory.mktemp("resnet"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    torch.manual_seed(0)
    model, plan, tensors = quantized(Parts().eval(), X, at=PLACES)
    on_shared_grids(model)
    return model, export("pytorch", model, plan, tensors, X, tmp_path_factory.mktemp("parts"))


def test_a_residual_network_is_what_is_simulated(name, resnet):
    model, artifact = resnet
    loaded = load(artifact, device=name)
    report = parity.require(parity.check(model, loaded, X))
    assert report.max_lsb <= 1
    assert loaded.precision == "mixed"  # the last layer gives floats
    convolutions = [k for k in loaded.kernels() if k.is_convolution]
    assert len(convolutions) == 7
    assert all(k.is_integer for k in convolutions)
    assert [k.type for k in loaded.kernels()].count("add_relu") == 3


def test_pooling_concatenation_and_linear_layers_are_what_is_simulated(name, parts):
    model, artifact = parts
    loaded = load(artifact, device=name)
    assert parity.require(parity.check(model, loaded, X)).max_lsb <= 1
    assert loaded.precision == "int8"
    whole = [k.type for k in loaded.kernels() if k.is_integer]
    assert whole == [
        "quantize_per_tensor", "QuantizedConv2d", "QuantizedConv2d", "cat", "QuantizedConv2d",
        "MaxPool2d", "flatten", "QuantizedLinear", "QuantizedLinear",
    ]  # fmt: skip
    assert [k.type for k in loaded.kernels() if not k.is_integer] == ["dequantize"]


def test_one_layer_by_hand(name, tmp_path):
    """x = (3, 1), w = (3, 1) steps of 2/3, b = 2/3: 6 + 2/3 + 2/3 = 7.3333, to the nearest 0.25."""
    layer = nn.Sequential(nn.Linear(2, 1))
    layer[0].weight.data, layer[0].bias.data = torch.tensor([[2.0, 2 / 3]]), torch.tensor([2 / 3])
    x = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    model, plan, tensors = quantized(layer.eval(), x, weight_bits=3, at=("input", "0"))
    for place, scale, zero in (("input", 0.5, 0), ("0", 0.25, 4)):
        quantizer = model.get_submodule(f"_quantizers.{place}")
        quantizer.scale.fill_(scale)
        quantizer.zero_point.fill_(zero)
    loaded = load(export("pytorch", model, plan, tensors, x, tmp_path), device=name)
    assert loaded.run(x)[0].tolist() == [[7.25], [0.75]]


def test_layers_are_counted(name, parts):
    counters = load(parts[1], device=name).counters()
    assert counters.times(2).shape == (2, len(counters.layers))
    assert [c.units for c in counters.layers if c.type == "MaxPool2d"] == [("pool",)]


def test_weights_are_stored_as_integers_and_come_back_bit_by_bit(name, parts):
    model, artifact = parts
    weights = [k for k in model.state_dict() if k.endswith("weight")]
    stored = load_file(artifact.path)
    assert {stored[k].dtype for k in weights} == {torch.int8}
    loaded = load(open_artifact(artifact.path), module=model, device=name)
    for k, v in model.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[k], v), k


def test_a_wrong_scale_is_caught_and_the_layer_named(name, parts, tmp_path):
    model, artifact = parts
    tensors = load_file(artifact.path)
    tensors["scale of down.weight"] *= 1.1
    with safe_open(artifact.path, framework="pt") as file:
        save_file(tensors, tmp_path / "m.safetensors", metadata=file.metadata())
    wrong = load(open_artifact(tmp_path / "m.safetensors"), module=model, device=name)
    with pytest.raises(ParityError, match=r"First differing unit: 'down' \(layers down\)"):
        parity.require(parity.check(model, wrong, X))


def test_signed_tensors_and_float_networks_stay_floats(name, tmp_path):
    model, plan, tensors = quantized(as_if_trained(ResNet()), X, signed=True)
    loaded = load(export("pytorch", model, plan, tensors, X, tmp_path / "a"), device=name)
    assert loaded.precision == "f32"
    assert parity.require(parity.check(model, loaded, X)).max_lsb < 0.1
    plain = as_if_trained(ResNet())
    loaded = load(export("pytorch", plain, EMPTY, {}, X, tmp_path / "b"), device=name)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(loaded.run(X)[0]), plain(X), atol=1e-4, rtol=1e-4)


def test_an_engine_that_is_not_there_is_refused(name, resnet, monkeypatch):
    monkeypatch.setattr(
        type(torch.backends.quantized), "supported_engines", ["none"], raising=False
    )
    with pytest.raises(UserError, match=f"no engine '{name}'; it has none"):
        load(resnet[1], device=name)


def test_the_process_keeps_its_engine(name, resnet):
    before = torch.backends.quantized.engine
    load(resnet[1], device=name).run(X)
    assert torch.backends.quantized.engine == before
