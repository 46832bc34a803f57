"""Parity holds for right artifacts, and a fault in any layer is found and named."""

import random
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_nets import EMPTY, ResNet, as_if_trained, export, load, quantized, with_fault
from torch import nn

from gracile.benchmark.artifact import Unit
from gracile.benchmark.processor import cpu_flags
from gracile.benchmark.runtimes.pytorch import node_values
from gracile.errors import ParityError
from gracile.export import parity
from gracile.export.openvino import visible
from gracile.graph.capture import capture
from gracile.nn.quantized import ActivationQuantizer

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIZES = {"onnxruntime": 3, "openvino": 1}  # blocks a stage: 19 or 7 convolutions


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(runtime, precision) -> (model, artifact)."""
    out = {}
    for runtime, blocks in SIZES.items():
        torch.manual_seed(0)
        model = as_if_trained(ResNet(blocks))
        module, plan, tensors = quantized(model, X)
        folder = tmp_path_factory.mktemp(runtime)
        for precision, args in {"f32": (model, EMPTY, {}), "int8": (module, plan, tensors)}.items():
            artifact = export(runtime, *args, X, folder / precision)
            out[runtime, precision] = args[0], artifact
    return out


CASES = [(r, p) for r in SIZES for p in ("f32", "int8")]


@pytest.mark.parametrize(("runtime", "precision"), CASES)
def test_a_right_artifact_passes(made, runtime, precision):
    model, artifact = made[runtime, precision]
    report = parity.require(parity.check(model, load(artifact), X, precision=precision))
    assert (report.ok, report.first_bad, report.agreement) == (True, None, 1.0)
    assert report.cosine > (0.9999999 if precision == "f32" else 0.9999)
    if precision == "f32":
        assert report.max_lsb is None
    else:
        assert report.max_lsb in (0.0, 1.0)
    assert [u.id for u in report.units] == [u.id for u in artifact.units]


@pytest.mark.parametrize(("runtime", "precision"), CASES)
def test_one_wrong_filter_in_any_layer_is_found_and_named(made, runtime, precision, tmp_path):
    model, artifact = made[runtime, precision]
    modules = dict(model.named_modules())
    draw = random.Random(0)
    layers = [x for u in artifact.units for x in u.layers if hasattr(modules[x], "stride")]
    layers.append("fc")
    assert len(layers) == 6 * SIZES[runtime] + 2
    for layer in layers:
        faulty = with_fault(artifact, layer, draw.randrange(len(modules[layer].weight)), tmp_path)
        report = parity.check(model, load(faulty), X)
        assert layer in report.layers, (layer, report.first_bad, report.problems)
        with pytest.raises(ParityError, match=rf"First differing unit: '{report.first_bad}' \("):
            parity.require(report)


def test_a_wrong_activation_scale_is_found(made, tmp_path):
    import onnx
    from onnx import numpy_helper

    model, artifact = made["onnxruntime", "int8"]
    proto = onnx.load(artifact.path)
    for t in proto.graph.initializer:
        if t.name == "blocks.4.relu.scale":
            t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t) * np.float32(1.05), t.name))
    onnx.save(proto, tmp_path / "model.onnx")
    faulty = replace(artifact, path=tmp_path / "model.onnx")
    assert parity.check(model, load(faulty), X).first_bad == "blocks.4.relu"


def test_another_model_s_artifact_fails_in_its_first_layer(made):
    _, artifact = made["onnxruntime", "f32"]
    other = as_if_trained(ResNet(3), seed=1)
    report = parity.check(other, load(artifact), X)
    assert (report.ok, report.first_bad, report.layers) == (False, "relu", ("conv1", "bn1"))


def test_other_shapes_of_output_are_a_problem_not_a_crash(made):
    _, artifact = made["onnxruntime", "f32"]
    report = parity.check(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), load(artifact), X)
    assert not report.ok
    assert "shapes [(4, 10)] instead of [(4, 3)]" in report.problems[0]


def test_units_that_the_model_does_not_have_are_a_problem_not_a_crash(made):
    _, artifact = made["onnxruntime", "int8"]
    float_model, _ = made["onnxruntime", "f32"]
    foreign = replace(artifact, units=(Unit("stem.pool", ("stem",)), *artifact.units))
    report = parity.check(float_model, load(foreign), X)
    assert (report.first_bad, report.layers) == ("stem.pool", ("stem",))
    assert any("'stem.pool' is no unit of this model" in p for p in report.problems)


@pytest.mark.parametrize(
    ("hint", "units", "words"),
    [
        ("bf16", {"avx512_bf16", "amx_bf16"}, "8 significant bits"),
        ("f16", {"avx512_fp16", "amx_fp16"}, "11 significant bits"),
    ],
)
def test_16_bits_have_their_own_tolerance_and_reason(made, hint, units, words):
    model, artifact = made["openvino", "f32"]
    computes = bool(units & set(cpu_flags().split()))
    with nullcontext() if computes else pytest.warns(UserWarning, match=f"no units for {hint}"):
        loaded = load(artifact, hint=hint)
    report = parity.check(model, loaded, X)
    assert report.precision == hint
    assert words in report.reason
    assert (report.max_abs > 1e-5) is computes  # without such units OpenVINO stays in float
    parity.require(report)


def test_the_model_is_left_as_it_was(made):
    model, artifact = made["onnxruntime", "f32"]
    model.train()
    model.bn1.eval()
    before = model.bn1.running_mean.clone()
    parity.check(model, load(artifact), X)
    assert (model.training, model.bn1.training) == (True, False)
    assert torch.equal(model.bn1.running_mean, before)
    model.eval()


def test_the_report_is_json(made):
    import json

    model, artifact = made["onnxruntime", "int8"]
    data = json.loads(json.dumps(parity.check(model, load(artifact), X).to_dict()))
    assert data["first_bad"] is None
    assert data["tolerance"]["levels"] == 1.0
    assert data["units"][1]["layers"] == ["conv1", "bn1"]


def test_units_that_a_converter_joined_count_with_the_next_one():
    units = (Unit("a", ("x",)), Unit("b", ("y",)), Unit("c", ("z",)))
    assert visible(units, {"b", "c"}) == (Unit("b", ("x", "y")), Unit("c", ("z",)))


@pytest.mark.parametrize(("level", "right"), [(40.5, True), (40.3, False)])
def test_many_values_half_way_may_round_either_way_and_others_may_not(level, right):
    """A narrow layer computes few different values: one tie can be an eighth of its numbers."""
    torch.manual_seed(0)
    x = torch.ones(2, 3, 8, 8)  # every position of a channel has the same value
    module, _, _ = quantized(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()).eval(), x, at=["1"])
    unit = Unit("1", ("0", "1"))
    (quantizer,) = (m for m in module.modules() if isinstance(m, ActivationQuantizer))
    with torch.no_grad():
        before = node_values(capture(module, (x,)).module, {"1"}, (x,))["1"]
        channel = int(before[0, :, 0, 0].argmax())
        quantizer.scale.fill_(float(before[0, channel, 0, 0]) / level)
        want = module(x).numpy()

    def run_units(batch, values):
        got = values["1"].copy()
        got[:, channel] += float(quantizer.scale) * (1 if got[0, channel, 0, 0] < level else -1)
        return {"1": got}

    artifact = SimpleNamespace(units=(unit,))
    loaded = SimpleNamespace(
        artifact=artifact,
        precision="int8",
        hint="f32",
        run=lambda batch: [want],
        run_units=run_units,
    )
    report = parity.check(module, loaded, x)
    assert report.ok is right
    assert report.units[0].share == pytest.approx(1 / 8)
