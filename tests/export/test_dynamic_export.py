"""Layers with ranges found at run time: the file's operators, fused kernels, parity."""

from collections import Counter

import onnx
import pytest
import torch
from small_nets import export, load
from torch import nn
from torch.nn import functional as F

from gracile.benchmark.processor import sums_saturate
from gracile.export import parity
from gracile.recipe.load import loads
from gracile.train.session import Session

X = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(3))
RUNTIMES = ("onnxruntime", "openvino")


class Mlp(nn.Module):
    """A folded BatchNorm, one input for two layers, one layer called twice, no bias in the head."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(16, 12), nn.BatchNorm1d(12)
        self.left, self.right = nn.Linear(12, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x.flatten(1)[:, :16])))
        x = self.left(x) * torch.sigmoid(self.right(x)) + x
        return self.head(self.left(x))


class Sequence(nn.Module):
    """Inputs of rank 3, and a weight without a layer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.last = nn.Parameter(torch.randn(4, 16) / 4)

    def forward(self, x):
        x = x + self.down(F.gelu(self.up(x)))
        return F.linear(x, self.last)


def dynamic(model, x=X, recipe="q: {quantize: dynamic}"):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d):
            nn.init.uniform_(m.running_mean, -1, 1)
            nn.init.uniform_(m.running_var, 0.5, 2)
    recipe = loads(f"recipe: 1\nmethods:\n  {recipe}\n", name="r.yaml")
    return Session(model.eval(), recipe, None, example=x).finish()


@pytest.fixture(params=[Mlp, Sequence])
def result(request):
    torch.manual_seed(1)
    return dynamic(request.param())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_unit_is_what_pytorch_computes(result, runtime, tmp_path):
    artifact = export(runtime, result.model, result.plan, result.tensors, X, tmp_path)
    assert artifact.precision == "int8"
    report = parity.require(parity.check(result.model, load(artifact), X), result.plan)
    # The same integers, scaled and added in another order: far below one of 255 levels.
    assert max(u.relative for u in report.units) < 1e-4


@pytest.mark.parametrize("batch", [1, 3])
def test_the_range_is_that_of_the_batch(result, batch, tmp_path):
    artifact = export("onnxruntime", result.model, result.plan, result.tensors, X, tmp_path)
    (got,) = load(artifact).run(X[:batch])
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(got), result.model(X[:batch]), rtol=1e-4, atol=1e-4)


def test_onnx_runtime_fuses_every_layer(result, tmp_path):
    artifact = export("onnxruntime", result.model, result.plan, result.tensors, X, tmp_path)
    kernels = load(artifact).kernels()
    types = Counter(k.type for k in kernels)
    layers = sum(e.dynamic for e in result.plan.of_kind("bits"))
    fused = types["DynamicQuantizeMatMul"] + types["MatMulIntegerToFloat"]  # of one input for two
    assert fused == layers
    assert not {"MatMulInteger", "Gemm", "MatMul", "FusedGemm", "Cast"} & set(types)
    assert all(k.is_integer for k in kernels if "MatMul" in k.type)


def test_weights_are_stored_as_integers(tmp_path):
    torch.manual_seed(0)
    result = dynamic(nn.Sequential(nn.Linear(16, 7)), X)
    artifact = export("onnxruntime", result.model, result.plan, result.tensors, X, tmp_path)
    graph = onnx.load(artifact.path).graph
    types = {t.name: (t.data_type, tuple(t.dims)) for t in graph.initializer}
    assert sorted(types.values()) == [
        (onnx.TensorProto.FLOAT, (7,)), (onnx.TensorProto.FLOAT, (7,)),
        (onnx.TensorProto.INT8, (16, 7)),
    ]  # fmt: skip
    assert [n.op_type for n in graph.node] == [
        "DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul", "Add"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options", ["weight_symmetric: false, per_channel: false", "per_channel: false, weight_bits: 4"]
)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_other_grids_of_weights(options, runtime, tmp_path):
    torch.manual_seed(0)
    result = dynamic(Sequence(), X, f"q: {{quantize: dynamic, {options}}}")
    artifact = export(runtime, result.model, result.plan, result.tensors, X, tmp_path)
    report = parity.require(parity.check(result.model, load(artifact), X), result.plan)
    assert max(u.relative for u in report.units) < 1e-4


def test_beside_static_integers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5))
    x = torch.randn(4, 3, 8, 8)
    convs = 'c: {quantize: ptq, weights: "type:Conv2d", activations: false}'
    recipe = f"{convs}\n  q: {{quantize: dynamic}}"
    result = dynamic(model, x, recipe)
    artifact = export("onnxruntime", result.model, result.plan, result.tensors, x, tmp_path)
    assert artifact.precision == "mixed"
    parity.require(parity.check(result.model, load(artifact), x), result.plan)


@pytest.mark.skipif(not sums_saturate(), reason="this processor adds in 32 bits")
def test_weights_keep_to_seven_bits_where_sums_saturate():
    result = dynamic(nn.Sequential(nn.Linear(16, 7)), X)
    assert [e.bits for e in result.plan.of_kind("bits")] == [7, 8]
