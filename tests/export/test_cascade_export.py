import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from gracile.benchmark.artifact import files, open_artifact, stage_files
from gracile.benchmark.inputs import measure_inputs
from gracile.benchmark.runtimes.base import load
from gracile.benchmark.runtimes.cascade import entropy
from gracile.core.plan import Architecture, Exit, Plan
from gracile.errors import ParityError, UserError
from gracile.export import parity
from gracile.export.cascade import exported
from gracile.graph.capture import capture
from gracile.graph.exits import attached
from gracile.nn.exits import all_exits, choice_of
from gracile.nn.exits import entropy as in_torch

RUNTIMES = ("onnxruntime", "openvino")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.outer = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.stem(x))
        x = self.relu(x + self.outer(self.relu(self.inner(x))))
        return self.head(self.pool(x).flatten(1))


@pytest.fixture(scope="module")
def x():
    return torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(x):
    torch.manual_seed(0)
    net = Net().eval()
    edits = [Exit(after=at, head="pool_linear") for at in ("relu", "relu_1")]
    out = attached(capture(net, x[:2]), edits).eval()
    for k in range(2):  # half of what arrives leaves
        with torch.no_grad():
            unsure = in_torch(all_exits(out, x)[k])
            choice_of(out).thresholds[k] = unsure.median() + 1e-4
    return out


def written(model, x, runtime, folder):
    plan = Plan(architecture=Architecture(name="Net"))
    return exported(runtime, model, plan, {}, example=x[:2], path=folder, metadata={"a": "b"})


@pytest.fixture(scope="module", params=RUNTIMES)
def artifact(request, model, x, tmp_path_factory):
    return written(model, x, request.param, tmp_path_factory.mktemp(request.param))


def test_entropy_is_that_of_training(x):
    logits = x.flatten(1)[:, :7]
    np.testing.assert_allclose(entropy(logits.numpy(), 1.7), in_torch(logits, 1.7), atol=1e-5)


def test_the_runtime_answers_as_pytorch_does_and_stops(artifact, model, x):
    loaded = load(artifact)
    got, taken = loaded.answer(x)
    with torch.no_grad():
        np.testing.assert_allclose(got, model(x), atol=1e-5)
    assert set(taken) == {0, 1, 2}
    assert loaded.run(x)[0].shape == (40, 4)
    calls = []
    loaded.stages[1].run = lambda inputs: calls.append(1)
    first = int(np.flatnonzero(taken == 0)[0])
    loaded.answer(x[first : first + 1])
    assert not calls


def test_one_by_one_equals_a_batch(artifact, x):
    loaded = load(artifact)
    got, taken = loaded.answer(x)
    each = [loaded.answer(x[k : k + 1]) for k in range(len(x))]
    np.testing.assert_allclose(np.concatenate([a for a, _ in each]), got, atol=1e-5)
    assert np.concatenate([t for _, t in each]).tolist() == taken.tolist()


def test_parity_looks_at_every_stage(artifact, model, x):
    report = parity.check(model, load(artifact), x)
    assert report.ok
    ids = {u.id for u in report.units}
    assert {"early_exits.relu.fc", "early_exits.relu_1.fc", "head"} <= ids


def test_parity_fails_where_inputs_leave_elsewhere(artifact, model, x):
    loaded = load(artifact)
    step = loaded.steps[0]
    loaded.steps[0] = type(step)(step.reads, step.makes, 0.0, step.temperature)
    with pytest.raises(ParityError, match="leave at exit 0"):
        parity.require(parity.check(model, loaded, x))


def test_it_is_read_back_wherever_its_folder_is(artifact, x, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(artifact.path.parent, folder)
    again = open_artifact(folder / "cascade.json")
    assert (again.sha, again.precision, again.runtime) == (
        artifact.sha, artifact.precision, artifact.runtime,
    )  # fmt: skip
    assert again.metadata["a"] == "b"
    assert again.size_bytes == sum(p.stat().st_size for p in files(artifact.path))
    np.testing.assert_array_equal(load(again).run(x)[0], load(artifact).run(x)[0])
    next(p for p in files(again.path) if "stage1" in str(p)).unlink()
    with pytest.raises(UserError, match=r"stage1.*no such file"):
        open_artifact(folder / "cascade.json")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "cascade.json").write_text(json.dumps({"stages": [{}]}))
    with pytest.raises(UserError, match=r"cascade.json: .* damaged"):
        open_artifact(tmp_path / "cascade.json")


def test_other_runtimes_are_refused(model, x, tmp_path):
    with pytest.raises(UserError, match="onnxruntime and openvino, not in 'ncnn'"):
        written(model, x, "ncnn", tmp_path)


def test_times_over_inputs_say_how_many_left_where(artifact, x):
    loaded = load(artifact)
    images = [x[k : k + 1].numpy() for k in range(8)]
    records = measure_inputs({"a": loaded, "b": loaded}, images)
    rates = {r.subject["exit"]: r.value for r in records
             if r.metric == "exit_rate" and r.subject["model"] == "a"}  # fmt: skip
    taken = loaded.answer(x[:8])[1]
    assert rates == {str(k): (taken == k).mean() for k in range(3)}
    assert sum(rates.values()) == pytest.approx(1)
    times = [r for r in records if r.metric == "mean_latency_ms"]
    assert all(r.n == 8 and r.p95 >= r.median > 0 and r.ci95 for r in times)
    (ratio,) = [r for r in records if r.metric == "mean_speedup"]
    assert ratio.ci95[0] <= ratio.value <= ratio.ci95[1]
    assert loaded.time(2)


def test_without_inputs_there_is_nothing_to_time(artifact):
    with pytest.raises(UserError, match="no inputs"):
        measure_inputs({"a": load(artifact)}, [])


@pytest.mark.parametrize("file", ["../model.onnx", "/tmp/model.onnx", "cascade.json"])
def test_stages_lie_below_the_folder(tmp_path, file):
    (tmp_path / "cascade.json").write_text(json.dumps({"stages": [{"file": file}]}))
    with pytest.raises(UserError, match="a stage must be an artifact below this folder"):
        stage_files(tmp_path / "cascade.json")
