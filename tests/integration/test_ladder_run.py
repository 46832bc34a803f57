"""A recovery ladder on real digits, as a run: recipe, result, Records, report, and a kill."""

import json

import pytest

from gracile.cli.main import main
from gracile.core.record import RecordLog
from gracile.train import tuning

pytestmark = pytest.mark.slow

NET = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        layers = []
        for wide, width in ((3, 16), (16, 24)):
            layers += [nn.Conv2d(wide, width, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(96, num_classes)

    def forward(self, x):
        return self.head(self.pool(self.body(x)).flatten(1))
"""
TRAIN = "batch_size: 64, optimizer: {class: SGD, lr: 0.05, momentum: 0.9}"
DENSE = f"recipe: 1\ntrain: {{epochs: 8, {TRAIN}, lr: {{class: OneCycleLR, max_lr: 0.05}}}}\n"
RECIPE = f"""
recipe: 1
train: {{epochs: 0, {TRAIN}}}
methods:
  cut: {{prune: structure, ratio: 0.4, when: {{at: end}}}}
  int8: {{quantize: ptq, bits: 4}}
  ladder: {{recover: ladder, max_drop: 0.5, epochs: 3}}
"""


def compress(recipe, out, *options):
    path = out.parent / f"{out.name}.yaml"
    path.write_text(recipe)
    main(["compress", f"{out.parent / 'net.py'}:Net?num_classes=10", "--data", "digits",
          "--recipe", str(path), "--out", str(out), *map(str, options)])  # fmt: skip
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    (folder / "net.py").write_text(NET)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        compress(DENSE, folder / "dense")
        yield folder


@pytest.fixture(scope="module")
def found(place):
    return compress(RECIPE, place / "run", "--weights", place / "dense" / "model.safetensors")


def test_the_ladder_brings_the_accuracy_back_and_says_at_what_cost(place, found):
    (climbed,) = found["ladder"]
    assert climbed["before"] < climbed["dense"] - 0.05
    assert climbed["after"] > climbed["before"]
    assert climbed["after"] == pytest.approx(found["stages"]["recovered"]["top1"])
    log = RecordLog(place / "run" / "records.jsonl")
    taken = [r for r in climbed["rungs"] if r["after"] is not None]
    for metric, key in (("rung_gain", "gain"), ("rung_images", "images")):
        records = log.find(metric)
        assert [r.value for r in records] == [r[key] for r in taken]
    assert {r.unit for r in log.find("rung_gain")} == {"points"}


def test_the_report_has_the_table(place, found):
    main(["report", str(place / "run")])
    page = (place / "run" / "report.html").read_text()
    assert "Recovery ladder" in page
    for row in found["ladder"][0]["rungs"]:
        assert row["rung"] in page


def test_a_run_killed_in_a_rung_goes_on_to_the_same(place, found, monkeypatch):
    out, weights = place / "killed", place / "dense" / "model.safetensors"
    step, calls = tuning.Tuning._step, []

    def dying(*args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tuning.Tuning, "_step", dying)
        with pytest.raises((KeyboardInterrupt, FileNotFoundError)):
            compress(RECIPE, out, "--weights", weights)
    again = compress(RECIPE, out, "--weights", weights, "--resume")
    for a, b in zip(again["ladder"][0]["rungs"], found["ladder"][0]["rungs"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    one, other = (p / "model.safetensors" for p in (out, place / "run"))
    assert one.read_bytes() == other.read_bytes()
