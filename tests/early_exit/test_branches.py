import copy

import exit_case as case
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.core.plan import Plan
from gracile.errors import BindError, PlanConflict, RecipeError, UserError, VerificationError
from gracile.graph.dependency import channel_groups
from gracile.nn.exits import all_exits, choice_of
from gracile.recipe.load import loads
from gracile.train.checkpoint import load_model, load_state, save_model, save_state


def test_loss_is_the_weighted_sum_of_all_exits():
    s = case.session("m: {early_exit: branches, at: [relu, relu_1], weights: [0.2, 0.3]}")
    s.on_epoch_begin(0)
    x, y = case.batches(0)[0]
    s.on_minibatch_begin(0, 0, case.STEPS)
    s.model.train()
    task = F.cross_entropy(s.model(x), y)
    got = s.before_backward_pass(0, 0, case.STEPS, task, labels=y)
    first, second, final = all_exits(s.model.train(), x)
    each = [F.cross_entropy(a, y) for a in (first, second, final)]
    torch.testing.assert_close(got, 0.2 * each[0] + 0.3 * each[1] + 0.5 * each[2])


def test_equal_shares_by_default():
    s = case.session()
    s.on_epoch_begin(0)
    assert s.methods[0]._weights(2) == (1 / 3, 1 / 3)


def test_what_exits_imitate_does_not_move_the_final_answer():
    s = case.session("m: {early_exit: branches, at: [relu], weights: 0.5, imitate: 1}")
    s.on_epoch_begin(0)
    x, y = case.batches(0)[0]
    s.on_minibatch_begin(0, 0, case.STEPS)
    s.model.train()
    loss = 0 * F.cross_entropy(s.model(x), y)
    s.before_backward_pass(0, 0, case.STEPS, loss).backward()
    assert not s.model.get_parameter("head.weight").grad.any()
    assert s.model.get_parameter("early_exits.relu.fc.weight").grad.any()


def test_attaching_changes_nothing_but_the_graph():
    s = case.session("m: {early_exit: branches, at: [relu, relu_1], head: conv_pool_linear}")
    before, x = copy.deepcopy(s.model).eval(), case.images()
    s.on_epoch_begin(0)
    with torch.no_grad():
        torch.testing.assert_close(s.model.eval()(x), before(x), rtol=0, atol=0)
    old = dict(before.named_parameters())
    new = {n: p for n, p in s.model.named_parameters() if not n.startswith("early_exits.")}
    assert new.keys() == old.keys()


def test_heads_join_the_optimizer_and_learn():
    s = case.session()
    case.train(s, 0)
    weight = s.model.get_parameter("early_exits.relu.fc.weight")
    assert any(p is weight for p in s.optimizer.param_groups[0]["params"])
    assert "momentum_buffer" in s.optimizer.state[weight]


def test_inputs_leave_where_the_plan_says(tmp_path):
    result = case.finished()
    edits = result.plan.of_kind("exit")
    assert [e.after for e in edits] == ["relu", "relu_1"]
    choice = choice_of(result.model)
    torch.testing.assert_close(choice.thresholds, torch.tensor([e.threshold for e in edits]))
    torch.testing.assert_close(choice.temperatures, torch.tensor([e.temperature for e in edits]))
    result.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == result.plan


@pytest.mark.parametrize("methods", [
    case.EXITS,
    "m: {early_exit: branches, at: [relu], head: {name: conv_pool_linear, width: 4}}",
    "cut: {prune: structure, ratio: 0.4, when: {at: 0ep}}\n  " + case.EXITS,
    case.EXITS + "\n  cut: {prune: structure, ratio: 0.4, when: {at: 1ep}}",
    case.EXITS + "\n  int8: {quantize: qat, when: {start: 1ep}}",
])  # fmt: skip
def test_a_saved_model_computes_the_same(methods, tmp_path):
    result = case.finished(methods)
    save_model(tmp_path, result)
    spec = type("Spec", (), {"model": case.Net(), "architecture": result.plan.architecture})
    loaded = load_model(tmp_path, case.images()[:4], factory=lambda: spec)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model(case.images()), result.model(case.images()), rtol=0, atol=0
        )


def test_resumed_equals_uninterrupted_with_a_cut_under_it(tmp_path):
    methods = case.EXITS + "\n  cut: {prune: structure, ratio: 0.4, when: {at: 1ep}}"
    whole = case.finished(methods, 3)
    first = case.session(methods, 3)
    for epoch in range(2):
        case.train(first, epoch)
    save_state(tmp_path / "s", first.state_dict())
    second = case.session(methods, 3)
    second.load_state_dict(load_state(tmp_path / "s"))
    case.train(second, 2)
    resumed = second.finish()
    assert resumed.plan == whole.plan
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)


def test_cuts_follow_the_heads():
    s = case.session()
    case.train(s, 0)
    members = {
        (part.at, part.dim)
        for group in channel_groups(s.model, s.graph)
        for unit in group.units
        for part in unit
    }
    assert ("early_exits.relu.fc.weight", 1) in members
    s.cut({next(g.id for g in s.groups if g.protected is None): [0]}, by="test")


def test_the_proof_of_a_cut_sees_the_heads(monkeypatch):
    from gracile.graph import surgery

    s = case.session()
    case.train(s, 0)
    group = next(
        g for g in s.groups if any(p.at.startswith("early_exits.relu.fc") for p in g.units[0])
    )
    plain = surgery.apply_removes

    def wrong(model, edits, **options):
        plain(model, edits, **options)
        with torch.no_grad():
            model.get_parameter("early_exits.relu.fc.weight").mul_(1.5)

    monkeypatch.setattr(surgery, "apply_removes", wrong)
    with pytest.raises(VerificationError):
        s.cut({group.id: [0]}, by="test", reproduce=False)


def test_a_mean_cost_goal_is_kept_on_validation_data():
    s = case.session("m: {early_exit: branches, at: [relu, relu_1], goal: {mean_cost: 0.6}}")
    for epoch in range(2):
        case.train(s, epoch)
    result = s.finish()
    from gracile.early_exit.cascade import exit_macs

    until, whole = exit_macs(result.model, case.images())
    from gracile.early_exit.cascade import Cascade

    x = torch.cat([x for x, _ in case.batches(55, 8)])
    _, taken = Cascade(result.model, x).eval().answer(x)
    assert torch.tensor(until)[taken].double().mean() / whole <= 0.6


def test_a_cost_below_that_of_the_first_exit_is_warned_of():
    s = case.session("m: {early_exit: branches, at: [relu_1], goal: {mean_cost: 0.01}}")
    for epoch in range(2):
        case.train(s, epoch)
    result = s.finish()
    assert [code for code, _ in result.warnings] == ["exit-goal"]
    assert result.plan.of_kind("exit")[0].threshold == pytest.approx(1.01)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = case.Net()

    def forward(self, x):
        return self.net(x), x


@pytest.mark.parametrize(("methods", "model", "text"), [
    ("m: {early_exit: branches, at: nothing}", None, "'nothing' matches no layer"),
    ("m: {early_exit: branches, at: [head]}", None, "would save nothing"),
    ("m: {early_exit: branches, at: [pool, relu], head: conv_pool_linear, weights: [0.1]}", None,
     "one for each exit, got 1 for relu, pool"),
    ("m: {early_exit: branches, at: [relu, relu_1], weights: 0.5}", None, "less than 0.5"),
    ("m: {early_exit: branches, at: [flatten], head: conv_pool_linear}", None, "pool_linear"),
    ("m: {early_exit: branches, at: [net.relu]}", Two(), "one tensor"),
])  # fmt: skip
def test_what_cannot_work_is_refused_at_bind(methods, model, text):
    with pytest.raises((BindError, UserError), match=text):
        case.session(methods, model=model)


def test_two_entries_are_a_conflict():
    two = case.EXITS + "\n  n: {early_exit: branches, at: [relu]}"
    with pytest.raises(PlanConflict, match=r"'m' .* and 'n'"):
        case.session(two)


def test_labels_are_asked_for():
    s = case.session()
    with pytest.raises(UserError, match=r"labels=.*imitate: 1"):
        case.train(s, 0, labels=False)


def test_validation_data_is_asked_for():
    with pytest.raises(BindError, match="goes by the accuracy on validation data"):
        case.session(val=None)


@pytest.mark.parametrize(("options", "text"), [
    ("weights: [0.5, 0.5]", "weights.*less than 1"),
    ("goal: {max_drop: 1, mean_cost: 0.5}", "one of max_drop"),
    ("when: {start: 0ep}", "exits are attached once"),
    ("head: nose", "nose"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused_at_load(options, text):
    with pytest.raises(RecipeError, match=text):
        loads(
            "recipe: 1\ntrain: {epochs: 1}\nmethods:\n"
            f"  m: {{early_exit: branches, at: [relu, relu_1], {options}}}\n",
            name="x.yaml",
        )
