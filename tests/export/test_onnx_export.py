"""What the ONNX file holds: exact integers, named units, one Q/DQ pair behind every operator."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from small_nets import (
    EMPTY,
    ResNet,
    as_if_trained,
    export,
    load,
    quantized,
    weights_on_grid,
)
from torch import nn
from torch.nn import functional as F

from gracile.benchmark.artifact import open_artifact
from gracile.benchmark.processor import sums_saturate
from gracile.core.plan import Architecture, Bits, Plan
from gracile.errors import ParityError, UserError
from gracile.export import parity
from gracile.export.parity import saturation_warning
from gracile.graph.capture import capture
from gracile.nn.shortcut import ChannelPad

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(model before, quantized model, plan, tensors, artifact) of a small ResNet."""
    model = as_if_trained(ResNet())
    module, plan, tensors = quantized(model, X)
    folder = tmp_path_factory.mktemp("int8")
    return model, module, plan, tensors, export("onnxruntime", module, plan, tensors, X, folder)


def constants(path):
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_the_integers_are_those_that_were_trained(whole):
    model, module, plan, tensors, artifact = whole
    stored = constants(artifact.path)
    for edit in plan.of_kind("bits"):
        if edit.role != "weight":
            continue
        scale = tensors[f"{edit.key}.scale"]
        weight = module.get_parameter(edit.at).detach()
        q = torch.round(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).to(torch.int8)
        got = torch.from_numpy(stored[edit.at].copy())
        assert got.dtype == torch.int8
        layer = edit.at.removesuffix(".weight")
        norm = dict(model.named_modules()).get(layer.replace("conv", "bn"))
        sign = torch.ones(len(q), dtype=torch.int8)
        if isinstance(norm, nn.BatchNorm2d):
            sign = torch.sign(norm.weight.detach()).to(torch.int8)
            assert (sign < 0).any() or len(sign) < 16
        assert torch.equal(got, q * sign.reshape(-1, *[1] * (q.ndim - 1))), edit.at


def test_biases_are_int32_with_scale_input_times_weight(whole):
    artifact = whole[-1]
    graph = onnx.load(artifact.path).graph
    stored = constants(artifact.path)
    maker = {o: n for n in graph.node for o in n.output}
    layers = [n for n in graph.node if n.op_type in ("Conv", "Gemm")]
    assert len(layers) == 8
    names = []
    for node in layers:
        x, w, b = (maker[i] for i in node.input)
        assert stored[b.input[0]].dtype == np.int32
        want = stored[x.input[1]] * stored[w.input[1]]
        assert np.array_equal(stored[b.input[1]], want)
        names.append(b.input[0])
    assert len(set(names)) == 8  # none shared


def test_activations_are_uint8_and_no_batchnorm_is_left(whole):
    graph = onnx.load(whole[-1].path).graph
    stored = constants(whole[-1].path)
    ops = Counter(n.op_type for n in graph.node)
    assert "BatchNormalization" not in ops
    assert ops["Identity"] == 0
    zero_points = [stored[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"]
    assert {z.dtype for z in zero_points} == {np.dtype(np.uint8)}


def test_units_are_tensors_of_the_file_and_outputs_are_only_the_model_s(whole):
    artifact = whole[-1]
    graph = onnx.load(artifact.path).graph
    made = {o for n in graph.node for o in n.output}
    assert {u.id for u in artifact.units} <= made
    assert [o.name for o in graph.output] == ["fc"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param  # the batch is free


def test_the_file_says_what_it_is(whole):
    artifact = whole[-1]
    assert open_artifact(artifact.path) == artifact
    assert artifact.precision == "int8"
    assert artifact.inputs == (("x", (1, 3, 16, 16)),)
    assert artifact.metadata == {"seed": "0"}
    props = {p.key: p.value for p in onnx.load(artifact.path).metadata_props}
    assert json.loads(props["gracile.units"])[0]["id"] == "x.quantize"


def test_onnxruntime_runs_it_in_integers_throughout(whole):
    kernels = load(whole[-1]).kernels()
    counts = Counter(k.type for k in kernels)
    assert counts["QLinearConv"] == 7
    assert counts["QLinearAdd"] == 3
    assert counts["QLinearGlobalAveragePool"] == counts["QGemm"] == 1
    assert {k.type for k in kernels if not k.is_integer} <= {"DequantizeLinear", "Pad"}
    assert not {k.type for k in kernels} & {"Conv", "Add", "Gemm", "Relu"}


def test_the_float_model_exports_exactly(tmp_path):
    model = as_if_trained(ResNet())
    artifact = export("onnxruntime", model, EMPTY, {}, X, tmp_path / "dense.onnx")
    assert (artifact.path, artifact.precision) == (tmp_path / "dense.onnx", "f32")
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(load(artifact).run(X)[0]), model(X))


class Zoo(nn.Module):
    """Patterns beyond a ResNet: outputs in a dict, cat, pools, transposed and depthwise, rank 3."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, 1, 1, padding_mode="reflect")
        self.b = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.act = nn.ReLU6(inplace=True)
        self.max, self.avg = nn.MaxPool2d(2), nn.AvgPool2d(2)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.drop = nn.Dropout(0.5)
        self.tokens = nn.Linear(8, 4)
        self.twice = nn.Linear(4, 4)

    def forward(self, x):
        y = torch.cat([F.relu(self.a(x)), self.b(x)], 1)
        y = self.act(self.norm(self.depthwise(y)))
        y = F.relu(self.up(self.avg(self.max(y))))
        z = self.tokens(self.drop(y).permute(0, 2, 3, 1))
        return {"tokens": self.twice(F.relu(self.twice(z))), "flat": y.flatten(1)}


@pytest.fixture(scope="module")
def zoo():
    torch.manual_seed(0)
    return as_if_trained(Zoo())


@pytest.mark.parametrize(
    "options",
    [{}, {"signed": True, "per_channel": False}, {"bits": 4, "weight_bits": 4}],
    ids=["uint8", "int8, one scale a weight", "4 bits"],
)
def test_other_operators_and_grids_keep_parity(zoo, options, tmp_path):
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    module, plan, tensors = quantized(zoo, x, **options)
    artifact = export("onnxruntime", module, plan, tensors, x, tmp_path)
    assert artifact.precision == "int8"
    report = parity.require(parity.check(module, load(artifact), x))
    assert report.max_lsb <= 1.0


def test_full_range_weights_are_right_or_the_cause_is_named(tmp_path):
    """Without VNNI uint8 x int8 sums saturate: parity sees it, and the message says the way out."""
    torch.manual_seed(0)
    model, x = as_if_trained(Zoo()), torch.full((4, 3, 16, 16), 3.0)
    module, plan, tensors = quantized(model, x, weight_bits=8)
    artifact = export("onnxruntime", module, plan, tensors, x, tmp_path)
    report = parity.check(module, load(artifact), x)
    if not sums_saturate():
        parity.require(report, plan)
        return
    with pytest.raises(ParityError, match=r"no VNNI.*half_range: true"):
        parity.require(report, plan)


def test_weights_only_are_stored_small_and_computed_in_float(tmp_path):
    model = as_if_trained(ResNet(1, 32))
    dense = export("onnxruntime", model, EMPTY, {}, X, tmp_path / "dense.onnx")
    graph = capture(model, X)
    edits, tensors = weights_on_grid(graph.module, graph)
    small = export("onnxruntime", model, EMPTY.extended(edits), tensors, X, tmp_path / "w.onnx")
    assert small.precision == "mixed"
    assert small.size_bytes < 0.35 * dense.size_bytes
    loaded = load(small)
    assert {k.precision for k in loaded.kernels()} == {"f32"}  # restored once, when it is loaded
    parity.require(parity.check(model, loaded, X))


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.third = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.third(F.relu(self.second(F.relu(self.first(x)))))


def test_a_layer_that_was_left_in_float_stays_in_float(tmp_path):
    """ONNX Runtime would quantize its weight by itself between two quantized tensors."""
    torch.manual_seed(0)
    module, plan, tensors = quantized(Chain(), X, at=["x", "relu", "relu_1"])
    with torch.no_grad():
        module.get_parameter("second.weight").add_(0.01)
    edits = [e for e in plan.edits if e.at != "second.weight"]
    artifact = export("onnxruntime", module, EMPTY.extended(edits), tensors, X, tmp_path)
    assert artifact.precision == "mixed"
    loaded = load(artifact)
    kinds = {k.unit: k.precision for k in loaded.kernels() if k.is_convolution}
    assert (kinds["relu"], kinds["relu_1"]) == ("int8", "f32")
    parity.require(parity.check(module, loaded, X))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_file_says_which_weight_was_not_written_as_integers_and_why(runtime, tmp_path):
    torch.manual_seed(0)
    module, plan, tensors = quantized(Chain(), X)
    wide = [e.model_copy(update={"bits": 12}) if e.at == "second.weight" else e for e in plan.edits]
    artifact = export(runtime, module, EMPTY.extended(wide), tensors, X, tmp_path)
    assert open_artifact(artifact.path).metadata["left_float"].keys() == {"second.weight"}
    assert "12 bits do not fit" in artifact.metadata["left_float"]["second.weight"]


def test_attention_of_torch_stays_float_and_the_file_says_so(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.up(x)
            return self.down(self.mha(x, x, x, need_weights=False)[0])

    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    module, plan, tensors = quantized(Net(), x)
    assert export("onnxruntime", module, plan, tensors, x, tmp_path).precision == "mixed"


def test_a_pruned_filter_with_a_bias_is_still_integer(tmp_path):
    """A filter of zeros has no useful scale; its bias must fit nevertheless."""
    torch.manual_seed(0)
    model = Chain()
    with torch.no_grad():
        model.first.weight[2], model.first.bias[2] = 0, 1.5
    module, plan, tensors = quantized(model, X, outputs=True)
    artifact = export("onnxruntime", module, plan, tensors, X, tmp_path)
    loaded = load(artifact)
    assert [k.type for k in loaded.kernels() if k.is_convolution] == ["QLinearConv"] * 3
    parity.require(parity.check(module, loaded, X))


def test_tied_weights_are_integers_under_both_names(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    x = torch.randn(8, 6)
    module, plan, tensors = quantized(model, x)
    edits = [e for e in plan.edits if e.at != "2.weight"]
    artifact = export("onnxruntime", module, EMPTY.extended(edits), tensors, x, tmp_path)
    loaded = load(artifact)
    assert [k.type for k in loaded.kernels()].count("QGemm") == 2
    parity.require(parity.check(module, loaded, x))


def test_a_padded_shortcut_stays_integer_after_channels_were_cut(tmp_path):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shortcut = nn.Conv2d(3, 4, 1), ChannelPad(4, 1, 1, stride=2)
            self.second, self.head = nn.Conv2d(4, 4, 3, 2, 1), nn.Linear(4, 3)
            self.shortcut.cut(0, [1, 3, 4, 5])  # copies of channels 0, 2, 3, then zeros

        def forward(self, x):
            x = F.relu(self.first(x))
            x = F.relu(self.second(x) + self.shortcut(x))
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    module, plan, tensors = quantized(Padded(), X)
    loaded = load(export("onnxruntime", module, plan, tensors, X, tmp_path))
    counts = Counter(k.type for k in loaded.kernels())
    assert (counts["QLinearConv"], counts["QLinearAdd"], counts["QGemm"]) == (2, 1, 1)
    parity.require(parity.check(module, loaded, X))


def test_two_inputs_and_a_changed_batch(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, a, b):
            return self.fc(a) * b, a + b

    model, x = Two(), (torch.randn(2, 6), torch.randn(2, 6))
    artifact = export("onnxruntime", model, EMPTY, {}, x, tmp_path)
    assert artifact.inputs == (("a", (1, 6)), ("b", (1, 6)))
    bigger = (torch.randn(5, 6), torch.randn(5, 6))
    for got, want in zip(load(artifact).run(bigger), model(*bigger), strict=True):
        torch.testing.assert_close(torch.tensor(got), want)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_model_that_only_torch_export_can_follow_runs_in_integers(runtime, tmp_path):
    class Looks(Chain):
        def forward(self, x):
            if x.shape[1] != 3:
                raise ValueError("three channels, please")
            return super().forward(x)

    torch.manual_seed(0)
    model = Looks()
    assert capture(model, X).how == "export"
    module, plan, tensors = quantized(model, X, outputs=True)
    loaded = load(export(runtime, module, plan, tensors, X, tmp_path))
    assert {k.precision for k in loaded.kernels() if k.is_convolution} == {"int8"}
    parity.require(parity.check(module, loaded, X))


def test_a_model_that_cannot_be_followed_is_refused(tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(
        UserError, match=r"cannot be exported, its forward cannot be followed: fx: "
    ):
        export("onnxruntime", Branch(), EMPTY, {}, torch.ones(2, 3), tmp_path)


def test_saturation_is_warned_of_only_where_it_can_happen():
    def plan(weight_bits, activations=True):
        grid = {"bits": 8, "signed": False, "symmetric": False}
        edits = [
            Bits(by="q", key="w.weight", at="w", role="weight", **{**grid, "bits": weight_bits})
        ]
        if activations:
            edits.append(Bits(by="q", key="a.output", at="a", role="output", **grid))
        return Plan(architecture=Architecture(name="Net"), edits=edits)

    assert saturation_warning(plan(8), "avx2 avx512_vnni") is None
    assert saturation_warning(plan(8), "asimd") is None
    assert saturation_warning(plan(7), "sse avx2 fma") is None
    assert saturation_warning(plan(8, activations=False), "sse avx2 fma") is None
    assert "no VNNI" in str(saturation_warning(plan(8), "sse avx2 fma"))
