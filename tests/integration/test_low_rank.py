"""Digits: a network is factorized during training, quantized and exported; the run says so."""

import json

import pytest

from gracile.cli.main import main

pytestmark = pytest.mark.slow

RECIPE = """
recipe: 1
train: {epochs: 6, batch_size: 64, augment: none, optimizer: {class: Adam, lr: 0.003}}
methods:
  conv: {lowrank: factorize, weights: conv2, scheme: tucker2, round_to: 1,
         rank: {name: fixed, ranks: [4, 8]}, when: {at: 3ep}}
  fc: {lowrank: factorize, weights: [fc1, fc2], rank: {name: params, ratio: 0.4}, when: {at: 3ep}}
  int8: {quantize: qat, when: {start: 5ep}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("low_rank")
    (folder / "r.yaml").write_text(RECIPE)
    call = [
        "compress", "simplenet_cifar", "--data", "digits", "--recipe", str(folder / "r.yaml"),
        "--out", str(folder / "run"), "--runtime", "onnxruntime", "--runtime", "openvino",
    ]  # fmt: skip
    assert main([*call, "--json"]) == 0
    return folder / "run"


def test_factors_are_in_the_plan_and_the_ledger(run):
    edits = json.loads((run / "plan.json").read_text())["edits"]
    made = [(e["at"], e["scheme"], e["ranks"]) for e in edits if e["kind"] == "factorize"]
    assert made[0] == ("conv2", "tucker2", [4, 8])
    assert [at for at, _, _ in made] == ["conv2", "fc1", "fc2"]
    on_grids = {e["at"] for e in edits if e["kind"] == "bits" and e["role"] == "weight"}
    assert {"conv2.0.weight", "conv2.1.weight", "conv2.2.weight", "fc1.0.weight"} <= on_grids
    rows = {r["name"]: r for r in json.loads((run / "ledger.json").read_text())["rows"]}
    assert (rows["conv2.1.weight"]["structure"], rows["conv2.1.weight"]["by"]) == (
        "factorized", "conv",
    )  # fmt: skip


def test_it_is_smaller_and_learns_and_runs_the_same(run):
    result = json.loads((run / "result.json").read_text())
    assert result["after"]["params"] < 0.5 * result["before"]["params"]
    assert result["after"]["top1"] > 0.7
    assert result["status"] == "ok"
    assert set(result["parity"]) == {"onnxruntime", "openvino"}


def test_the_run_is_exported_again_and_a_layer_comes_back(run, tmp_path, capsys):
    out = str(tmp_path / "again")
    assert main(["export", str(run), "--runtime", "onnxruntime", "--out", out]) == 0
    assert main(["undo", str(run), "--step", "conv"]) == 2
    assert "undo all of 'int8'" in capsys.readouterr().err
    undone = tmp_path / "undone"
    call = ["undo", str(run), "--step", "conv", "--step", "int8", "--out", str(undone)]
    assert main(call) == 0
    edits = json.loads((undone / "plan.json").read_text())["edits"]
    assert [e["at"] for e in edits] == ["fc1", "fc2"]
