"""`kill -9` at any moment, then `--resume`: the same weights, bit for bit, and every Record once."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).with_name("kill_driver.py")
NET = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.outer = nn.Conv2d(16, 16, 3, padding=1)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu(x + self.outer(self.relu(self.bn2(self.inner(x)))))
        return self.head(self.drop(self.pool(x).flatten(1)))
"""
RECIPE = """
recipe: 1
train: {epochs: 4, batch_size: 32, optimizer: {class: SGD, lr: 0.05, momentum: 0.9},
        lr: {class: OneCycleLR, max_lr: 0.05}}
data: {train: "train[:160]", val: "train[160:200]", test: "test[:60]", calibration: 100}
methods:
  filters: {prune: gradual, weights: "type:Conv2d", granularity: filter,
            sparsity: {ramp: cubic, initial: 0.1, final: 0.5},
            when: {start: 0ep, stop: 2ep, every: 2it}}
  thin: {prune: thin, when: {at: 2ep}}
  teacher: {distill: kd}
  int8: {quantize: ptq, when: {at: end}}
"""
# where: (module, function, call at which it dies)
MOMENTS = {
    "training": ("gracile.train.loop", "average_gradients", 8),
    "surgery": ("gracile.graph.surgery", "_cut", 30),
    "calibration": ("gracile.quantize.methods.ptq", "Ptq.on_calibrate", 2),
    "writing the model": ("gracile.train.checkpoint", "write_json", 1),
    "export": ("gracile.train.run", "_Run._load", 2),
    "evaluation": ("gracile.train.run", "agreement", 3),
    "benchmark": ("gracile.train.run", "time_side_by_side", 1),
    "report": ("gracile.report.html", "write", 1),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    (folder / "net.py").write_text(NET)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def command(place: Path, out: str, *, bomb=(), resume=False) -> list[str]:
    return [
        *(sys.executable, str(DRIVER), *map(str, bomb), "--"),
        *("compress", "net.py:Net", "--data", "digits", "--recipe", "recipe.yaml", "--out", out),
        *("--runtime", "onnxruntime", "--json"),
        *(["--resume"] if resume else []),
    ]


def start(place: Path, *args, **kwargs) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        command(place, *args, **kwargs),
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(place: Path, out: str, **kwargs) -> None:
    process = start(place, out, **kwargs)
    text, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    assert json.loads(text)["status"] == "ok"


@pytest.fixture(scope="module")
def whole(place):
    begin = time.monotonic()
    finish(place, "whole")
    return place / "whole", time.monotonic() - begin


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("model.safetensors",):
        one, other = load_file(a / name), load_file(b / name)
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key
    assert (a / "plan.json").read_bytes() == (b / "plan.json").read_bytes()
    assert (a / "history.json").read_bytes() == (b / "history.json").read_bytes()
    assert (a / "ledger.json").read_bytes() == (b / "ledger.json").read_bytes()
    ids = [
        [json.loads(line)["id"] for line in (x / "records.jsonl").read_text().splitlines()]
        for x in (a, b)
    ]
    assert len(ids[0]) == len(set(ids[0]))
    assert sorted(ids[0]) == sorted(ids[1])
    assert (b / "report.html").stat().st_size > 10_000
    assert not list(b.rglob("*.tmp"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_in(moment, place, whole):
    out = moment.replace(" ", "-")
    process = start(place, out, bomb=MOMENTS[moment])
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, "the bomb did not go off"
    finish(place, out, resume=True)
    assert_same_run(whole[0], place / out)


@pytest.mark.parametrize("number", range(5))
def test_killed_at_a_random_moment(number, place, whole):
    out = f"random{number}"
    delay = random.Random(number).uniform(0.1, 0.95) * whole[1]
    process = start(place, out)
    time.sleep(delay)
    process.kill()
    process.communicate()
    finish(place, out, resume=True)
    assert_same_run(whole[0], place / out)


def test_two_whole_runs_are_the_same(place, whole):
    finish(place, "again")
    assert_same_run(whole[0], place / "again")
