"""Digits: exits are trained, pruned or quantized with the network, exported and timed on images."""

import json

import pytest

from gracile.cli.main import main

pytestmark = pytest.mark.slow

RECIPE = """
recipe: 1
train: {epochs: 5, batch_size: 64, augment: none, optimizer: {class: Adam, lr: 0.003}}
methods:
  cut: {prune: structure, ratio: 0.2, target: macs, when: {at: 1ep}}
  exits: {early_exit: branches, at: [relu_conv2, relu_fc1], goal: {mean_cost: 0.98},
          when: {at: 2ep}}
  int8: {quantize: ptq, when: {at: end}}
"""


@pytest.fixture(scope="module", params=["floats", "integers"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("early_exit")
    lines = [x for x in RECIPE.splitlines() if request.param == "integers" or "int8" not in x]
    (folder / "r.yaml").write_text("\n".join(lines))
    call = [
        "compress", "simplenet_cifar", "--data", "digits", "--recipe", str(folder / "r.yaml"),
        "--out", str(folder / "run"), "--runtime", "onnxruntime", "--runtime", "openvino",
    ]  # fmt: skip
    assert main([*call, "--json"]) == 0
    return folder / "run", request.param


def test_the_result_tells_rates_accuracy_and_latency(run):
    result = json.loads((run[0] / "result.json").read_text())
    assert result["after"]["top1"] > 0.7
    exits = result["exits"]
    assert sum(exits["rates"]) == pytest.approx(1)
    assert exits["mean_macs"] < 1.05 * exits["macs"][-1]
    assert len(exits["macs"]) == len(exits["rates"]) == len(exits["accuracy"]) == 3
    assert exits["curve"][0]["mean_cost"] < exits["curve"][-1]["mean_cost"]
    for runtime in ("onnxruntime", "openvino"):
        assert exits["runtimes"][runtime] == pytest.approx(exits["rates"], abs=0.02)
        assert result["after"]["accuracy"][runtime] == pytest.approx(
            result["after"]["top1"], abs=0.02
        )
        times = result["after"]["latency_records"][runtime]
        assert times["metric"] == "mean_latency_ms"
        assert times["p95"] >= times["median"] > 0
        assert result["parity"][runtime]["ok"]
    if run[1] == "integers":
        assert result["kernels"]["onnxruntime"]["convolutions_integer"] > 0


def test_the_cascade_is_in_the_folder_and_the_report_says_so(run):
    facts = json.loads((run[0] / "export/openvino/compressed/cascade.json").read_text())
    assert [stage["threshold"] is None for stage in facts["stages"]] == [False, False, True]
    assert facts["precision"] == ("int8" if run[1] == "integers" else "f32")
    assert "mean over inputs" in (run[0] / "report.html").read_text()


def test_the_run_is_exported_again_timed_and_undo_says_why_not(run, tmp_path, capsys):
    out = str(tmp_path / "again")
    assert main(["export", str(run[0]), "--runtime", "onnxruntime", "--out", out]) == 0
    assert main(["benchmark", str(run[0]), "--runtime", "onnxruntime", "--rounds", "5"]) == 0
    assert main(["undo", str(run[0]), "--step", "exits"]) == 2
    assert "of kind 'exit', which this version cannot replay" in capsys.readouterr().err


def test_a_runtime_that_cannot_stop_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE)
    call = [
        "compress", "simplenet_cifar", "--data", "digits", "--recipe", str(tmp_path / "r.yaml"),
        "--out", str(tmp_path / "run"), "--runtime", "pytorch",
    ]  # fmt: skip
    assert main(call) == 2
    assert "runs in onnxruntime and openvino, not in 'pytorch'" in capsys.readouterr().err
