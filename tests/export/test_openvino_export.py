"""OpenVINO IR: same integers, same names, floats kept as f32, everything in integer kernels."""

import pytest
import torch
from small_nets import EMPTY, ResNet, as_if_trained, export, load, quantized
from torch import nn

from gracile.benchmark.artifact import open_artifact
from gracile.export import parity

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    module, plan, tensors = quantized(as_if_trained(ResNet()), X)
    folder = tmp_path_factory.mktemp("ir")
    return module, export("openvino", module, plan, tensors, X, folder)


def test_both_files_are_there_and_say_what_they_are(whole):
    _, artifact = whole
    assert sorted(p.name for p in artifact.path.parent.iterdir()) == ["model.bin", "model.xml"]
    assert open_artifact(artifact.path) == artifact
    assert (artifact.precision, artifact.units[-1].id) == ("int8", "fc")


def test_it_runs_in_integers_throughout(whole):
    kernels = [k for k in load(whole[1]).kernels() if k.unit]
    convs = [k for k in kernels if k.is_convolution]
    assert len(convs) == 7
    assert all(k.is_integer for k in convs)
    floats = [k for k in kernels if not k.is_integer]
    assert [k.unit for k in floats] == ["x.quantize"]  # the step from floats to integers


def test_floats_are_not_made_smaller(tmp_path):
    model = as_if_trained(ResNet())
    artifact = export("openvino", model, EMPTY, {}, X, tmp_path / "dense.xml")
    assert artifact.size_bytes > 4 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(load(artifact).run(X)[0]), model(X), rtol=1e-4, atol=1e-5
        )


class Attention(nn.Module):
    """One attention block: OpenVINO makes one operator of it, and folds a division away."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1)
        return self.head(torch.nn.functional.gelu(x + self.out(scores @ v)).mean(1))


@pytest.mark.parametrize("integer", [False, True])
def test_attention_keeps_parity(integer, tmp_path):
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(4, 5, 8)
    args = quantized(model, x) if integer else (model, EMPTY, {})
    artifact = export("openvino", *args, x, tmp_path)
    parity.require(parity.check(args[0], load(artifact), x))
    if not integer:
        assert not {"matmul", "softmax"} & {u.id for u in artifact.units}


def test_the_same_model_gives_the_same_file_whatever_was_converted_before(tmp_path):
    from torch import nn

    from gracile.core.plan import Architecture, Plan
    from gracile.export.openvino import export_openvino

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    plan = Plan(architecture=Architecture(name="net"))
    example = torch.zeros(2, 3, 8, 8)
    a, b = (export_openvino(model, plan, {}, example, tmp_path / n, {}) for n in ("a", "b"))
    assert a.sha == b.sha
