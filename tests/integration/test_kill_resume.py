"""`kill -9` at any moment, then `--resume`: the same weights bit for bit, and every Record once."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from kill_driver import Bomb, Process
from safetensors.torch import load_file

from gracile.cli.main import main

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
STEPS = 5  # mini-batches per epoch: 160 images in batches of 32
RECIPE = """
recipe: 1
train: {epochs: 4, batch_size: 32, optimizer: {class: SGD, lr: 0.05, momentum: 0.9},
        lr: {class: OneCycleLR, max_lr: 0.05}}
data: {train: "train[:160]", val: "train[160:200]", test: "test[:60]", calibration: 150}
methods:
  filters: {prune: gradual, weights: "type:Conv2d", granularity: filter,
            sparsity: {ramp: cubic, initial: 0.1, final: 0.5},
            when: {start: 0ep, stop: 2ep, every: 2it}}
  thin: {prune: thin, when: {at: 2ep}}
  teacher: {distill: kd}
  int8: {quantize: ptq, when: {at: end}}
"""
LIGHT = ()  # nothing to export: a run takes a second or two
REAL = ("openvino", "onnxruntime")

EARLY = {
    "in mid-epoch 2": Bomb("gracile.train.loop:average_gradients", STEPS + 3),
    "in surgery, proven and half cut": Bomb(
        "gracile.graph.surgery:replace_data", 4, after="gracile.graph.verify:prove"
    ),
    "in the second calibration batch": Bomb("gracile.quantize.methods.ptq:Ptq.on_calibrate", 2),
    "with half of model.safetensors written": Bomb(
        "gracile.core.state:os.replace", after="gracile.train.session:Session.finish"
    ),
    "between model.safetensors and model.json": Bomb("gracile.train.checkpoint:write_json"),
    "in evaluation": Bomb("gracile.train.run:score", after="gracile.train.run:save_model"),
    "before the report is written": Bomb("gracile.report.html:write_atomic"),
}
LATE = {
    "between the files of one artifact": Bomb(
        "gracile.core.state:os.replace", 2, after="gracile.train.run:_Run.compressed"
    ),
    "between the artifacts of one runtime": Bomb("gracile.export.parity:check", 2),
    "between two runtimes": Bomb("gracile.train.run:_Run.export", 2),
    "in evaluation": Bomb("gracile.train.run:predict", 2),
    "in the benchmark": Bomb("gracile.benchmark.runtimes.base:Loaded.time", 9),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the network and the recipe."""
    folder = tmp_path_factory.mktemp("kill")
    (folder / "net.py").write_text(NET)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def arguments(out: str, runtimes=LIGHT, *more: str) -> list[str]:
    return [
        *("compress", "net.py:Net", "--data", "digits", "--recipe", "recipe.yaml", "--out", out),
        *(x for r in runtimes for x in ("--runtime", r)),
        *("--json", *more),
    ]


def finish(place: Path, out: str, runtimes=LIGHT, *more: str) -> None:
    process = Process(place, out, arguments(out, runtimes, *more))
    assert process.wait() == 0, process.errors[-3000:]
    assert json.loads(process.output)["status"] == "ok"


def explode(place: Path, out: str, bomb: Bomb, runtimes=LIGHT, *more: str) -> None:
    process = Process(place, out, arguments(out, runtimes, *more), bomb)
    assert process.wait() == -signal.SIGKILL, f"the bomb did not go off: {process.errors[-3000:]}"


@pytest.fixture(scope="module")
def light(place):
    """An uninterrupted run, measured in PyTorch only."""
    finish(place, "light")
    return place / "light"


@pytest.fixture(scope="module")
def real(place):
    """An uninterrupted run for two real runtimes, and the seconds it took."""
    begin = time.monotonic()
    finish(place, "real", REAL)
    return place / "real", time.monotonic() - begin


def ids(run: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (run / "records.jsonl").read_text().splitlines()]


def files(run: Path) -> set[str]:
    return {str(p.relative_to(run)) for p in run.rglob("*")}


def assert_same_run(whole: Path, other: Path) -> None:
    """Weights, decisions and predictions bit for bit; every Record once; no file more or less."""
    for name in ("model", "state/predictions-dense", "state/predictions-compressed"):
        a, b = (load_file(x / f"{name}.safetensors") for x in (whole, other))
        assert a.keys() == b.keys()
        assert [k for k in a if not torch.equal(a[k], b[k])] == []
    for name in ("plan.json", "model.json", "recipe.yaml", "history.json", "ledger.json"):
        assert (whole / name).read_bytes() == (other / name).read_bytes(), name
    assert len(ids(other)) == len(set(ids(other)))
    assert sorted(ids(other)) == sorted(ids(whole))
    assert files(other) == files(whole)
    assert [f for f in files(other) if Path(f).name.startswith(".")] == []
    assert (other / "report.html").stat().st_size > 10_000
    a, b = (json.loads((x / "result.json").read_text()) for x in (whole, other))
    for key in ("drop_points", "stages", "agreement", "kernels", "layers", "ledger"):
        assert a[key] == b[key], key


def test_killed_at_every_step_of_one_run(place, light):
    """One run that dies seven times, each time a bit later."""
    for n, bomb in enumerate(EARLY.values()):
        explode(place, "often", bomb, LIGHT, *(["--resume"] if n else []))
    finish(place, "often", LIGHT, "--resume")
    assert_same_run(light, place / "often")


@pytest.mark.slow
@pytest.mark.parametrize("moment", EARLY)
def test_killed(moment, place, light):
    out = moment.replace(" ", "-")
    explode(place, out, EARLY[moment])
    finish(place, out, LIGHT, "--resume")
    assert_same_run(light, place / out)


@pytest.mark.slow
@pytest.mark.parametrize("moment", LATE)
def test_killed_with_real_runtimes(moment, place, real):
    out = "real-" + moment.replace(" ", "-")
    explode(place, out, LATE[moment], REAL)
    finish(place, out, REAL, "--resume")
    assert_same_run(real[0], place / out)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
def test_killed_from_outside_at_a_random_moment(number, place, real):
    delay, out = random.Random(number).uniform(0.02, 0.98) * real[1], f"random{number}"
    process = Process(place, out, arguments(out, REAL))
    while process.ended_within(delay):  # the machine was faster this time
        shutil.rmtree(place / out)
        delay /= 2
        process = Process(place, out, arguments(out, REAL))
    process.kill()
    finish(place, out, REAL, "--resume")
    assert_same_run(real[0], place / out)


def test_two_uninterrupted_runs_are_the_same(place, light):
    finish(place, "again")
    assert_same_run(light, place / "again")


# ------------------------------------------------------------------ what --resume refuses


@pytest.fixture
def copy(place, light, monkeypatch):
    """A finished run that may be changed; commands run where the network is."""
    monkeypatch.chdir(place)
    shutil.rmtree(place / "copy", ignore_errors=True)
    shutil.copytree(light, place / "copy")
    return place / "copy"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ((), "already holds a run; continue it with --resume or choose another --out"),
        (("--resume", "--threads", "2"), "is a run with threads 1, not 2"),
        (("--resume", "--hint", "bf16"), "is a run with hint 'f32', not 'bf16'"),
        (("--resume", "--batch", "4"), "is a run with batch 1, not 4"),
        (("--resume", "--runtime", "openvino"), "is a run with runtimes [], not ['openvino']"),
        (("--resume", "--data", "digits?"), "is a run with data 'digits', not 'digits?'"),
        (("--resume", "--set", "train.epochs=5"), "train.epochs is 4 there and 5 here"),
        (("--resume", "--set", "seed=1"), "seed is 0 there and 1 here"),
        (("--resume", "--set", "data.val=30"), "data.val is train[160:200] there and 30 here"),
        (("--resume", "--weights", "copy/model.safetensors"), "does not fit Net"),
    ],
)
def test_another_run_is_not_continued(more, reason, copy, capsys):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert main(arguments("copy", LIGHT, *more)) == 2
    out, err = capsys.readouterr()
    assert reason in err
    assert json.loads(out)["exit"] == 2
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


def test_a_changed_network_file_is_noticed(place, copy, capsys):
    (place / "net.py").write_text(NET.replace("Dropout(0.1)", "Dropout(0.5)"))
    try:
        assert main(arguments("copy", LIGHT, "--resume")) == 2
    finally:
        (place / "net.py").write_text(NET)
    assert "is a run with model_code" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_a_folder_with_other_files_is_refused(more, copy, place, capsys):
    (place / "letters").mkdir(exist_ok=True)
    (place / "letters" / "mine.txt").write_text("mine")
    assert main(arguments("letters", LIGHT, *more)) == 2
    assert "not empty and holds no run (it has 'mine.txt')" in capsys.readouterr().err
    assert files(place / "letters") == {"mine.txt"}


def test_a_torn_last_record_is_measured_again(copy, light, capsys):
    (copy / "result.json").unlink()
    (copy / "state" / "stages" / "compressed.json").unlink()
    text = (copy / "records.jsonl").read_text()
    (copy / "records.jsonl").write_text(text[:-40])
    assert main(arguments("copy", LIGHT, "--resume")) == 0
    assert_same_run(light, copy)


def test_a_finished_run_is_resumed_without_doing_anything_again(copy, light):
    before = (copy / "records.jsonl").read_bytes(), (copy / "model.safetensors").stat().st_mtime_ns
    assert main(arguments("copy", LIGHT, "--resume")) == 0
    assert (copy / "records.jsonl").read_bytes() == before[0]
    assert (copy / "model.safetensors").stat().st_mtime_ns == before[1]
    assert_same_run(light, copy)
