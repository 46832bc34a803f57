"""`recipe convert` on a configuration of NNCF, and a run that goes by its accuracy."""

import json

import pytest
from cli_case import HEAD, compress

from gracile.recipe import load

NET = "net.py:Net?num_classes=10"
CONFIG = """{
    "model": "net", "epochs": 3, "batch_size": 32,  // of the script
    "input_info": {"sample_size": [1, 3, 32, 32]},
    "compression": [
        {"algorithm": "filter_pruning", "params": {"pruning_steps": 2}},
        {"algorithm": "quantization", "ignored_scopes": ["{re}Linear.*head"]}
    ],
}
"""
ACCURACY = "accuracy: {mode: adaptive, max_drop: 100, max_level: 0.6, patience: 1}\nmethods:\n"
MASK = "  mask: {prune: oneshot, weights: head, sparsity: 0.5, when: {at: 0ep}}\n"


def test_a_configuration_of_nncf_becomes_a_recipe(call, as_json, place):
    (place / "old.json").write_text(CONFIG)
    code, out, err = call("recipe", "convert", "old.json")
    assert (code, out) == (2, "")
    assert "old.json:6: compression.1.ignored_scopes has '{re}Linear.*head'" in err
    assert "--model MODEL" in err
    code, out, err = call("recipe", "convert", "old.json", "--model", NET, "--out", "new.yaml")
    assert (code, out) == (0, "new.yaml: 3 method(s)\n")
    assert "warning nncf: old.json:2: model is the script's own" in err
    recipe = load(place / "new.yaml")
    assert recipe.train.epochs == 3
    assert recipe.methods["filter_pruning"].options.weights == ("type:_ConvNd", "!stem")
    assert recipe.methods["quantization"].options.weights[-1] == "!head"
    assert call("recipe", "check", "new.yaml", "--model", "net.py:Net")[0] == 0
    found = as_json("recipe", "convert", "old.json", "--model", NET, "--epochs", "5")
    assert found["recipe"]["train"]["epochs"] == 5
    assert {w["code"] for w in found["warnings"]} == {"nncf"}


def test_a_run_goes_by_its_accuracy_and_may_be_resumed(as_json, place):
    (place / "aware.yaml").write_text(HEAD.replace("methods:\n", ACCURACY) + MASK)
    first = as_json(*compress("aware.yaml", "aware"))
    history = json.loads((place / "aware" / "history.json").read_text())["curves"]
    assert [round(level, 3) for _, level in history["accuracy/level"]] == [0.5, 0.6]
    (edit,) = json.loads((place / "aware" / "plan.json").read_text())["edits"]
    assert edit["sparsity"] == pytest.approx(48 / 80)  # of the head's 10 x 8 weights
    (place / "aware" / "state" / "stages" / "finish.json").unlink()
    again = as_json(*compress("aware.yaml", "aware", "--resume"))
    assert again["after"] == first["after"]
