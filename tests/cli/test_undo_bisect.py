"""`gracile undo` and `gracile bisect`, run for real on a run of a thousand parameters."""

import json

import pytest
import torch
from cli_case import compress
from safetensors.torch import load_file, save_file

from gracile.core.plan import Plan
from gracile.models.spec import resolve
from gracile.train.checkpoint import load_model


@pytest.fixture
def done(place, as_json):
    """A run that began from a weights file, in the folder "replayed", made once."""
    if not (place / "replayed").exists():
        torch.manual_seed(3)
        model = resolve(SPEC).model
        save_file(model.state_dict(), place / "begin.safetensors")
        as_json(*compress("both.yaml", "replayed", "--weights", "begin.safetensors"))
    return place / "replayed"


SPEC = "net.py:Net?num_classes=10"
FROM = ("--weights", "begin.safetensors")


def test_undo_measures_before_and_after_and_writes_a_model(done, as_json, place):
    found = as_json("undo", "replayed", "--step", "thin", *FROM, "--out", "whole")
    plan = Plan.load(done / "plan.json")
    assert [e["id"] for e in found["undone"]] == [e.id for e in plan.of_kind("remove")]
    assert found["edits"] == len(plan) - len(found["undone"])
    result = json.loads((done / "result.json").read_text())
    assert found["before"]["params"] == result["after"]["params"]
    assert found["after"]["params"] == result["before"]["params"]  # all channels are back
    stage = json.loads((done / "state" / "stages" / "compressed.json").read_text())
    assert found["before"]["loss"] == stage["val"]["loss"]
    assert found["max_error"] is None  # no cut is left that could be proven
    written = Plan.load(place / "whole" / "plan.json")
    assert {e.kind for e in written} == {"bits"}
    model = load_model(
        place / "whole",
        torch.zeros(2, 3, 32, 32),
        factory=lambda: resolve(SPEC),
    ).model
    assert model.get_parameter("stem.weight").shape[0] == 8


ATTENTIVE = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x)[0].mean(1))
"""


def test_undo_of_quantization_puts_a_layer_together_again(place, as_json):
    (place / "attentive.py").write_text(ATTENTIVE)
    spec = "attentive.py:Net?num_classes=10"
    torch.manual_seed(3)
    save_file(resolve(spec).model.state_dict(), place / "attentive.safetensors")
    run = compress("int8.yaml", "attentive", "--weights", "attentive.safetensors")
    dense = as_json(*[spec if a == "net.py:Net" else a for a in run])["before"]
    assert {e.kind for e in Plan.load(place / "attentive" / "plan.json")} == {"bits", "decompose"}
    found = as_json("undo", "attentive", "--step", "int8", "--weights", "attentive.safetensors",
                    "--out", "together")  # fmt: skip
    assert {e["kind"] for e in found["undone"]} == {"bits", "decompose"}
    assert found["edits"] == 0
    assert found["after"]["params"] == dense["params"]
    x = torch.zeros(2, 3, 32, 32)
    model = load_model(place / "together", x, factory=lambda: resolve(spec)).model
    whole = resolve(spec).model.eval()
    written = load_file(place / "together" / "model.safetensors")  # as they were before rounding
    rounded = load_file(place / "attentive" / "model.safetensors")["attention.in_proj_weight"]
    moved = (written["attention.in_proj_weight"] - rounded).abs().max()
    assert 0 < moved < float(rounded.abs().max()) / 127
    whole.load_state_dict(written)
    torch.testing.assert_close(model(x), whole(x))


def test_undo_without_out_writes_nothing_and_prints_a_table(done, call, place):
    before = sorted(place.rglob("*"))
    code, out, _ = call("undo", "replayed", "--step", "0", "--step", "int8", *FROM)
    assert code == 0
    for text in ("undone: e0 remove by thin: stem.weight dim 0: 8 -> 4", "top1", "params", "mixed"):
        assert text in out
    assert sorted(place.rglob("*")) == before


def test_bisect_prints_the_step_and_its_status_says_whether_there_is_one(done, call, as_json):
    code, out, _ = call("bisect", "replayed", "--max-drop", "1000", *FROM)
    assert code == 0
    assert "no step found after which top1 is off by more than 1000" in out
    found = as_json(
        "bisect", "replayed", "--metric", "loss", "--max-drop=-1000", *FROM, code=1
    )  # every state exceeds it: the first is named
    assert found["status"] == "drop exceeded"
    assert found["found"]["kind"] == "original"
    assert found["found"]["loss"] == found["base"]
    rows = as_json("bisect", "replayed", "--every", "--max-drop", "1000", *FROM)["rows"]
    assert len(rows) == len(Plan.load(done / "plan.json")) + 2
    assert all(set(r) == {"step", "id", "kind", "by", "what", "top1", "drop"} for r in rows)


def test_bisect_names_the_edit(done, call, as_json, place):
    at_end = ("train.epochs=0", "methods.filters.when.at=end", "methods.thin.when.at=end")
    more = [x for value in at_end for x in ("--set", value)]
    as_json(*compress("both.yaml", "untrained", *FROM, *more))
    argv = ("bisect", "untrained", "--metric", "loss", "--every", *FROM)
    rows = as_json(*argv, "--max-drop", "99")["rows"]
    assert [r["step"] for r in rows] == [None, *range(len(rows) - 1)]
    limit = max(r["drop"] for r in rows) / 2
    assert limit > 0  # with these weights the cuts raise the loss
    first = next(r for r in rows if r["drop"] > limit)
    code, out, _ = call(*argv, "--max-drop", str(limit))
    assert code == 1
    assert f"{first['id']} ({first['kind']}), loss off by {first['drop']:.3g}" in out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("undo", "replayed", "--step", "99", *FROM), "no step '99': the plan has the edits 0 to"),
        (("undo", "replayed", "--step", "0"), "name it again with --weights FILE"),
        (("undo", "replayed", *FROM), "--step"),
        (("undo", "replayed", "--step", "0", *FROM, "--out", "replayed"), "is there already"),
        (("undo", "nothing", "--step", "0"), "nothing: not a finished run"),
        (("bisect", "replayed", *FROM), "--max-drop"),
        (("bisect", "replayed", "--max-drop", "1", "--metric", "f1", *FROM), "one of top1"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_user_errors_are_one_message_and_status_2(argv, text, done, call):
    code, out, err = call(*argv)
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err
