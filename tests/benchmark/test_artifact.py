"""Artifacts: opened from their files alone, also files that gracile did not write."""

import json

import onnx
import pytest
from onnx import TensorProto, helper

from gracile.benchmark.artifact import (
    Artifact,
    Unit,
    artifact_path,
    facts,
    open_artifact,
    unit_in,
)
from gracile.errors import UserError


def onnx_file(path, props=None, op="Relu"):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    helper.set_model_props(model, props or {})
    path.write_bytes(model.SerializeToString())
    return path


def test_facts_come_back_from_the_file(tmp_path):
    units = (Unit("y", ("layer",)),)
    props = facts("int8", (("x", (1, 4)),), units, {"seed": 7, "recipe_sha": "ab"})
    artifact = open_artifact(onnx_file(tmp_path / "m.onnx", props))
    assert artifact.units == units
    assert artifact.precision == "int8"
    assert artifact.inputs == (("x", (1, 4)),)
    assert artifact.metadata == {"seed": 7, "recipe_sha": "ab"}
    assert artifact.runtime == "onnxruntime"


def test_a_file_from_elsewhere_opens_without_units(tmp_path):
    artifact = open_artifact(onnx_file(tmp_path / "m.onnx"))
    assert (artifact.units, artifact.precision) == ((), "f32")
    assert artifact.inputs == (("x", (1, 4)),)


def test_an_ir_from_elsewhere_opens_without_units(tmp_path):
    import openvino as ov

    ov.save_model(ov.convert_model(onnx_file(tmp_path / "m.onnx")), tmp_path / "m.xml")
    artifact = open_artifact(tmp_path / "m.xml")
    assert (artifact.runtime, artifact.units) == ("openvino", ())
    assert artifact.inputs == (("x", (1, 4)),)


def test_the_sha_is_of_the_content(tmp_path):
    a = open_artifact(onnx_file(tmp_path / "a.onnx"))
    b = open_artifact(onnx_file(tmp_path / "b.onnx"))
    c = open_artifact(onnx_file(tmp_path / "c.onnx", op="Neg"))
    assert a.sha == b.sha != c.sha
    assert a.size_bytes == (tmp_path / "a.onnx").stat().st_size


def test_through_json_and_back(tmp_path):
    artifact = open_artifact(onnx_file(tmp_path / "m.onnx", facts("f32", (), [Unit("y")], {})))
    assert Artifact.from_dict(json.loads(json.dumps(artifact.to_dict()))) == artifact


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("m.onnx", None, "no such file"),
        ("m.xml", b"<net/>", r"m\.bin: no such file"),
        (
            "m.txt",
            b"",
            r"ends in \.onnx, \.xml, \.param, \.pte, \.tflite, \.safetensors, not '\.txt'",
        ),
        ("m.onnx", b"not a model", "not an ONNX file"),
        ("m.safetensors", b"junk", "not a safetensors file"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path, name, content, text):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=text):
        open_artifact(tmp_path / name)


def test_where_an_artifact_is_written(tmp_path):
    assert artifact_path(tmp_path, "openvino") == tmp_path / "model.xml"
    assert artifact_path(tmp_path / "a.onnx", "onnxruntime") == tmp_path / "a.onnx"
    with pytest.raises(UserError, match=r"'openvino' reads \.xml, not \.onnx"):
        artifact_path(tmp_path / "a.onnx", "openvino")


def test_the_unit_in_an_operator_s_name():
    assert unit_in("layer1.relu@Conv3_quant", {"layer1.relu"}) == "layer1.relu"
    assert unit_in("fc", {"fc"}) == "fc"
    assert unit_in("fused layer1.relu@Conv3", {"layer1.relu"}) == "layer1.relu"
    assert unit_in("Transpose_7", {"fc"}) == ""


def test_damaged_metadata_is_an_error_not_a_crash(tmp_path):
    path = onnx_file(tmp_path / "m.onnx", {"gracile.units": "[{"})
    with pytest.raises(UserError, match="damaged"):
        open_artifact(path)
    assert onnx.load(path)
