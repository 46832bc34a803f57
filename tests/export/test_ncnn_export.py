"""ncnn: every operator computes what PyTorch computes, integers are ours, faults are found."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from operator_nets import COMMON, IMAGE, LINE, Of
from small_nets import EMPTY, ResNet, as_if_trained, export, load, quantized, with_fault
from torch import nn

from gracile.benchmark.artifact import open_artifact
from gracile.benchmark.param import read
from gracile.core.plan import Bits
from gracile.errors import ParityError, UserError
from gracile.export import parity
from gracile.recipe.load import loads
from gracile.train.session import Session

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
VOLUME = (2, 3, 4, 5)


NETS = {
    **COMMON,
    "depthwise": (nn.Conv2d(3, 3, 3, groups=3), IMAGE),
    "one dim": (nn.Conv1d(4, 6, 3, 2, 1), LINE),
    "transposed": (nn.ConvTranspose2d(3, 5, 3, 2, 1, output_padding=(1, 0)), IMAGE),
    "transposed in groups": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (4, 7, 5)),
    "adaptive pool": (nn.AdaptiveAvgPool2d((3, 2)), IMAGE),
    **{
        type(f).__name__: (nn.Sequential(nn.Conv2d(3, 5, 3), f), IMAGE)
        for f in (
            nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.3, 0.4), nn.Sigmoid(), nn.Tanh(),
            nn.Hardsigmoid(), nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"),
            nn.LeakyReLU(0.2), nn.ELU(0.7), nn.Softmax(1),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_an_operator_computes_what_pytorch_computes(name, tmp_path):
    torch.manual_seed(0)
    model, shape = NETS[name]
    model, x = copy.deepcopy(model).eval(), torch.randn(3, *shape)
    artifact = export("ncnn", model, EMPTY, {}, x, tmp_path)
    (got,) = load(artifact).run(x)
    torch.testing.assert_close(torch.tensor(got), model(x).detach(), rtol=1e-4, atol=1e-5)
    parity.require(parity.check(model, load(artifact), x))


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (0, 3, 1, 2), (0, 3, 2, 1), (0, 1, 3, 2),
                                   (0, 2, 1, 3)])  # fmt: skip
def test_axes_in_any_order(order, tmp_path):
    x = torch.randn(2, *IMAGE)
    artifact = export("ncnn", Of(lambda x: torch.relu(x).permute(order)), EMPTY, {}, x, tmp_path)
    np.testing.assert_array_equal(load(artifact).run(x)[0], torch.relu(x).permute(order))


def test_numbers_look_rows_up(tmp_path):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)).eval()
    x = torch.randint(9, (3, 5))
    loaded = load(export("ncnn", model, EMPTY, {}, x, tmp_path))
    torch.testing.assert_close(torch.tensor(loaded.run(x)[0]), model(x).detach())
    assert len(loaded.time(2)) == 2


def test_several_results_one_of_them_read_again(tmp_path):
    def forward(x, conv):
        a = torch.relu(conv(x))
        return a, a.mean((2, 3)), a * 2

    model, x = Of(forward, nn.Conv2d(3, 4, 3)).eval(), torch.randn(2, *IMAGE)
    got = load(export("ncnn", model, EMPTY, {}, x, tmp_path)).run(x)
    for mine, theirs in zip(got, model(x), strict=True):
        torch.testing.assert_close(torch.tensor(mine), theirs.detach())


def test_inputs_may_be_freed_while_it_runs(tmp_path):
    model = nn.Conv2d(3, 4, 3).eval()
    loaded = load(export("ncnn", model, EMPTY, {}, torch.randn(2, *IMAGE), tmp_path))
    want = model(torch.ones(1, *IMAGE)).detach().numpy()
    for _ in range(20):
        np.testing.assert_allclose(loaded.run(np.ones((1, *IMAGE), np.float32))[0], want, rtol=1e-5)


# ------------------------------------------------------------------ integers


def ptq(model, x, options="", profile="ncnn"):
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
        out[precision] = args[0], export("ncnn", *args, X, tmp_path_factory.mktemp(precision))
    return out


def test_both_files_are_there_and_say_what_they_are(made):
    _, artifact = made["int8"]
    assert sorted(p.name for p in artifact.path.parent.iterdir()) == ["model.bin", "model.param"]
    assert open_artifact(artifact.path) == artifact
    assert (artifact.precision, artifact.units[-1].id) == ("int8", "fc")


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_a_right_artifact_passes(made, precision):
    model, artifact = made[precision]
    report = parity.require(parity.check(model, load(artifact), X))
    assert (report.ok, report.agreement) == (True, 1.0)
    assert report.cosine > (0.9999999 if precision == "f32" else 0.9999)
    assert [u.id for u in report.units] == [u.id for u in artifact.units]


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_one_wrong_filter_in_any_layer_is_found_and_named(made, precision, tmp_path):
    model, artifact = made[precision]
    modules = dict(model.named_modules())
    layers = [x for u in artifact.units for x in u.layers if hasattr(modules[x], "stride")]
    assert len(layers) == 7
    for layer in (*layers, "fc"):
        faulty = with_fault(artifact, layer, 3, tmp_path)
        report = parity.check(model, load(faulty), X)
        assert layer in report.layers, (layer, report.first_bad, report.problems)
        with pytest.raises(ParityError, match=f"First differing unit: '{report.first_bad}'"):
            parity.require(report)


def test_every_layer_with_weights_runs_in_integers(made):
    loaded = load(made["int8"][1])
    kernels = loaded.kernels()
    weighty = [k for k in kernels if k.type in ("Convolution", "InnerProduct")]
    assert len(weighty) == 8
    assert all(k.is_integer and k.unit for k in weighty)
    text = made["int8"][1].path.read_text()
    handed_on = [x for x in read(text)[0] if x.params.get(8, 0) == 101]
    # The first convolution of each block hands integers to the second; the stem's are requantized
    # too, as everybody reads them rounded.
    assert [x.outputs[0] for x in handed_on] == ["relu", *(f"blocks.{k}.relu" for k in range(3))]


def test_the_same_model_gives_the_same_file(made, tmp_path):
    model = as_if_trained(ResNet())
    a, b = (export("ncnn", model, EMPTY, {}, X, tmp_path / n) for n in "ab")
    assert a.sha == b.sha


def test_integers_of_few_bits_keep_their_ends(tmp_path):
    torch.manual_seed(0)
    args = ptq(as_if_trained(ResNet()), X, ", bits: 4, weight_bits: 4")
    artifact = export("ncnn", *args, X, tmp_path)
    assert any(x.type == "Clip" for x in read(artifact.path.read_text())[0])
    parity.require(parity.check(args[0], load(artifact), X))


def test_f16_is_stated_and_has_its_tolerance(made):
    model, artifact = made["f32"]
    loaded = load(artifact, hint="f16")
    assert parity.require(parity.check(model, loaded, X)).precision == "f16"
    assert {k.precision for k in loaded.kernels()} >= {"f16"}


def test_bf16_is_stated_and_has_its_tolerance(made):
    model, artifact = made["f32"]
    report = parity.require(parity.check(model, load(artifact, hint="bf16"), X))
    assert (report.precision, report.max_abs > 1e-4) == ("bf16", True)
    assert {k.precision for k in load(artifact, hint="bf16").kernels()} >= {"bf16"}


def test_depthwise_layers_run_in_integers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6)).eval()
    args = ptq(model, X)
    artifact = export("ncnn", *args, X, tmp_path)
    assert [k.is_integer for k in load(artifact).kernels() if k.is_convolution] == [True, True]
    parity.require(parity.check(args[0], load(artifact), X))


@pytest.mark.parametrize(
    ("model", "shape", "why"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), (4, 8, 8), "one scale for each group"),
        (nn.Conv1d(4, 6, 3), (4, 9), "no kernel of integers for 1 spatial dim"),
    ],
)
def test_what_stays_in_floats_says_why(model, shape, why, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, *shape)
    args = ptq(nn.Sequential(model).eval(), x)
    artifact = export("ncnn", *args, x, tmp_path)
    assert why in artifact.metadata["left_float"]["0.weight"]
    assert artifact.precision == "mixed"
    parity.require(parity.check(args[0], load(artifact), x))


def test_weights_alone_stay_in_floats(tmp_path):
    args = ptq(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), X, ", activations: false")
    artifact = export("ncnn", *args, X, tmp_path)
    assert "not quantized" in artifact.metadata["left_float"]["0.weight"]
    parity.require(parity.check(args[0], load(artifact), X))


# ------------------------------------------------------------------ refusals


def test_a_grid_of_another_runtime_is_refused_with_the_way_out(tmp_path):
    args = quantized(as_if_trained(ResNet()), X)
    with pytest.raises(UserError, match=r"no zero point, but 'x.quantize' is on .* profile: ncnn"):
        export("ncnn", *args, X, tmp_path)


def test_ranges_found_at_run_time_are_refused(tmp_path):
    args = ptq(nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(4, 8))
    recipe = loads("recipe: 1\nmethods:\n  q: {quantize: dynamic, when: {at: end}}\n")
    result = Session(nn.Sequential(nn.Linear(8, 4)).eval(), recipe, example=torch.randn(4, 8),
                     profile="onnxruntime").finish()  # fmt: skip
    assert args[1].of_kind("bits")
    with pytest.raises(UserError, match=r"finds its range as the network runs, .* quantize: ptq"):
        export("ncnn", result.model, result.plan, result.tensors, torch.randn(4, 8), tmp_path)


def test_an_operator_it_does_not_know_is_named(tmp_path):
    with pytest.raises(UserError, match=r"ncnn has no layer for 'cumsum'.* openvino"):
        export("ncnn", Of(lambda x: x.cumsum(2)), EMPTY, {}, X, tmp_path)


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
    with pytest.raises(UserError, match="ncnn has no layer for"):
        export("ncnn", Of(function), EMPTY, {}, X, tmp_path)


def test_a_layer_that_is_none_and_a_device_that_is_none(made, tmp_path):
    _, artifact = made["f32"]
    path = tmp_path / "m.param"
    path.write_text(artifact.path.read_text().replace("Pooling", "Puling"))
    path.with_suffix(".bin").write_bytes(artifact.path.with_suffix(".bin").read_bytes())
    with pytest.raises(UserError, match=r"ncnn cannot load it: .*Puling"):
        load(replace(artifact, path=path))
    with pytest.raises(UserError, match="there is no device 'GPU'"):
        load(artifact, device="GPU")
    with pytest.raises(UserError, match="has 1 inputs, got 2"):
        load(artifact).run([X, X])


def test_more_threads_give_the_same_numbers(made):
    _, artifact = made["int8"]
    one, two = (load(artifact, threads=n).run(X)[0] for n in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert len(load(artifact, batch=2).time(3)) == 3


def test_the_plan_says_that_grids_are_their_own_mirror_image(made):
    _, plan, _ = ptq(ResNet().eval(), X)
    grids = [e for e in plan.of_kind("bits") if isinstance(e, Bits) and e.role != "weight"]
    assert grids
    assert all((e.qmin, e.qmax) == (-127, 127) for e in grids)
