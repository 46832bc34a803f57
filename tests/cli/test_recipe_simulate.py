"""`gracile recipe simulate`: its table, its JSON and what it refuses."""

import pytest
import torch
from safetensors.torch import save_file

from gracile.models.spec import resolve

NET = "net.py:Net?num_classes=5"  # 861 parameters, 832 of them weights, 50,728 MACs
RECIPE = """\
recipe: 1
train: {epochs: 4, optimizer: {class: SGD, lr: 0.4}, lr: {class: StepLR, step_size: 3}}
methods:
  few: {prune: oneshot, weights: inner, sparsity: 0.25, when: {at: 1ep}}
  filters: {prune: oneshot, weights: stem, granularity: filter, sparsity: 0.5, when: {at: 120it}}
  thin: {prune: thin, when: {at: end}}
  kd: {distill: kd}
"""


@pytest.fixture
def simulate(place):
    """Arguments of the command, with the recipe above."""
    (place / "simulate.yaml").write_text(RECIPE)
    return ("recipe", "simulate", "simulate.yaml", "--model", NET)


def test_json_lists_the_epochs_and_totals(simulate, as_json):
    found = as_json(*simulate)
    assert found["status"] == "ok"
    assert (found["recipe"], found["model"], found["steps"]) == ("simulate.yaml", NET, 100)
    assert [e["epoch"] for e in found["epochs"]] == [0, 1, 2, 3]
    assert found["epochs"][0].keys() == {
        "epoch", "learning_rate", "fired", "params", "nnz", "sparsity", "macs", "macs_nonzero",
    }  # fmt: skip
    assert found["end"].keys() == found["epochs"][0].keys()
    rates = [e["learning_rate"] for e in found["epochs"]]
    assert rates == pytest.approx([0.4, 0.4, 0.4, 0.04])
    kd = {"id": "kd", "method": "distill: kd", "times": 0, "progress": None, "levels": {}}
    assert found["epochs"][0]["fired"] == [kd]
    assert found["epochs"][1]["fired"] == [
        {"id": i, "method": "prune: oneshot", "times": 1, "progress": 1.0, "levels": levels}
        for i, levels in (("few", {"sparsity": 0.25}), ("filters", {"sparsity": 0.5}))
    ] + [kd]
    assert [e["params"] for e in found["epochs"]] == [861] * 4
    assert found["epochs"][0]["nnz"] == found["before"]["nnz"] == 861
    left = 861 - 4 * 27 - 2 * 4 - 8 * 4 * 9  # 4 filters of the stem: weights, BatchNorm, readers
    assert found["totals"].keys() == {"params", "nnz", "macs_before", "macs_after"}
    assert found["totals"]["params"] == found["end"]["params"] == left
    assert found["totals"]["macs_before"] == 64 * (216 + 576) + 40
    assert found["totals"]["macs_after"] == 64 * (108 + 288) + 40
    assert found["epochs"][3]["nnz"] == found["totals"]["nnz"] < left
    assert found["not_simulated"] == ["kd"]
    assert [w["code"] for w in found["warnings"]] == ["not-simulated", "fresh-weights"]


def test_the_table_tells_the_same(simulate, call, monkeypatch):
    monkeypatch.setattr("gracile.cli.output.out.width", 120)
    code, out, _ = call(*simulate, "--runtime", "openvino")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[1] == "start 0.00 % 861 861 50.73 k"
    assert lines[2] == "0 kd* 0.00 % 861 861 50.73 k 0.4"
    assert lines[3].startswith("1 few sparsity 0.25, filters sparsity 0.5, kd*")
    assert lines[4].startswith("2 kd*")
    assert lines[5].startswith("3 kd*")
    assert lines[5].endswith("0.04")
    assert lines[6].startswith("end thin")
    assert lines[7] == "* not simulated: needs data or training"
    assert lines[8].startswith(f"simulate.yaml on {NET}, 100 mini-batches per epoch: 50.73 k MACs")
    warnings = [line.split(":")[0] for line in lines if line.startswith("warning")]
    assert warnings == [
        f"warning {code}"
        for code in ("not-simulated", "zeros-no-speed", "uneven-widths", "fresh-weights")
    ]


def test_epochs_that_are_alike_share_a_row(simulate, call):
    code, out, _ = call(*simulate, "--set", "train.lr=null", "--epochs", "9")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if "kd*" in line and "few" not in line][
        -1
    ] == "2-8"


def test_epochs_steps_shape_and_set(simulate, as_json):
    more = ("--set", "methods.few=null", "--epochs", "2", "--steps", "200", "--shape", "3,64,64")
    found = as_json(*simulate, *more)
    assert [[f["id"] for f in e["fired"]] for e in found["epochs"]] == [["filters", "kd"], ["kd"]]
    assert found["totals"]["macs_before"] == 4 * 64 * (216 + 576) + 40


def test_a_language_model_is_counted_as_distiller_counts_it(as_json, place):
    few = "{prune: oneshot, weights: encoder, sparsity: 0.5, when: {at: 1ep}}"
    text = f"recipe: 1\ncompat: strict\ntrain: {{epochs: 2}}\nmethods: {{few: {few}}}\n"
    (place / "words.yaml").write_text(text)
    model = "word_lstm?num_classes=100&embedding=20&hidden=20"
    words = ("recipe", "simulate", "words.yaml", "--model", model, "--shape", "5")
    strict, ours = as_json(*words), as_json(*words, "--set", "compat=none")
    table, lstm, biases = 100 * 20, 2 * 2 * 4 * 20 * 20, 2 * 2 * 4 * 20 + 100
    assert strict["totals"]["params"] == 2 * table + lstm  # the tied table under both names
    assert strict["totals"]["nnz"] == 2 * table + lstm - 2 * 1000
    assert ours["totals"]["params"] == table + lstm + biases
    assert ours["totals"]["nnz"] == table + lstm + biases - 1000
    assert strict["totals"]["macs_before"] == table  # of the linear layer, one for each weight


def test_it_starts_from_the_weights_it_is_given(simulate, as_json, place):
    state = resolve(NET).model.state_dict()
    state["stem.weight"][:5] = 0
    state["inner.weight"].fill_(1.0)
    state["inner.weight"].flatten()[::4] = 0  # what `few` prunes
    save_file(state, place / "zeros.safetensors")
    found = as_json(*simulate, "--weights", "zeros.safetensors", "--set", "methods.filters=null")
    assert found["before"]["nnz"] == 861 - 5 * 27 - 144
    assert found["epochs"][1]["nnz"] == found["before"]["nnz"]
    assert "fresh-weights" not in [w["code"] for w in found["warnings"]]


def test_fresh_weights_are_those_that_compress_begins_with(simulate, as_json):
    value = "methods.few={prune: threshold, weights: stem, threshold: 0.1, when: {at: 0ep}}"
    first, again = (as_json(*simulate, "--set", value)["totals"]["nnz"] for _ in range(2))
    other = as_json(*simulate, "--set", value, "--set", "seed=1")["totals"]["nnz"]
    assert first == again != other
    torch.manual_seed(5)
    assert as_json(*simulate, "--set", value)["totals"]["nnz"] == first


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--runtime", "openvin"), "unknown runtime 'openvin'. Nearest: 'openvino'"),
        (("--shape", "3,x"), "--shape must be like 3,32,32"),
        (("--weights", "none.safetensors"), "none.safetensors: no such file"),
        (("--epochs", "1"), "'few': when {at: 1ep} never fires"),
        (("--steps", "20"), "'filters': when {at: 120it} never fires"),
        (("--set", "methods.few.weights=iner"), "'few': 'iner' matches no tensor"),
        (("--steps", "0"), "--steps"),
        (("--model", "resnet21"), "resnet21"),
    ],
    ids=lambda v: v[0].strip("-") if isinstance(v, tuple) else "",
)
def test_what_cannot_be_is_refused(simulate, call, more, text):
    code, out, err = call(*simulate, *more)
    assert (code, out) == (2, "")
    assert text in err


def test_recipe_and_model_are_needed(call, place):
    assert call("recipe", "simulate", "nothing.yaml", "--model", NET)[0] == 2
    code, _, err = call("recipe", "simulate", "small.yaml")
    assert code == 2
    assert "--model" in err
