"""Recipe to artifact to report on real digits: a trained network is pruned, distilled, quantized.

What is asked here is whether the parts agree: what the runtimes compute with what was trained, the
report with the Records, the ledger with the weights.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import gracile
from gracile.benchmark.artifact import content_sha, open_artifact
from gracile.benchmark.processor import sums_saturate
from gracile.cli.main import main
from gracile.core.record import RecordLog
from gracile.models.spec import resolve

pytestmark = pytest.mark.slow

MODEL = "net.py:Net?num_classes=10"
RUNTIMES = ("openvino", "onnxruntime")
NET = """
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.outer = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(x + self.bn2(self.outer(self.relu(self.bn1(self.inner(x))))))


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=4, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()
        self.block = Block(24)
        self.down = nn.Conv2d(24, 32, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(32, num_classes)

    def forward(self, x):
        x = self.block(self.relu(self.bn(self.stem(x))))
        return self.head(self.pool(self.relu(self.down(x))).flatten(1))
"""
TRAIN = "optimizer: {class: SGD, lr: 0.05, momentum: 0.9}, lr: {class: OneCycleLR}"
BASELINE = f"""
recipe: 1
train: {{epochs: 12, batch_size: 64, {TRAIN}}}
"""
COMPRESS = f"""
recipe: 1
goal: {{max_drop: 3}}
train: {{epochs: 9, batch_size: 64, {TRAIN}}}
methods:
  filters: {{prune: gradual, weights: "type:Conv2d", granularity: filter,
            sparsity: {{ramp: cubic, initial: 0.05, final: 0.5}}, when: {{start: 0ep, stop: 3ep}}}}
  thin: {{prune: thin, when: {{at: 3ep}}}}
  teacher: {{distill: kd, temperature: 3, alpha: 0.3}}
"""
INT8 = {
    "ptq": "  int8: {quantize: ptq}\n",
    "qat": "  int8: {quantize: qat, when: {start: 6ep}}\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a network trained on digits in "baseline"."""
    folder = tmp_path_factory.mktemp("compress")
    (folder / "net.py").write_text(NET)
    (folder / "baseline.yaml").write_text(BASELINE)
    for name, entry in INT8.items():
        (folder / f"{name}.yaml").write_text(COMPRESS + entry)
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        run("baseline.yaml", "baseline")
    return folder


def run(recipe: str, out: str, *more: str) -> None:
    argv = ["compress", "net.py:Net", "--recipe", recipe, "--out", out, "--json", *more]
    assert main(argv) == 0


@pytest.fixture(scope="module", params=INT8)
def found(request, place):
    """The result of one compression, with its folder."""
    name = request.param
    with pytest.MonkeyPatch.context() as here:
        here.chdir(place)
        runtimes = [x for r in RUNTIMES for x in ("--runtime", r)]
        run(f"{name}.yaml", name, "--weights", "baseline/model.safetensors", *runtimes)
    return place / name, json.loads((place / name / "result.json").read_text())


def test_it_starts_from_what_was_trained(found, place):
    baseline = json.loads((place / "baseline" / "result.json").read_text())
    assert found[1]["before"]["top1"] == baseline["after"]["top1"] > 0.9


def test_half_of_every_layer_is_gone_and_little_accuracy(found):
    _, result = found
    before, after = result["before"], result["after"]
    assert after["macs"] < 0.35 * before["macs"]
    assert after["bytes"] < 0.1 * before["bytes"]  # a third of the weights, a quarter of the bits
    assert result["drop_points"] <= 3
    assert result["goal"]["met"] is True
    widths = {x["id"]: (x["channels_before"], x["channels_after"]) for x in result["layers"]}
    assert widths["stem"] == (24, 12)
    assert widths["down"] == (32, 16)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_runtime_computes_what_was_trained(found, runtime):
    _, result = found
    parity, agreement = result["parity"][runtime], result["agreement"]
    assert parity["ok"] is True
    assert parity["first_bad"] is None
    assert parity["max_lsb"] <= 1
    n = agreement[runtime]["n"]
    assert abs(result["after"]["accuracy"][runtime] - result["after"]["top1"]) <= 2 / n
    assert abs(agreement[runtime]["share"] - agreement["pytorch"]["share"]) <= 4 / n
    kernels = result["kernels"][runtime]
    assert kernels["convolutions_integer"] == kernels["convolutions"] == 4


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_artifacts_are_there_and_say_where_they_are_from(found, runtime):
    folder, _ = found
    for which, precision in (("dense", "f32"), ("compressed", "int8")):
        (path,) = [
            p
            for p in (folder / "export" / runtime / which).iterdir()
            if p.suffix in (".onnx", ".xml")
        ]
        stage = json.loads((folder / "state/stages" / f"export-{runtime}.json").read_text())
        artifact = open_artifact(path)
        assert artifact.precision == precision
        assert artifact.sha == content_sha(path) == stage[which]["artifact"]["sha"]
        assert artifact.metadata["model"] == "net.py:Net"
        assert artifact.metadata["data"] == "digits"


def test_every_number_of_the_result_is_a_record(found):
    folder, result = found
    log = RecordLog(folder / "records.jsonl")
    for runtime in RUNTIMES:
        (speed,) = log.find("speedup", runtime=runtime)
        assert speed.value == result["speedup"][runtime]["ratio"]
        for which, column in (("dense", "before"), ("compressed", "after")):
            facts = {"runtime": runtime, "model": which}
            (latency,) = log.find("latency_ms", **facts)
            assert latency.value == result[column]["latency"][runtime]
            assert (latency.threads, latency.precision_hint, latency.batch) == (1, "f32", 1)
            (top1,) = log.find("top1", split="test", **facts)
            assert top1.value == result[column]["accuracy"][runtime]
            (size,) = log.find("artifact_bytes", **facts)
            files = (folder / "export" / runtime / which).iterdir()
            assert size.value == sum(f.stat().st_size for f in files)
    for record in log:
        assert record.unit
        assert record.kind == "measured"
        assert record.recipe_sha
        assert record.data_sha
        assert record.versions["torch"] == torch.__version__


def test_the_ledger_is_that_of_the_weights(found, place, monkeypatch):
    monkeypatch.chdir(place)
    folder, result = found
    weights = load_file(folder / "model.safetensors")
    parameters = dict(resolve(MODEL).model.named_parameters())
    left = sum(weights[n].numel() for n in parameters)
    shares = result["ledger"]["shares"]["parameters"]
    kept = shares["structure"]["kept"]
    assert kept == pytest.approx(left / sum(p.numel() for p in parameters.values()))
    small = sum(weights[n].numel() for n in parameters if f"{n}.weight.scale" in weights)
    assert shares["precision"][f"int{8 - sums_saturate()}"] == pytest.approx(kept * small / left)
    for by in result["ledger"]["shares"].values():
        for axis in by.values():
            assert sum(axis.values()) == pytest.approx(1)


def test_the_saved_model_loads_and_scores_the_same(found, place, monkeypatch):
    monkeypatch.chdir(place)
    folder, result = found
    loaded = gracile.load_model(
        folder,
        torch.zeros(2, 3, 32, 32),
        factory=lambda: resolve(MODEL),
    )
    bundle = gracile.open_data("digits", recipe_data={"calibration": 300})
    from gracile.data.loader import Loader
    from gracile.train.evaluate import predict_module, score

    batches = Loader(bundle.test, 90, mean=bundle.mean, std=bundle.std)
    assert score(*predict_module(loaded.model, batches)).top1 == result["after"]["top1"]


def test_the_page_shows_the_verdict_and_loads_nothing(found):
    page = (found[0] / "report.html").read_text()
    assert "OpenVINO" in page
    assert "<script" not in page
    assert "default-src 'none'" in page  # its own policy forbids it
    assert f"{100 * found[1]['after']['top1']:.2f}" in page
