"""A student of digits learns from another network, layers and answers, and is compressed.

What is asked is whether the parts agree in one run: a teacher from a file, kept answers, hints,
channels cut in between, integers at the end; and that the finished run no longer needs the teacher.
"""

import json

import pytest
from PIL import Image
from safetensors import safe_open

from gracile.cli.main import main
from gracile.data.sets import open_data
from gracile.recipe.load import loads
from gracile.train.job import Job
from gracile.train.run import bind

pytestmark = pytest.mark.slow

TRAIN = "batch_size: 64, augment: none, optimizer: {class: SGD, lr: 0.1, momentum: 0.9}"
ADAM = "batch_size: 64, augment: none, optimizer: {class: Adam, lr: 0.003}"
STUDENT, TEACHER = "net.py:Net", "simplenet_cifar"
NET = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.low = nn.Sequential(
            nn.Conv2d(3, 12, 5, stride=3, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        )
        self.high = nn.Sequential(
            nn.Conv2d(16, 24, 2, stride=2, bias=False), nn.BatchNorm2d(24), nn.ReLU()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(24, num_classes)

    def forward(self, x):
        return self.head(self.pool(self.high(self.low(x))).flatten(1))
"""
LEARN = f"""
recipe: 1
train: {{epochs: 12, {TRAIN}, lr: {{class: OneCycleLR}}}}
methods:
  hints: {{distill: features, at: {{low: conv2}}, loss: fitnets, alpha: 0, when: {{stop: 2ep}},
          teacher: {{model: "{TEACHER}", weights: teacher/model.safetensors}}}}
  attention: {{distill: features, at: {{high: pool2}}, loss: at, weight: 0.1, when: {{start: 2ep}},
              teacher: {{model: "{TEACHER}", weights: teacher/model.safetensors}}}}
  kd: {{distill: kd, loss: dkd, scale: 0.2, cache: true, when: {{start: 2ep}},
       teacher: {{model: "{TEACHER}", weights: teacher/model.safetensors}}}}
  filters: {{prune: oneshot, weights: "type:Conv2d", granularity: filter, sparsity: 0.25,
            when: {{at: 3ep}}}}
  thin: {{prune: thin, when: {{at: 4ep}}}}
  int8: {{quantize: ptq}}
"""


def compress(model, recipe, out, *more):
    assert main(["compress", model, "--recipe", recipe, "--out", out, "--json", *more]) == 0
    with open(f"{out}/result.json") as f:
        return json.load(f)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation")
    (folder / "net.py").write_text(NET)
    (folder / "learn.yaml").write_text(LEARN)
    (folder / "teach.yaml").write_text(f"recipe: 1\ntrain: {{epochs: 12, {ADAM}}}\n")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        teacher = compress(TEACHER, "teach.yaml", "teacher", "--data", "digits")
        student = compress(STUDENT, "learn.yaml", "student", "--data", "digits")
    return folder, teacher, student


def test_the_student_learns_and_gets_smaller(place):
    _, teacher, student = place
    assert teacher["after"]["top1"] > 0.9
    assert student["before"]["top1"] < 0.3  # not trained
    assert student["after"]["top1"] > 0.7
    assert student["after"]["params"] < student["before"]["params"]


def test_every_term_was_there_in_its_time(place):
    curves = json.loads((place[0] / "student" / "history.json").read_text())["curves"]
    assert [t for t, _ in curves["loss/hints"]] == [1, 2]
    assert [t for t, _ in curves["loss/kd"]] == [t for t, _ in curves["loss/attention"]]
    assert [t for t, _ in curves["loss/kd"]] == list(range(3, 13))


def test_the_finished_run_needs_no_teacher(place, monkeypatch):
    folder, _, _ = place
    monkeypatch.chdir(folder)
    (folder / "teacher").rename(folder / "moved")
    try:
        assert main(["export", "student", "--runtime", "onnxruntime", "--out", "again"]) == 0
    finally:
        (folder / "moved").rename(folder / "teacher")
    with safe_open(folder / "student" / "model.safetensors", "pt") as f:
        weights = [n for n in f.keys() if n.endswith((".weight", ".bias"))]  # noqa: SIM118
    assert all(n.startswith(("low", "high", "head")) for n in weights)


def test_the_run_stands_for_the_weights_of_its_teacher(place):
    folder, _, _ = place
    identity = json.loads((folder / "student" / "state" / "run.json").read_text())["identity"]
    assert list(identity["teachers"]) == ["teacher/model.safetensors"]


def test_augmentation_and_kept_answers_are_refused_at_bind(place, monkeypatch):
    folder, _, _ = place
    monkeypatch.chdir(folder)
    text = LEARN.replace("augment: none", "augment: shift")
    recipe = loads(text, name=str(folder / "learn.yaml"))
    with pytest.raises(ValueError, match=r"learn.yaml:\d+: 'kd': cache .*augment: none"):
        bind(Job(model=STUDENT, data="digits", recipe=recipe, out=folder / "x", progress=False))


def test_learning_from_random_weights_is_warned_of(place):
    recipe = loads("recipe: 1\ntrain: {epochs: 1}\nmethods:\n  kd: {distill: kd}\n", name="r")
    s = bind(Job(model=TEACHER, data="digits", recipe=recipe, out=place[0] / "x", progress=False))
    assert [code for code, _ in s.warnings] == ["untrained-teacher"]


def test_a_student_learns_from_pictures_that_nobody_labelled(place, monkeypatch):
    folder, _, _ = place
    monkeypatch.chdir(folder)
    pictures = folder / "pictures" / "train" / "unknown"
    pictures.mkdir(parents=True)
    digits = open_data("digits").train
    for k, pixels in enumerate(digits.images(range(900)).roll(1, dims=3)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(pictures / f"{k}.png")
    (folder / "transfer.yaml").write_text(
        f'recipe: 1\ndata: {{transfer: "imagefolder:{folder / "pictures"}"}}\n'
        f"train: {{epochs: 20, {ADAM}}}\nmethods:\n  kd: {{distill: kd, alpha: 0, "
        f"teacher: {{model: {TEACHER}, weights: teacher/model.safetensors}}}}\n"
    )
    student = compress(STUDENT, "transfer.yaml", "taught", "--data", "digits")
    assert student["after"]["top1"] > 0.5  # of 0.1 by chance
