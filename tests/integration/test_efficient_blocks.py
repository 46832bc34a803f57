"""Digits: a trained network gets cheaper blocks, learns from itself, is quantized and exported."""

import json

import pytest

from gracile.cli.main import main

pytestmark = pytest.mark.slow

TRAIN = "batch_size: 64, augment: none, optimizer: {class: Adam, lr: 0.003}"
TEACHER = f"recipe: 1\ntrain: {{epochs: 5, {TRAIN}}}\n"
RECIPE = f"""
recipe: 1
train: {{epochs: 6, {TRAIN}}}
methods:
  conv: {{lowrank: replace, weights: conv2, fit: true, when: {{at: 0ep}},
         block: {{name: separable, norm: true, activation: relu}}}}
  head: {{lowrank: replace, weights: fc1, block: global_pool, fit: true, when: {{at: 1ep}}}}
  kd: {{distill: kd, temperature: 3, alpha: 0.3}}
  int8: {{quantize: qat, when: {{start: 5ep}}}}
"""


def compress(folder, recipe, out, *more):
    (folder / f"{out}.yaml").write_text(recipe)
    call = [
        "compress", "simplenet_cifar", "--data", "digits", "--recipe", str(folder / f"{out}.yaml"),
        "--out", str(folder / out), "--json", *more,
    ]  # fmt: skip
    assert main(call) == 0
    return folder / out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    weights = compress(folder, TEACHER, "teacher") / "model.safetensors"
    runtimes = ["--runtime", "onnxruntime", "--runtime", "openvino"]
    return compress(folder, RECIPE, "run", "--weights", str(weights), *runtimes)


def test_blocks_are_in_the_plan_the_ledger_and_on_grids(run):
    edits = json.loads((run / "plan.json").read_text())["edits"]
    made = [(e["at"], e["with"], e["by"]) for e in edits if e["kind"] == "replace"]
    assert made == [("conv2", "separable", "conv"), ("fc1", "global_pool", "head")]
    assert edits[1]["args"] == {"image": [16, 5, 5], "linear": True}
    on_grids = {e["at"] for e in edits if e["kind"] == "bits" and e["role"] == "weight"}
    assert {"conv2.0.weight", "conv2.3.weight", "fc1.3.weight"} <= on_grids
    rows = {r["name"]: r for r in json.loads((run / "ledger.json").read_text())["rows"]}
    assert (rows["fc1.3.weight"]["structure"], rows["fc1.3.weight"]["by"]) == ("replaced", "head")


def test_it_is_smaller_and_learns_and_runs_the_same(run):
    result = json.loads((run / "result.json").read_text())
    assert result["after"]["params"] < 0.3 * result["before"]["params"]
    assert result["after"]["macs"] < 0.75 * result["before"]["macs"]
    assert result["after"]["top1"] > 0.7
    assert result["status"] == "ok"
    assert set(result["parity"]) == {"onnxruntime", "openvino"}


def test_the_run_is_exported_again_and_undo_says_why_not(run, tmp_path, capsys):
    out = str(tmp_path / "again")
    assert main(["export", str(run), "--runtime", "onnxruntime", "--out", out]) == 0
    weights = str(run.parent / "teacher" / "model.safetensors")
    assert main(["undo", str(run), "--step", "conv", "--weights", weights]) == 2
    assert "of kind 'replace', which this version cannot replay" in capsys.readouterr().err
