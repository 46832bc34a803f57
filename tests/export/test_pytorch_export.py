"""PyTorch as a target: weights in safetensors, the module given back when it is loaded."""

import pytest
import torch
from small_nets import EMPTY, ResNet, as_if_trained, export, load, quantized
from torch import nn

from gracile.benchmark.artifact import open_artifact
from gracile.benchmark.throughput import count
from gracile.errors import UserError
from gracile.export import parity

X = torch.randn(3, 3, 8, 8)


@pytest.fixture
def artifact(tmp_path):
    return export("pytorch", as_if_trained(ResNet()), EMPTY, {}, X, tmp_path)


def test_runs_what_the_file_holds_not_what_the_module_holds(artifact):
    loaded = load(open_artifact(artifact.path), module=ResNet())  # other weights
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(loaded.run(X)[0]), artifact.module(X))


def test_the_facts_are_in_the_file(artifact):
    again = open_artifact(artifact.path)
    assert again == artifact
    assert again.inputs == (("x", (1, 3, 8, 8)),)


def test_needs_the_module(artifact):
    with pytest.raises(UserError, match="holds weights only"):
        load(open_artifact(artifact.path))


def test_another_architecture_is_refused(artifact):
    with pytest.raises(UserError, match="does not fit Sequential"):
        load(artifact, module=nn.Sequential(nn.Linear(2, 2)))


def test_a_quantized_model_is_simulated(tmp_path):
    module, plan, tensors = quantized(as_if_trained(ResNet()), X)
    artifact = export("pytorch", module, plan, tensors, X, tmp_path)
    report = parity.require(parity.check(module, load(artifact), X))
    assert report.max_lsb == 0.0
    assert artifact.precision == "f32"


def test_kernels_times_and_threads(artifact):
    loaded = load(artifact, threads=2)
    before = torch.get_num_threads()
    assert len(loaded.time(3, batch=2)) == 3
    assert torch.get_num_threads() == before
    kernels = loaded.kernels()
    assert [k.type for k in kernels if k.unit == "relu"] == ["conv", "batch_norm", "relu"]
    assert {k.precision for k in kernels} == {"f32"}


def test_every_call_is_timed_and_streams_share_the_module(artifact):
    counters = load(artifact).counters(batch=2)
    conv = next(layer for layer in counters.layers if layer.type == "conv")
    assert conv.units == ("relu",)
    times = counters.times(2)
    assert times.shape == (2, len(counters.layers))
    assert (times > 0).all()
    loaded = load(artifact)
    assert count(loaded.streams(2), 0.0)[0] == 2


class Wide(nn.Module):
    """Two linear layers, the first large enough for CSR."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(1024, 1024), nn.Linear(1024, 4)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    torch.manual_seed(0)
    model = Wide().eval()
    model.fc1.weight.data *= torch.rand(1024, 1024) >= 0.95
    x = torch.randn(2, 1024)
    return export("pytorch", model, EMPTY, {}, x, tmp_path_factory.mktemp("sparse"))


def test_sparse_multiplies_as_csr_what_the_table_says(sparse):
    loaded = load(sparse, device="sparse")
    assert loaded.device == "pytorch:sparse"
    assert [type(m).__name__ for m in loaded._called.children()] == ["CsrLinear", "Linear"]
    x = torch.randn(32, 1024)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(loaded.run(x)[0]), sparse.module(x))
    assert list(loaded.run_units(x))
    with pytest.raises(UserError, match="no counters of time"):
        loaded.counters()


def test_sparse_without_zeros_says_that_it_is_eager(artifact):
    with pytest.warns(UserWarning, match="no linear layer has so many zeros"):
        load(artifact, device="sparse")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch, of itself
def test_a_compiled_network_computes_the_same(artifact):
    loaded = load(artifact, device="compile")
    with torch.no_grad():
        expected = artifact.module(X)
    torch.testing.assert_close(torch.tensor(loaded.run(X)[0]), expected, atol=1e-4, rtol=1e-4)
    assert [k.type for k in loaded.kernels()] == ["compiled program"]
    assert parity.require(parity.check(artifact.module, loaded, X)).max_abs < 1e-4
