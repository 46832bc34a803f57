"""ExecuTorch: lowered to XNNPACK, in integers where grids are, and what is left is told."""

import numpy as np
import pytest
import torch
from small_nets import EMPTY, as_if_trained, export, load, quantized
from torch import nn
from torch.nn import functional as F

from gracile.benchmark.artifact import FACTS_END, open_artifact, units_path, with_facts
from gracile.core.plan import Bits
from gracile.errors import UserError
from gracile.export import parity
from gracile.export.executorch import OnGrid
from gracile.export.prepare import ActivationGrid
from gracile.quantize.profile import load_profile

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
quiet = pytest.mark.filterwarnings("ignore")  # its own deprecations, as it is imported


class Net(nn.Module):
    """A convolution, a depthwise one with a shortcut, a mean, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(self.depth(x) + x)
        return self.fc(torch.flatten(self.pool(x), 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Precision -> (model, artifact)."""
    torch.manual_seed(0)
    model = as_if_trained(Net())
    at = ["x", "relu", "depth", "relu_1", "pool", "flatten", "fc"]
    integer = quantized(model, X, at=at, signed=True, weight_bits=8)
    out = {}
    for precision, args in {"f32": (model, EMPTY, {}), "int8": integer}.items():
        folder = tmp_path_factory.mktemp(precision)
        out[precision] = args[0], export("executorch", *args, X, folder)
    return out


@quiet
@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_a_right_artifact_passes_unit_by_unit(made, precision):
    model, artifact = made[precision]
    report = parity.require(parity.check(model, load(artifact), X))
    assert [u.id for u in report.units] == [u.id for u in artifact.units]
    assert report.cosine > (0.9999999 if precision == "f32" else 0.999)
    assert (open_artifact(artifact.path), artifact.precision) == (artifact, precision)


@quiet
def test_xnnpack_computes_in_integers(made):
    weighty = [k for k in load(made["int8"][1]).kernels() if k.is_convolution or k.unit == "fc"]
    assert [(k.is_integer, k.type.startswith("XNNPACK")) for k in weighty] == [(True, True)] * 3


@quiet
def test_units_fed_with_their_own_results_are_the_network(made):
    loaded = load(made["f32"][1])
    np.testing.assert_allclose(loaded.run_units(X)["fc"], loaded.run(X)[0], rtol=1e-5)


@quiet
def test_a_wrong_model_is_found_and_its_first_layer_named(made):
    _, artifact = made["f32"]
    report = parity.check(as_if_trained(Net(), seed=1), load(artifact), X)
    assert (report.ok, report.first_bad, report.layers) == (False, "relu", ("conv", "bn"))


@quiet
def test_threads_and_hints_that_cannot_be_are_refused(made):
    artifact = made["f32"][1]
    loaded = load(artifact)
    assert len(loaded.time(3, batch=2)) == 3
    with pytest.raises(UserError, match=r"with 1 threads, .* in a process of its own"):
        load(artifact, threads=2)
    with pytest.raises(UserError, match="hint 'bf16' is not there"):
        load(artifact, hint="bf16")


@quiet
def test_without_the_second_program_units_are_refused(made, tmp_path):
    _, artifact = made["f32"]
    (tmp_path / "m.pte").write_bytes(artifact.path.read_bytes())
    with pytest.raises(UserError, match=r"m\.units shows .* export again"):
        load(open_artifact(tmp_path / "m.pte")).run_units(X)


def test_what_xnnpack_does_not_take_is_warned_of(tmp_path):
    class Cumulated(nn.Module):
        def forward(self, x):
            return torch.cumsum(torch.relu(x), 1)

    with pytest.warns(UserWarning, match=r"XNNPACK does not take .*cumsum.* portable kernels"):
        artifact = export("executorch", Cumulated(), EMPTY, {}, X, tmp_path)
    assert sum(artifact.metadata["left_portable"].values()) == 1


def grid(bits, signed, zero_point, narrow=False):
    edges = Bits(at="a", role="output", bits=bits, signed=signed, symmetric=False, key="a",
                 narrow=narrow)  # fmt: skip
    return ActivationGrid(0.5, zero_point, bits, signed, edges.qmin, edges.qmax)


def test_a_grid_without_a_sign_is_written_128_lower():
    end = OnGrid("a", grid(8, False, 10))
    assert (end.args[:4], end.cut) == ((0.5, -118, -128, 127), False)


def test_activations_of_few_bits_are_refused(tmp_path):
    integer = quantized(
        as_if_trained(Net()), X, at=["x", "relu"], bits=4, signed=True, weight_bits=8
    )
    with pytest.raises(UserError, match=r"'x.*' has 4 bits, and ExecuTorch takes .* 8 only"):
        export("executorch", *integer, X, tmp_path)


def test_few_bits_keep_their_ends():
    x = torch.tensor([-9.0, -1.0, 0.3, 2.9, 9.0])
    assert OnGrid("a", grid(4, True, 0))(x).tolist() == [-4.0, -1.0, 0.5, 3.0, 3.5]
    assert OnGrid("a", grid(4, False, 2))(x).tolist() == [-1.0, -1.0, 0.5, 3.0, 6.5]


def test_facts_behind_a_program(tmp_path):
    path = tmp_path / "m.pte"
    path.write_bytes(with_facts(b"\x00\x00\x00\x00ET12program", {"gracile.precision": "int8"}))
    assert open_artifact(path).precision == "int8"
    path.write_bytes(b"\x00\x00\x00\x00ET12program")
    assert (open_artifact(path).precision, open_artifact(path).units) == ("f32", ())
    for damaged in (b"[]", b"{"):
        end = len(damaged).to_bytes(8, "little") + FACTS_END
        path.write_bytes(b"\x00\x00\x00\x00ET12program" + damaged + end)
        with pytest.raises(UserError, match="facts behind the program are damaged"):
            open_artifact(path)
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="not an ExecuTorch program"):
        open_artifact(path)
    assert units_path(path).name == "m.units"


def test_its_profile_is_that_of_xnnpack():
    assert load_profile("executorch") == load_profile("xnnpack")
