"""Runtimes on a network written by hand: right numbers, units, feeding, kernels, refusals."""

from contextlib import nullcontext

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from gracile import registry
from gracile.benchmark.artifact import Unit, content_sha, facts, open_artifact
from gracile.benchmark.processor import computes_bf16
from gracile.benchmark.runtimes.base import load, parse_target
from gracile.benchmark.throughput import count
from gracile.errors import UserError

W = np.array([[1.0, 2.0], [-1.0, 0.5]], np.float32)  # y = |x @ W.T|, z = y * 3 on a grid
X = np.array([[1.0, 1.0], [2.0, -1.0], [0.0, 4.0]], np.float32)
Y = np.abs(X @ W.T)
STEP = 0.25


def network():
    """x -> Gemm -> Abs "y" -> Q/DQ "yq" -> times 3 "z"."""
    tensors = {
        "w": W,
        "step": np.float32(STEP),
        "zero": np.uint8(0),
        "three": np.float32(3),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["g"], "y@Gemm0", transB=1),
        helper.make_node("Abs", ["g"], ["y"], "y@Abs1"),
        helper.make_node("QuantizeLinear", ["y", "step", "zero"], ["q"], "yq@QuantizeLinear2"),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["yq"], "yq@DequantizeLinear3"),
        helper.make_node("Mul", ["yq", "three"], ["z"], "z@Mul4"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def artifact(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = network()
    units = [Unit("y"), Unit("yq"), Unit("z")]
    values = facts("mixed", [("x", (1, 2))], units, {})
    helper.set_model_props(model, values)
    onnx.checker.check_model(model, full_check=True)
    path = folder / "m.onnx"
    onnx.save(model, path)
    if request.param == "openvino":
        converted = ov.convert_model(path)
        for key, value in values.items():
            converted.set_rt_info(value, key.split("."))
        path = folder / "m.xml"
        ov.save_model(converted, path, compress_to_fp16=False)
    return open_artifact(path)


def test_runs_any_batch_size(artifact):
    loaded = load(artifact)
    for n in (1, 3, 2):
        (z,) = loaded.run(torch.from_numpy(X[:n]))
        np.testing.assert_allclose(z, 3 * Y[:n])


def test_shows_units_in_order(artifact):
    units = load(artifact).run_units(X)
    assert list(units) == ["y", "yq", "z"]
    np.testing.assert_allclose(units["y"], Y)
    np.testing.assert_allclose(units["z"], 3 * Y)


def test_a_fed_unit_is_what_its_readers_see(artifact):
    fed = {"y": np.full_like(X, 0.3), "yq": np.full_like(X, 5.0), "z": np.zeros_like(X)}
    units = load(artifact).run_units(X, fed)
    np.testing.assert_allclose(units["y"], Y)  # its own result, not what it was fed
    np.testing.assert_allclose(units["yq"], 0.25, atol=1e-6)  # 0.3 on a grid of step 0.25
    np.testing.assert_allclose(units["z"], 15.0, rtol=1e-6)


def test_facts_of_a_loaded_artifact(artifact):
    loaded = load(artifact, batch=4)
    assert loaded.device == f"{artifact.runtime}:CPU"
    assert loaded.version[0].isdigit()
    assert (loaded.batch, loaded.threads, loaded.hint) == (4, 1, "f32")
    assert loaded.size_bytes == artifact.size_bytes


def test_times_are_milliseconds_of_each_run(artifact):
    times = load(artifact).time(5, batch=2)
    assert len(times) == 5
    assert all(0 < t < 1000 for t in times)


def test_counters_tell_which_units_a_layer_computes(artifact):
    counters = load(artifact).counters(batch=64)
    times = counters.times(4)
    assert times.shape == (4, len(counters.layers))
    assert (times >= 0).all()
    units = [u for layer in counters.layers for u in layer.units]
    assert "y" in units
    assert units == sorted(units, key=["y", "yq", "z"].index)
    assert all(layer.name and layer.type for layer in counters.layers)
    if artifact.runtime == "openvino":
        assert any("y@Abs1" in layer.fused for layer in counters.layers)


def test_streams_run_at_the_same_time(artifact):
    steps = load(artifact).streams(3, batch=2)
    assert len(steps) == 3
    assert count(steps, 0.0)[0] == 3
    n, seconds = count(steps, 0.02)
    assert n > 3
    assert seconds >= 0.02


def test_kernels_speak_of_units(artifact):
    kernels = load(artifact).kernels()
    assert kernels
    assert {k.unit for k in kernels} <= {"y", "yq", "z", ""}
    assert {k.precision for k in kernels} <= {"f32", "int8", "i32"}


def test_wrong_inputs_and_settings_are_refused(artifact):
    with pytest.raises(UserError, match="has 1 inputs, got 2"):
        load(artifact).run([X, X])
    with pytest.raises(UserError, match="has no device 'NPU'; it has"):
        load(artifact, device="NPU")
    with pytest.raises(UserError, match="threads must be at least 1"):
        load(artifact, threads=0)
    with pytest.raises(UserError, match="precision hint must be one of f32, bf16, f16"):
        load(artifact, hint="fp8")
    other = {"onnxruntime": "openvino", "openvino": "onnxruntime"}[artifact.runtime]
    with pytest.raises(UserError, match=f"not for '{other}'"):
        registry.get("runtime", other).obj(artifact)


def test_bf16_is_stated_or_refused(artifact):
    if artifact.runtime == "onnxruntime":
        with pytest.raises(UserError, match="hint 'bf16' is not there"):
            load(artifact, hint="bf16")
    else:
        with nullcontext() if computes_bf16() else pytest.warns(UserWarning, match="no units"):
            assert load(artifact, hint="bf16").hint == "bf16"


def test_a_damaged_file_is_refused(artifact, tmp_path):
    from dataclasses import replace

    path = tmp_path / artifact.path.name
    path.write_bytes(b"<?xml version='1.0'?><net></net>")
    path.with_suffix(".bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot (load|read) it"):
        load(replace(artifact, path=path, sha=content_sha(path)))


def test_targets_on_the_command_line():
    assert parse_target("openvino:GPU.1") == ("openvino", "GPU.1")
    assert parse_target("onnxruntime") == ("onnxruntime", "CPU")
    with pytest.raises(UserError, match="unknown runtime 'openvin'"):
        parse_target("openvin")
