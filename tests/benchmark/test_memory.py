"""Peak memory is that of a process of its own, and grows with the network."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gracile.benchmark import memory
from gracile.benchmark.artifact import open_artifact
from gracile.benchmark.memory import peak_memory, resident
from gracile.errors import UserError

MIB = 1 << 20


def network(path, n):
    """x -> MatMul with an n x n matrix."""
    w = numpy_helper.from_array(np.ones((n, n), np.float32), "w")
    ends = [helper.make_tensor_value_info(k, TensorProto.FLOAT, ["b", n]) for k in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", *map(list, [
        ends[:1], ends[1:]]), [w])  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return open_artifact(path)


def test_a_network_of_64_mib_more_takes_so_much_more(tmp_path):
    small = peak_memory(network(tmp_path / "small.onnx", 16))
    large = peak_memory(network(tmp_path / "large.onnx", 4096))
    assert 64 * MIB < large.added_bytes - small.added_bytes < 300 * MIB
    assert small.peak_bytes > small.added_bytes > 0


def test_measuring_needs_no_torch(tmp_path):
    task = {"artifact": network(tmp_path / "m.onnx", 4).to_dict(), "settings": {"batch": 1}}
    code = (
        "import json, sys; from gracile.benchmark.memory import in_this_process; "
        f"in_this_process(json.loads({json.dumps(json.dumps(task))})); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_the_child_says_last_is_the_error(tmp_path):
    artifact = network(tmp_path / "m.onnx", 4)
    with pytest.raises(UserError, match=r"in a process of its own failed: .*no device 'NPU'"):
        peak_memory(artifact, device="NPU")


def test_what_is_no_whole_file_is_refused(tmp_path):
    artifact = dataclasses.replace(network(tmp_path / "m.onnx", 4), module=object())
    with pytest.raises(UserError, match="run by a module of this process"):
        peak_memory(artifact)


def test_elsewhere_than_on_linux_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    with pytest.raises(UserError, match="which only Linux has"):
        peak_memory(network(tmp_path / "m.onnx", 4))


def test_the_peak_is_never_below_what_is_there():
    assert resident("VmHWM") >= resident("VmRSS") > MIB
