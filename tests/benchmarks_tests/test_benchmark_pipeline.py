"""The pipeline benchmark: what its processes say becomes Records and a row."""

from math import isnan

import pytest
from benchmarks import pipeline
from benchmarks.pipeline_nets import networks


@pytest.fixture
def steps(monkeypatch):
    """What the two processes of a network write."""
    said = {
        "cut": {"params": 100, "params_after": 30, "cut_s": 1.5},
        "ship": {
            "reload_equal": True,
            "parity": {"f32.openvino": True, "f32.onnxruntime": False},
            "f32.openvino.bytes": 2048,
            "problems": {"f32.onnxruntime": "unit 'a' differs"},
        },
    }
    monkeypatch.setattr(pipeline, "_step", lambda step, name, folder: said[step])
    return said


def test_a_network_is_measured_and_shown_in_one_row(steps):
    (cell,) = (c for c in pipeline.cells() if c.name == "lstm")
    records = cell.run()
    value = {r.metric: r.value for r in records}
    assert (value["params"], value["parity.f32.openvino"]) == (100, 1.0)
    assert (value["parity.f32.onnxruntime"], value["reload_equal"]) == (0.0, 1.0)
    *_, row = pipeline.table(records, {"lstm": cell.notes})
    assert row.startswith("| lstm | 100 → 30 | equal |")
    assert "ok, 2.00 KiB" in row
    assert "differs" in row
    assert "not asked" in row
    assert "f32.onnxruntime: unit 'a' differs" in row


def test_a_process_that_died_is_a_row_with_its_message(steps):
    steps["cut"] = {"text": "cut: exit code 1: MemoryError"}
    (cell,) = (c for c in pipeline.cells() if c.name == "unet")
    value = {r.metric: r.value for r in cell.run()}
    assert isnan(value["params"])
    assert value["parity.int8.openvino"] == 0.0
    *_, row = pipeline.table(cell.run(), {"unet": cell.notes})
    assert row.startswith("| unet |  | not equal | differs | differs |")
    assert row.endswith("| cut: exit code 1: MemoryError |")


def test_the_ten_networks_and_the_language_model_are_there():
    assert len(networks()) == 11
    assert [n for n, network in networks().items() if not network.quantize] == ["lstm"]
