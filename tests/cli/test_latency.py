"""`gracile latency`, on a network of a thousand parameters and tables made by hand."""

import time

import pytest

from gracile.benchmark.artifact import open_artifact
from gracile.benchmark.runtimes.base import load
from gracile.core.record import RecordLog
from gracile.latency.difference import Point
from gracile.latency.lowering import units_of
from gracile.latency.staircase import Stair
from gracile.latency.table import Network, Table
from gracile.latency.unit import Setting


@pytest.fixture
def table(finished, tmp_path):
    """A table in which each unit of the compressed run takes a quarter of a millisecond."""
    loaded = load(open_artifact(finished / "export/onnxruntime/compressed/model.onnx"))
    made, units = Table(), units_of(loaded)
    times = made.at(Setting.of(loaded))
    times.points |= {u: Point(0.25, 0.0, 1, time.time()) for _, u in units}
    times.networks["n"] = Network(1.0, 2.0, time.time())
    times.stairs["QLinearConv", "int8", 0] = Stair(8)
    made.save(tmp_path / "t.jsonl")
    return tmp_path / "t.jsonl", len(units)


def test_predict_as_json(as_json, table, tmp_path):
    path, n = table
    log = tmp_path / "records.jsonl"
    found = as_json("latency", "predict", "run", "--table", path, "--out", log)
    assert found["sum_ms"] == pytest.approx(0.25 * n)
    assert found["record"]["value"] == pytest.approx(0.5 * n)  # calibrated by one network
    assert found["record"]["kind"] == "predicted"
    assert found["units"] == {"measured": n}
    (record,) = RecordLog(log)
    assert record.value == found["record"]["value"]


def test_predict_names_units_and_an_interval(call, table):
    code, out, _ = call("latency", "predict", "run", "--table", table[0])
    assert code == 0
    assert "QLinearConv" in out
    assert "95 % within" in out


def test_another_setting_is_refused_with_the_way_out(call, table):
    code, _, err = call("latency", "predict", "run", "--table", table[0], "--threads", "2")
    assert code == 2
    assert "threads 1, not 2" in err
    code, _, _ = call(
        "latency", "predict", "run", "--table", table[0], "--threads", "2", "--anyway"
    )
    assert code == 0


def test_no_table_no_precision_no_artifact(call, table):
    assert "no such table" in call("latency", "predict", "run", "--table", "no.jsonl")[2]
    code, _, err = call(
        "latency", "predict", "net.py:Net?num_classes=5", "--table", table[0], "--precision", "int4"
    )
    assert (code, "f32 or int8" in err) == (2, True)
    err = call("latency", "predict", "run", "--table", table[0], "--runtime", "openvino")[2]
    assert "no compressed artifact for 'openvino'" in err


def test_show(call, as_json, table):
    found = as_json("latency", "show", "--table", table[0])
    (setting,) = found["settings"]
    assert setting["runtime"] == "onnxruntime"
    assert setting["calibration"]["a"] == 2.0
    out = call("latency", "show", "--table", table[0])[1]
    assert "QLinearConv int8, width 1: steps of 8" in out
    assert "1 network(s): 2.000 x sum" in out


@pytest.mark.slow
def test_measure_then_predict(call, as_json, tmp_path):
    path, model = tmp_path / "t.jsonl", "net.py:Net?num_classes=5"
    options = ("--runtime", "onnxruntime", "--table", path, "--shape", "3,32,32")
    found = as_json("latency", "measure", model, *options)
    assert found["units"] > 2
    assert found["refused"] == []
    again = as_json("latency", "measure", model, *options)
    assert again["units"] == 0
    predicted = as_json("latency", "predict", model, *options)
    assert predicted["record"]["value"] == pytest.approx(again["network_ms"], rel=1e-3)
