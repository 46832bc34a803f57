"""What every registered method must keep, whatever it does."""

import copy
import json
from pathlib import Path

import method_cases as cases
import pytest
import torch
from torch import nn

from gracile import registry
from gracile.core.plan import Plan
from gracile.errors import RecipeError
from gracile.graph.additions import structural
from gracile.graph.surgery import apply
from gracile.recipe.load import loads
from gracile.train.checkpoint import load_state, save_state

ROOT = Path(__file__).parents[2]
every_method = pytest.mark.parametrize("name", cases.names())


def test_every_method_has_a_case():
    assert set(cases.CASES) == set(cases.names())


@every_method
def test_it_has_a_source_a_docstring_a_page_and_a_test(name):
    entry = registry.get("method", name)
    assert entry.source
    assert entry.summary
    page = ROOT / "docs" / "methods" / f"{name.replace('/', '-')}.md"
    assert page.exists(), f"write {page}"
    room, file = entry.module.split(".")[1], entry.module.split(".")[-1]
    assert list((ROOT / "tests" / room).glob(f"test_*{file}*.py")), f"test {entry.module}"


@pytest.mark.parametrize(
    "entry",
    [
        e
        for kind in (
            "criterion",
            "granularity",
            "penalty",
            "ramp",
            "observer",
            "fake_quant",
            "kd_loss",
            "feature_loss",
            "factorizer",
            "rank_rule",
            "block",
            "exit_head",
        )
        for e in registry.entries(kind)
    ],
    ids=lambda e: f"{e.kind}-{e.name}",
)
def test_every_kernel_has_a_source_and_a_docstring(entry):
    assert entry.source
    assert entry.summary


@every_method
def test_its_recipe_survives_yaml(name):
    recipe = cases.recipe(name)
    assert loads(recipe.to_yaml(), name="again") == recipe


@every_method
def test_an_unknown_key_is_refused_by_name(name):
    entry = cases.CASES[name].removesuffix("}") + ", surprize: 1}"
    with pytest.raises(RecipeError, match=r"x.yaml:\d+: .*surprize"):
        loads(f"recipe: 1\ntrain: {{epochs: 3}}\nmethods:\n  {entry}\n", name="x.yaml")


@every_method
def test_it_fires_as_often_as_its_timetable_says(name):
    s, _ = cases.finished(name)
    assert s.fired == {id: len(table) for id, table in s.timetables.items()} | {
        m.id: 0 for m in s.methods if m.id not in s.timetables
    }


@every_method
def test_same_seed_same_result(name):
    (_, a), (_, b) = cases.finished(name), cases.finished(name)
    assert a.plan == b.plan
    assert_same(a.model.state_dict(), b.model.state_dict())


@every_method
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_stop_save_resume_equals_one_run(name, stop, tmp_path):
    _, whole = cases.finished(name)
    first = cases.session(name)
    for epoch in range(stop):
        cases.train_epoch(first, epoch)
    save_state(tmp_path / "s.safetensors", first.state_dict())
    second = cases.session(name)
    second.load_state_dict(load_state(tmp_path / "s.safetensors"))
    for epoch in range(stop, cases.EPOCHS):
        cases.train_epoch(second, epoch)
    resumed = second.finish()
    assert resumed.plan == whole.plan
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    assert_same(resumed.tensors, whole.tensors)
    assert resumed.history == whole.history


@every_method
def test_its_plan_through_json_equals_the_plan_in_memory(name, tmp_path):
    _, result = cases.finished(name)
    result.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == result.plan
    json.loads((tmp_path / "plan.json").read_text())


@every_method
def test_the_ledger_adds_up(name):
    _, result = cases.finished(name)
    for by in ("parameters", "macs"):
        for axis in ("structure", "precision", "sparsity"):
            assert sum(result.ledger.shares()[by][axis].values()) == pytest.approx(1.0)


@every_method
def test_the_plan_rebuilds_the_shapes_from_the_architecture(name):
    _, result = cases.finished(name)
    fresh = apply(cases.Tiny(), structural(result.plan), example=cases.data(99)[0][0][:4])
    assert {n: p.shape for n, p in fresh.named_parameters()} == {
        n: p.shape for n, p in result.model.named_parameters()
    }


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_zeros_stay_zero_over_steps_of_a_momentum_optimizer(optimizer):
    s = cases.session("prune/oneshot")
    s.optimizer = getattr(torch.optim, optimizer)(s.model.parameters(), lr=0.05)
    if optimizer == "SGD":
        s.optimizer.param_groups[0]["momentum"] = 0.9
    for epoch in range(cases.EPOCHS):
        cases.train_epoch(s, epoch)
        if epoch == 1:
            masks = {a: s.mask(a) for a in s.overlays.addresses("mask")}
            assert masks
    for address, keep in masks.items():
        assert torch.all(s.overlays.effective(address)[~keep] == 0)
    result = s.finish()
    for address, keep in masks.items():
        assert torch.all(result.model.get_parameter(address)[~keep] == 0)


def test_strength_zero_changes_nothing():
    plain, s = cases.Tiny(), None
    text = (
        "recipe: 1\ntrain: {epochs: 3}\nmethods:\n"
        '  m: {prune: gradual, weights: "type:Conv2d", sparsity: 0.0, when: {start: 0ep}}\n'
        "  k: {distill: kd, alpha: 1.0}\n"
    )
    from gracile.train.session import Session

    torch.manual_seed(0)
    plain = cases.Tiny()
    mine = copy.deepcopy(plain)
    sgd = {"lr": 0.05, "momentum": 0.9}
    s = Session(
        mine,
        loads(text, name="zero"),
        torch.optim.SGD(mine.parameters(), **sgd),
        example=torch.zeros(2, 3, 8, 8),
        steps_per_epoch=cases.STEPS,
    )
    optimizer = torch.optim.SGD(plain.parameters(), **sgd)
    for epoch in range(cases.EPOCHS):
        cases.train_epoch(s, epoch)
        plain.train()
        for x, y in cases.data(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x), y).backward()
            optimizer.step()
    result = s.finish()
    assert_same(result.model.state_dict(), plain.eval().state_dict())


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)
