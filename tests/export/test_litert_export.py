"""LiteRT: every operator computes what PyTorch computes, integers are ours, faults are found."""

import copy
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from operator_nets import COMMON, IMAGE, LINE, Of, after, scattered
from small_nets import EMPTY, ResNet, as_if_trained, export, load, quantized
from torch import nn
from torch.nn import functional as F

from gracile.benchmark import tflite
from gracile.benchmark.artifact import open_artifact
from gracile.cli.main import main
from gracile.errors import MissingExtra, ParityError, UserError
from gracile.export import parity
from gracile.recipe.load import loads
from gracile.train.session import Session

pytest.importorskip("ai_edge_litert")
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


NETS = {
    **COMMON,
    "conv that halves an even size": (nn.Conv2d(3, 8, 3, 2, 1), (3, 8, 6)),
    "conv that keeps the size": (nn.Conv2d(3, 4, (5, 3), padding="same"), IMAGE),
    "depthwise": (nn.Conv2d(3, 3, 3, padding=1, groups=3), IMAGE),
    "depthwise, two for each": (nn.Conv2d(3, 6, 3, groups=3), IMAGE),
    "linear of columns of an image": (nn.Linear(5, 4), IMAGE),
    "max pool of an even size": (nn.MaxPool2d(3, 2, 1), (3, 8, 8)),
    "max pool of a relu": (after(lambda x: F.max_pool2d(torch.relu(x), 3, 2, 1)), (3, 8, 8)),
    "adaptive pool": (nn.AdaptiveAvgPool2d((3, 2)), (3, 6, 8)),
    "mean of columns": (Of(lambda x: x.mean(2)), IMAGE),
    "cat of rows": (Of(lambda x: torch.cat([x, torch.relu(x)], 2)), IMAGE),
    "softmax of columns": (nn.Softmax(2), IMAGE),
    "nearest": (nn.Upsample(scale_factor=2), IMAGE),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    "bilinear by corners": (nn.UpsamplingBilinear2d(scale_factor=2), IMAGE),
    **{
        f"{type(f).__name__} {k}": (nn.Sequential(nn.Conv2d(3, 5, 3), f), IMAGE)
        for k, f in enumerate((
            nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.3, 0.4), nn.Sigmoid(), nn.Tanh(),
            nn.Hardsigmoid(), nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"),
            nn.LeakyReLU(0.2), nn.ELU(), nn.Softmax(1),
        ))
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_an_operator_computes_what_pytorch_computes(name, tmp_path):
    torch.manual_seed(0)
    model, shape = NETS[name]
    model, x = copy.deepcopy(model).eval(), torch.randn(3, *shape)
    loaded = load(export("litert", model, EMPTY, {}, x, tmp_path))
    (got,) = loaded.run(x)
    torch.testing.assert_close(torch.tensor(got), model(x).detach(), rtol=1e-4, atol=1e-5)
    parity.require(parity.check(model, loaded, x))


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (0, 3, 1, 2), (0, 3, 2, 1), (0, 1, 3, 2),
                                   (0, 2, 1, 3)])  # fmt: skip
def test_axes_in_any_order(order, tmp_path):
    x = torch.randn(2, *IMAGE)
    artifact = export("litert", Of(lambda x: torch.relu(x).permute(order)), EMPTY, {}, x, tmp_path)
    np.testing.assert_array_equal(load(artifact).run(x)[0], torch.relu(x).permute(order))


def test_numbers_look_rows_up(tmp_path):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)).eval()
    x = torch.randint(9, (3, 5))
    loaded = load(export("litert", model, EMPTY, {}, x, tmp_path))
    torch.testing.assert_close(torch.tensor(loaded.run(x)[0]), model(x).detach())
    assert len(loaded.time(2)) == 2


def test_several_results_one_of_them_twice(tmp_path):
    def forward(x, conv):
        a = torch.relu(conv(x))
        return a, a.mean((2, 3)), a

    model, x = Of(forward, nn.Conv2d(3, 4, 3)).eval(), torch.randn(2, *IMAGE)
    got = load(export("litert", model, EMPTY, {}, x, tmp_path)).run(x)
    for mine, theirs in zip(got, model(x), strict=True):
        torch.testing.assert_close(torch.tensor(mine), theirs.detach())


def test_batches_of_any_size_one_after_the_other(made):
    model, artifact = made["f32"]
    loaded = load(artifact)
    for n in (1, 4, 2):
        np.testing.assert_allclose(loaded.run(X[:n])[0], model(X[:n]).detach(), atol=1e-5)
    assert len(load(artifact, batch=2).time(3)) == 3


# ------------------------------------------------------------------ integers


class Mobile(nn.Module):
    """Two inverted residuals, narrow."""

    def __init__(self):
        super().__init__()

        def part(into, out, k, stride=1, groups=1, act=nn.ReLU6):
            conv = nn.Conv2d(into, out, k, stride, k // 2, groups=groups, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(out), act())

        self.stem = part(3, 8, 3, 2)
        self.a = nn.Sequential(part(8, 24, 1), part(24, 24, 3, 1, 24),
                               part(24, 8, 1, act=nn.Identity))  # fmt: skip
        self.b = nn.Sequential(part(8, 24, 1), part(24, 24, 3, 2, 24),
                               part(24, 12, 1, act=nn.Identity))  # fmt: skip
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.b(x + self.a(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Joined(nn.Module):
    """Branches that are put together, and pools."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(3, 4, 1)
        self.c, self.fc = nn.Conv2d(10, 8, 3, 2, 1), nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = torch.cat([F.relu(self.a(x)), self.b(x)], 1)
        x = F.relu(self.c(F.max_pool2d(x, 3, 2, 1)))
        return self.fc(x.flatten(1))


def ptq(model, x, options="", profile="litert"):
    recipe = loads(f"recipe: 1\nmethods:\n  q: {{quantize: ptq, when: {{at: end}}{options}}}\n")
    result = Session(copy.deepcopy(model), recipe, example=x, calibration=[x],
                     profile=profile).finish()  # fmt: skip
    return result.model, result.plan, result.tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Precision -> (model, artifact)."""
    torch.manual_seed(0)
    model = as_if_trained(ResNet())
    out = {}
    for precision, args in {"f32": (model, EMPTY, {}), "int8": ptq(model, X)}.items():
        out[precision] = args[0], export("litert", *args, X, tmp_path_factory.mktemp(precision))
    return out


def changed(artifact, folder, change):
    """A copy of the artifact after `change(model, graph)`."""
    model = tflite.read(artifact.path.read_bytes())
    change(model, model.subgraphs[0])
    path = folder / "changed.tflite"
    path.write_bytes(tflite.write(model))
    return replace(artifact, path=path)


def of_unit(model, graph, unit, *types):
    """The operator of one of these types that works for a unit."""
    ids = {u for u in [tflite.name_of(t) for t in graph.tensors] if "@" not in u}
    found = zip(graph.operators, tflite.works_for(graph, ids), strict=True)
    return next(op for op, u in found if u == unit and tflite.type_of(model, op) in types)


def test_the_file_says_what_it_is(made):
    _, artifact = made["int8"]
    assert open_artifact(artifact.path) == artifact
    assert (artifact.precision, artifact.units[-1].id) == ("int8", "fc")


def test_inspect_prints_what_the_file_says(made, capsys):
    path = str(made["int8"][1].path)
    assert main(["inspect", path]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "litert, int8" in said
    assert "inputs x 1x3x16x16" in said
    assert "seed: 0" in said
    assert main(["inspect", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["units"][-1]["id"] == "fc"


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_a_right_artifact_passes(made, precision):
    model, artifact = made[precision]
    report = parity.require(parity.check(model, load(artifact), X))
    assert (report.ok, report.agreement) == (True, 1.0)
    assert report.cosine > (0.9999999 if precision == "f32" else 0.9999)
    assert [u.id for u in report.units] == [u.id for u in artifact.units]


@pytest.mark.parametrize("net", [Mobile, Joined])
@pytest.mark.parametrize("profile", ["f32", "litert", "portable"])
def test_other_networks_pass_in_floats_and_integers(net, profile, tmp_path):
    torch.manual_seed(0)
    model = as_if_trained(net())
    args = (model, EMPTY, {}) if profile == "f32" else ptq(model, X, profile=profile)
    artifact = export("litert", *args, X, tmp_path)
    parity.require(parity.check(args[0], load(artifact), X))
    kernels = [k for k in load(artifact).kernels() if k.is_convolution]
    assert {k.is_integer for k in kernels} == {profile != "f32"}
    assert artifact.precision == {"f32": "f32", "litert": "int8", "portable": "mixed"}[profile]


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_one_wrong_filter_in_any_layer_is_found_and_named(made, precision, tmp_path):
    model, artifact = made[precision]
    units = [u for u in artifact.units if any("conv" in x or x == "fc" for x in u.layers)]
    assert len(units) == 8
    for unit in units:

        def turned(file, graph, unit=unit):
            op = of_unit(file, graph, unit.id, "CONV_2D", "FULLY_CONNECTED")
            tensor = graph.tensors[op.inputs[1]]
            data = np.asarray(file.buffers[tensor.buffer].data, np.uint8)
            values = data.view(tflite.TYPES[tensor.type]).reshape(tensor.shape).copy()
            values[3] = -values[3]
            file.buffers[tensor.buffer].data = values.view(np.uint8).reshape(-1)

        report = parity.check(model, load(changed(artifact, tmp_path, turned)), X)
        assert report.first_bad == unit.id, (unit, report.problems)
        with pytest.raises(ParityError, match=f"First differing unit: '{unit.id}'"):
            parity.require(report)


def test_one_wrong_scale_of_an_activation_is_found_and_named(made, tmp_path):
    model, artifact = made["int8"]

    def wider(file, graph):
        tensor = next(t for t in graph.tensors if tflite.name_of(t) == "blocks.1.relu")
        tensor.quantization.scale = np.array([tensor.quantization.scale[0] * 1.5], np.float32)

    report = parity.check(model, load(changed(artifact, tmp_path, wider)), X)
    assert report.first_bad == "blocks.1.relu"
    assert "blocks.1.conv1" in report.layers


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_one_skipped_layer_is_found_and_named(made, precision, tmp_path):
    model, artifact = made[precision]
    unit = next(u.id for u in artifact.units if "blocks.0.conv2" in u.layers)

    def skip(file, graph):
        op = of_unit(file, graph, unit, "CONV_2D")
        for reader in graph.operators:
            read = [op.inputs[0] if t == op.outputs[0] else t for t in reader.inputs]
            reader.inputs = np.array(read, np.int32)

    found = parity.check(model, load(changed(artifact, tmp_path, skip)), X)
    assert not found.ok
    assert found.first_bad is not None
    assert found.first_bad.startswith("blocks.0")


def test_every_layer_with_weights_runs_in_integers(made):
    kernels = load(made["int8"][1]).kernels()
    weighty = [k for k in kernels if k.type.endswith(("CONV_2D", "FULLY_CONNECTED"))]
    assert len(weighty) == 8
    assert all(k.is_integer and k.unit and k.type.startswith("XNNPACK") for k in weighty)
    assert [k.type.split()[-1] for k in kernels if not k.is_integer] == ["TRANSPOSE", "DEQUANTIZE"]


def test_the_same_model_gives_the_same_file(made, tmp_path):
    model = as_if_trained(ResNet())
    a, b = (export("litert", model, EMPTY, {}, X, tmp_path / n) for n in "ab")
    assert a.sha == b.sha


def test_integers_of_few_bits_keep_their_ends(tmp_path):
    torch.manual_seed(0)
    args = ptq(as_if_trained(ResNet()), X, ", bits: 4, weight_bits: 4")
    artifact = export("litert", *args, X, tmp_path)
    parity.require(parity.check(args[0], load(artifact), X))


def test_grids_without_a_sign_move_by_128(tmp_path):
    args = quantized(as_if_trained(ResNet()), X, outputs=True)
    artifact = export("litert", *args, X, tmp_path)
    assert artifact.precision == "int8"
    parity.require(parity.check(args[0], load(artifact), X))


def test_a_filter_of_zeros_with_a_large_bias_stays_exact(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 5.0
    args = ptq(model, X)
    artifact = export("litert", *args, X, tmp_path)
    assert artifact.precision == "int8"
    parity.require(parity.check(args[0], load(artifact), X))


INTEGER = {
    "grouped": (nn.Conv2d(4, 6, 3, 2, 1, groups=2), (4, 8, 8)),
    "depthwise, two for each": (nn.Conv2d(3, 6, 3, 2, 1, groups=3), IMAGE),
    "dilated": (nn.Conv2d(3, 6, 3, padding=2, dilation=2), IMAGE),
    "linear of rows": (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), LINE),
    "shuffle": (Of(lambda x, a, b: b(a(x).view(-1, 2, 2, 7, 5).transpose(1, 2).flatten(1, 2)),
                   nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 3)), IMAGE),
    "channels in any order": (Of(lambda x, c, p: c(p(x)), nn.Conv2d(4, 3, 1),
                                 scattered([2, -1, 0, 1])), IMAGE),
    "halves": (Of(lambda x, c: torch.mul(*c(x).chunk(2, 1)), nn.Conv2d(3, 4, 3)), IMAGE),
    "a difference": (Of(lambda x, a, b: a(x) - b(x), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)),
                     IMAGE),
    "read in floats and integers": (Of(lambda x, a, b: (lambda y: b(y) + torch.sigmoid(y))(a(x)),
                                       nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), IMAGE),
    "avg pool": (Of(lambda x, c: F.avg_pool2d(torch.relu(c(x)), 2), nn.Conv2d(3, 4, 3)), IMAGE),
    "twice the same layer": (Of(lambda x, c: c(torch.relu(c(x))), nn.Conv2d(3, 3, 1)), IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("profile", ["litert", "portable"])
def test_integers_of_other_shapes_pass(name, profile, tmp_path):
    torch.manual_seed(0)
    model, shape = INTEGER[name]
    x = torch.randn(4, *shape)
    args = ptq(nn.Sequential(copy.deepcopy(model)).eval(), x, profile=profile)
    artifact = export("litert", *args, x, tmp_path)
    assert profile == "portable" or artifact.precision == "int8"
    parity.require(parity.check(args[0], load(artifact), x))


def test_weights_alone_stay_in_floats(tmp_path):
    args = ptq(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), X, ", activations: false")
    artifact = export("litert", *args, X, tmp_path)
    assert "not quantized" in artifact.metadata["left_float"]["0.weight"]
    parity.require(parity.check(args[0], load(artifact), X))


def test_more_threads_give_the_same_numbers(made):
    one, two = (load(made["int8"][1], threads=n).run(X)[0] for n in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-6)


# ------------------------------------------------------------------ refusals


def test_an_operator_it_does_not_know_is_named(tmp_path):
    with pytest.raises(UserError, match=r"LiteRT has no operator for 'cumsum'.* openvino"):
        export("litert", Of(lambda x: x.cumsum(2)), EMPTY, {}, X, tmp_path)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.permute(1, 0, 2, 3),
        lambda x: torch.cat([x, x], 0),
        lambda x: x[1:],
        lambda x: x.flatten(0, 1),
        lambda x: x.mean(0),
    ],
)
def test_what_mixes_the_samples_of_a_batch_is_refused(function, tmp_path):
    with pytest.raises(UserError, match="LiteRT has no operator for"):
        export("litert", Of(function), EMPTY, {}, X, tmp_path)


@pytest.mark.parametrize("keep", [0, 6, 40, 2000, -300])
def test_a_damaged_file_is_one_message(made, keep, tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(made["int8"][1].path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"m\.tflite: not a LiteRT file"):
        open_artifact(path)
    with pytest.raises(UserError, match=r"m\.tflite: LiteRT cannot load it"):
        load(replace(made["int8"][1], path=path))


def test_what_it_does_not_have_is_refused(made):
    _, artifact = made["f32"]
    with pytest.raises(UserError, match="there is no device 'GPU'"):
        load(artifact, device="GPU")
    with pytest.raises(UserError, match="hint 'bf16' is not there"):
        load(artifact, hint="bf16")
    with pytest.raises(UserError, match="has 1 inputs, got 2"):
        load(artifact).run([X, X])


def test_without_the_package_the_extra_is_named(made, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(MissingExtra, match=r"gracile\[litert\]"):
        export("litert", ResNet().eval(), EMPTY, {}, X, tmp_path)
    with pytest.raises(MissingExtra, match=r"gracile\[litert\]"):
        load(made["f32"][1])
