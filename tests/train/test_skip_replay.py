"""A run that left blocks out: saved and loaded elsewhere, exported, undone, bisected, resumed."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from replay_case import Made
from safetensors.torch import save_file

import gracile
from gracile.core.plan import Plan
from gracile.core.result import Result
from gracile.errors import UserError, VerificationError
from gracile.graph.additions import structural
from gracile.graph.capture import capture
from gracile.graph.dependency import channel_groups
from gracile.graph.depth import skip_edits
from gracile.graph.expand import expand
from gracile.graph.surgery import apply, remove_edits
from gracile.models.spec import resolve
from gracile.recipe.load import loads
from gracile.train.bisect import bisect
from gracile.train.checkpoint import load_model, load_state, save_model, save_state
from gracile.train.job import Job
from gracile.train.replay import undo
from gracile.train.run import run
from gracile.train.session import Session

RECIPE = """\
recipe: 1
train: {{epochs: {epochs}, batch_size: 32, optimizer: {{class: SGD, lr: 0.05}}}}
data: {{train: "train[:64]", val: "train[100:150]", test: "test[:20]", calibration: 64}}
methods:
{methods}  int8: {{quantize: ptq}}
"""
METHODS = {
    "thinner": "{{prune: structure, ratio: 0.3, when: {{at: {}}}}}",
    "shallow": "{{prune: depth, count: 2, when: {{at: {}}}}}",
}
NET = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(3)])
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.relu(self.stem(x))
        for conv, norm in zip(self.blocks, self.norms):
            x = self.relu(x + norm(conv(x)))
        return self.head(x.mean((2, 3)))
"""
ELSEWHERE = """
import sys, torch
from gracile.train.checkpoint import load_model
folder, out = sys.argv[1:]
x = torch.load(f"{folder}/x.pt", weights_only=True)
torch.save(load_model(folder, x).model(x), out)
"""


def made(folder: Path, epochs: int, order: tuple[str, str] = ("thinner", "shallow")) -> Made:
    net, file = folder / "net.py", folder / "w.safetensors"
    net.write_text(NET)
    torch.manual_seed(3)
    save_file(resolve(f"{net}:Net?num_classes=10").model.state_dict(), file)
    times = ("0ep", "1ep") if epochs else ("end", "end")
    lines = [f"  {n}: {METHODS[n].format(t)}\n" for n, t in zip(order, times, strict=True)]
    text = RECIPE.format(epochs=epochs, methods="".join(lines))
    run(
        Job(
            model=f"{net}:Net", data="digits", recipe=loads(text, name="r.yaml"),
            out=folder / "run", weights=file, progress=False,
        )
    )  # fmt: skip
    return Made(folder / "run", file)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Made:
    return made(tmp_path_factory.mktemp("trained"), 2)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Made:
    return made(tmp_path_factory.mktemp("untrained"), 0)


def compressed() -> tuple[Result, torch.Tensor]:
    """ResNet-20 with fewer channels, then two blocks less."""
    torch.manual_seed(0)
    spec = resolve("resnet20_cifar?num_classes=10")
    x = torch.randn(2, 3, 32, 32)
    text = (
        "recipe: 1\ntrain: {epochs: 3}\nmethods:\n"
        "  a: {prune: structure, ratio: {ramp: linear, initial: 0.2, final: 0.5},"
        " when: {start: 0ep, stop: 3ep}}\n"
        "  b: {prune: depth, count: 2, when: {at: 1ep}}\n"
    )
    s = Session(spec.model, loads(text, name="r.yaml"), example=x, architecture=spec.architecture)
    for epoch in range(3):
        s.on_epoch_begin(epoch)
    return s.finish(), x


def test_it_is_loaded_in_a_fresh_process_bit_for_bit(tmp_path):
    result, x = compressed()
    kinds = [e.kind for e in result.plan]
    assert kinds.count("skip") == 2
    assert kinds[0] == kinds[-1] == "remove"  # cut before and after
    save_model(tmp_path, result)
    torch.save(x, tmp_path / "x.pt")
    code = [sys.executable, "-c", ELSEWHERE, str(tmp_path), str(tmp_path / "y.pt")]
    subprocess.run(code, check=True)
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), result.model(x))
    stored = set(load_model(tmp_path, x).model.state_dict())
    assert not [n for e in result.plan.of_kind("skip") for p in e.gone for n in stored if p in n]


def test_it_runs_in_onnx_runtime(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    result, x = compressed()
    artifact = gracile.export(result, "onnxruntime", tmp_path, example=x)
    session = ort.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(y, result.model(x).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_a_run_is_what_its_plan_says(trained):
    opened = trained.open()
    assert len(opened.plan.of_kind("skip")) == 2
    again = load_model(trained.folder, opened.example, factory=opened.at.fresh).model
    model = opened.quantized(opened.build(opened.plan, opened.stored), opened.plan, opened.stored)
    assert torch.equal(again(opened.example), model(opened.example))


def test_undone_a_block_of_an_untrained_run_has_its_original_values(untrained):
    opened = untrained.open()
    skip = opened.plan.of_kind("skip")[-1]
    done = undo(opened, ["int8", skip.id])
    assert [e.kind for e in done.plan].count("skip") == 1
    original = opened.original().state_dict()
    names = [n for n in done.model.state_dict() if any(n.startswith(p) for p in skip.gone)]
    assert names
    for name in names:
        value, whole = done.model.state_dict()[name], original[name]
        assert value.numel() <= whole.numel()
    everything = undo(opened, [e.id for e in opened.plan])
    assert torch.equal(everything.model(opened.example), opened.original()(opened.example))


def test_other_steps_are_undone_and_the_blocks_stay_out(trained):
    opened = trained.open()
    done = undo(opened, ["int8"])
    assert len(done.plan.of_kind("skip")) == 2
    assert set(done.model.state_dict()) < set(opened.original().state_dict())


def test_bisect_walks_over_the_blocks(trained):
    found = bisect(trained.open(), "loss", -1e9, every=True, say=lambda text: None)
    assert [r["kind"] for r in found.rows].count("skip") == 2
    assert next(r["what"] for r in found.rows if r["kind"] == "skip").startswith("add")


def test_a_session_resumes_behind_the_skip(tmp_path):
    def begun() -> Session:
        torch.manual_seed(0)
        text = "recipe: 1\ntrain: {epochs: 3}\nmethods:\n  b: {prune: depth, count: 2, when: %s}\n"
        model = resolve("resnet20_cifar?num_classes=10").model
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        recipe = loads(text % "{start: 0ep, stop: 3ep}", name="r.yaml")
        return Session(model, recipe, optimizer, example=torch.ones(2, 3, 16, 16))

    one = begun()
    one.on_epoch_begin(0), one.on_epoch_begin(1)
    save_state(tmp_path / "s", one.state_dict())
    two = begun()
    two.load_state_dict(load_state(tmp_path / "s"))
    for s in (one, two):
        s.on_epoch_begin(2)
    a, b = one.finish(), two.finish()
    assert a.plan == b.plan
    assert len(a.plan.of_kind("skip")) == 2
    assert all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())


def test_additions_before_a_skip_are_replayed_and_after_it_refused():
    spec, x = resolve("resnet20_cifar?num_classes=10"), torch.randn(2, 3, 32, 32)
    model, original = spec.model, copy.deepcopy(spec.model)
    groups = channel_groups(model, capture(model, x))
    gone = {g.id: [0, 1] for g in groups if g.protected is None}
    plan = Plan(architecture=spec.architecture).extended(remove_edits(groups, gone, "cut"))
    model = apply(model, plan.edits, example=x)
    plan = expand(model, plan, 0.5, original, examples=[x]).plan
    plan = plan.extended(skip_edits(model, capture(model, x), ["layer1.1.add"], "skip"))
    model = apply(model, plan.edits[-1:], example=x)
    again = apply(copy.deepcopy(original), structural(plan), example=x)
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    with pytest.raises(UserError, match="leaves a block out"):
        expand(model, plan, 0.5, original, examples=[x])


def test_a_block_is_not_undone_where_what_it_reads_was_cut_after_it(tmp_path):
    run_ = made(tmp_path, 0, ("shallow", "thinner"))
    opened = run_.open()
    assert [e.kind for e in opened.plan][:2] == ["skip", "skip"]
    with pytest.raises(VerificationError, match="Leave out the later steps"):
        undo(opened, ["shallow"])


def test_a_block_left_out_with_factors_in_it_comes_back_with_them_or_not_at_all(tmp_path):
    net, file = tmp_path / "net.py", tmp_path / "w.safetensors"
    net.write_text(NET)
    torch.manual_seed(3)
    save_file(resolve(f"{net}:Net?num_classes=10").model.state_dict(), file)
    methods = (
        "  rank: {lowrank: factorize, weights: [blocks.0, blocks.1, blocks.2], round_to: 1,\n"
        "         rank: {name: fixed, share: 0.4}, when: {at: 0ep}}\n"
        "  shallow: {prune: depth, count: 2, when: {at: 0ep}}\n"
    )
    text = RECIPE.format(epochs=1, methods=methods)
    recipe = loads("\n".join(x for x in text.split("\n") if "int8" not in x), name="r.yaml")
    model = f"{net}:Net"
    run(Job(model=model, data="digits", recipe=recipe, out=tmp_path / "run", weights=file,
            progress=False))  # fmt: skip
    opened = Made(tmp_path / "run", file).open()
    with pytest.raises(UserError, match=r"has no values to come back with.*factorized by 'rank'"):
        undo(opened, ["shallow"])
    with pytest.raises(UserError, match=r"the factors of .* were changed by .*'shallow' as well"):
        undo(opened, ["rank"])
    done = undo(opened, ["rank", "shallow"])
    assert len(done.plan) == 0
    assert torch.equal(done.model.blocks[0].weight, opened.original().blocks[0].weight)
