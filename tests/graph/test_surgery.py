"""Surgery: any cut of any pattern equals the mask, training goes on, failures leave no trace."""

import copy
import random

import numpy as np
import pytest
import torch
from channel_zoo import ZOO, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from gracile.core.plan import Architecture, Member, Plan, Remove
from gracile.errors import UserError, VerificationError
from gracile.graph.capture import capture
from gracile.graph.dependency import channel_groups
from gracile.graph.instrument import instrument
from gracile.graph.ops.products import Conv
from gracile.graph.ops.shape import Flatten
from gracile.graph.surgery import apply_removes, remove_edits, verified_apply
from gracile.nn.quantized import ActivationQuantizer


def cut_of(model, inputs, seed=0):
    """Edits that remove a random subset of the units of every group that may be cut."""
    rng = random.Random(seed)
    groups = channel_groups(model, capture(model, inputs))
    gone = {}
    for g in groups:
        if g.protected is None:
            order = rng.sample(range(len(g.units)), rng.randint(1, len(g.units) - 1))
            gone[g.id] = g.removable(order)
    return remove_edits(groups, gone, by="test")


def loss_of(output):
    leaves = output.values() if isinstance(output, dict) else [output]
    return sum(v.square().mean() for v in leaves)


@pytest.mark.parametrize("name", ZOO)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6))
def test_any_cut_equals_the_mask_and_trains_on(name, seed):
    model, inputs = build(name, seed)
    edits = cut_of(model, inputs, seed)
    assert edits
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    loss_of(model(*inputs)).backward()
    optimizer.step()
    model, report = verified_apply(model, edits, examples=[inputs, inputs], optimizer=optimizer)
    assert report.proof.checks == ("eval", "train")
    assert report.proof.max_error < 1e-10
    assert report.removed > 0
    optimizer.zero_grad()
    loss_of(model.train()(*inputs)).backward()
    optimizer.step()
    for p in model.parameters():
        if p in optimizer.state:
            assert optimizer.state[p]["momentum_buffer"].shape == p.shape


@pytest.mark.parametrize("name", ZOO)
def test_a_second_cut_follows_the_first(name):
    model, inputs = build(name)
    for seed in (1, 2):
        model, _ = verified_apply(model, cut_of(model, inputs, seed), examples=[inputs])
        groups = channel_groups(model, capture(model, inputs))
        if all(g.protected for g in groups):
            break


def test_sliced_equals_masked_by_hand():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    x = torch.randn(4, 2)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked[0].weight[1] = 0
        masked[0].bias[1] = 0
        masked[2].weight[:, 1] = 0
    groups = channel_groups(model, capture(model, x))
    verified_apply(model, remove_edits(groups, {"0.weight": {1}}, "t"), examples=[x])
    assert model[0].weight.shape == (2, 2)
    assert (model[0].out_features, model[2].in_features) == (2, 2)
    torch.testing.assert_close(model(x), masked(x))


def test_parameters_stay_the_same_objects_and_state_follows():
    model, inputs = build("residual")
    optimizer = torch.optim.Adam(model.parameters())
    loss_of(model(*inputs)).backward()
    optimizer.step()
    weight = model.conv1.weight
    moment = optimizer.state[weight]["exp_avg"].clone()
    groups = channel_groups(model, capture(model, inputs))
    edits = remove_edits(groups, {"conv1.weight": [0, 3]}, "t")
    apply_removes(model, edits, optimizer=optimizer)
    assert model.conv1.weight is weight
    assert weight.grad is None
    assert torch.equal(optimizer.state[weight]["exp_avg"], moment[[1, 2, 4]])
    assert optimizer.state[weight]["step"].ndim == 0
    assert (model.conv1.out_channels, model.bn1.num_features, model.conv2.in_channels) == (3, 3, 3)


def test_training_goes_on_although_the_last_loss_is_still_referenced():
    model, inputs = build("residual")
    loss = loss_of(model(*inputs))
    loss.backward()
    apply_removes(model, cut_of(model, inputs))
    loss_of(model(*inputs)).backward()
    assert model.conv1.weight.grad.shape == model.conv1.weight.shape
    assert loss.requires_grad


def test_a_graph_module_that_shares_the_parameters_follows():
    model, inputs = build("option_a")
    graph = capture(model, inputs)
    laid = instrument(graph, {"conv": ActivationQuantizer(), "pad": ActivationQuantizer()})
    verified_apply(laid, cut_of(laid, inputs), examples=[inputs])
    assert model.conv.weight.shape == laid.get_parameter("conv.weight").shape
    assert model.conv.out_channels < 8
    torch.testing.assert_close(laid.eval()(*inputs), model.eval()(*inputs))


def test_quantizers_do_not_disturb_the_proof():
    model, inputs = build("residual")
    quantizer = ActivationQuantizer()
    quantizer.mode = "quantize"
    quantizer.scale.fill_(0.5)
    laid = instrument(capture(model, inputs), {"relu_1": quantizer})
    verified_apply(laid, cut_of(laid, inputs), examples=[inputs])
    assert quantizer.mode == "quantize"


def test_frozen_parameters_are_cut_and_stay_frozen():
    model, inputs = build("residual")
    model.conv1.weight.requires_grad_(False)
    verified_apply(model, cut_of(model, inputs), examples=[inputs])
    assert not model.conv1.weight.requires_grad
    assert model.conv1.weight.shape[0] < 5


def test_two_groups_that_share_a_reader_count_in_turn():
    model, inputs = build("concat")
    groups = channel_groups(model, capture(model, inputs))
    edits = remove_edits(groups, {"a.weight": [0, 1], "b.weight": [4]}, "t")
    mix = [m for e in edits for m in e.group if m.at == "mix.weight"]
    assert [(m.of, m.keep) for m in mix] == [
        (9, (2, 3, 4, 5, 6, 7, 8)),
        (7, (0, 1, 2, 3, 4, 5)),
    ]
    verified_apply(model, edits, examples=[inputs])
    assert model.mix.weight.shape[1] == 6


def test_a_plan_from_json_cuts_the_same(tmp_path):
    model, inputs = build("transposed")
    twin = copy.deepcopy(model)
    plan = Plan(architecture=Architecture(name="x")).extended(cut_of(model, inputs))
    plan.save(tmp_path / "plan.json")
    apply_removes(model, list(plan))
    apply_removes(twin, list(Plan.load(tmp_path / "plan.json")))
    assert repr(model) == repr(twin)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_plan_for_another_width_is_refused_before_anything_is_touched():
    model, inputs = build("residual")
    before = copy.deepcopy(model.state_dict())
    good = cut_of(model, inputs)[0]
    bad = Remove(by="t", id="e7", group=(Member(at="fc.weight", dim=1, of=9, keep=(0,)),))
    with pytest.raises(UserError, match=r"edit e7: 'fc.weight' has \d+ indices .* made for 9"):
        apply_removes(model, [good, bad])
    with pytest.raises(UserError, match=r"Nearest: 'conv1\.weight'"):
        apply_removes(model, [Remove(group=(Member(at="conv1.weigth", dim=0, of=5, keep=(0,)),))])
    with pytest.raises(UserError, match="with a dim 4 is not in Residual"):
        apply_removes(model, [Remove(group=(Member(at="conv1.weight", dim=4, of=5, keep=(0,)),))])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_remove_edits_refuses_what_cannot_be_cut():
    model, inputs = build("option_a")
    groups = channel_groups(model, capture(model, inputs))
    with pytest.raises(UserError, match=r"no channel group 'stem.weigth'.* Nearest: 'stem.weight'"):
        remove_edits(groups, {"stem.weigth": [0]}, "t")
    with pytest.raises(UserError, match=r"'fc.weight' is protected: it is an output"):
        remove_edits(groups, {"fc.weight": [0]}, "t")
    with pytest.raises(UserError, match=r"has units 0..7, got 8"):
        remove_edits(groups, {"stem.weight": [8]}, "t")
    narrow = [u for u in range(8) if any(s.at == "stem.weight" for s in groups[0].units[u])]
    with pytest.raises(UserError, match=r"would leave nothing of 'stem.weight' along dim 0"):
        remove_edits(groups, {"stem.weight": narrow}, "t")
    assert remove_edits(groups, {"stem.weight": []}, "t") == []


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict())), repr(model)


def same(a, b):
    (state_a, optim_a), text_a = a
    (state_b, optim_b), text_b = b
    equal = all(torch.equal(v, state_b[k]) for k, v in state_a.items())
    for k, v in optim_a["state"].items():
        equal &= all(torch.equal(t, optim_b["state"][k][n]) for n, t in v.items())
    return equal and text_a == text_b


@pytest.mark.parametrize(
    ("name", "fault", "operator"),
    [
        # The columns of the reader are those of another channel.
        ("cat_twice", "shift", r"operator is 'flatten' \(flatten\)"),
        # A reader that was forgotten: the sliced model does not run.
        ("residual", "forget", r"'conv2' \(conv\), which does not run any more"),
    ],
)
def test_a_wrong_rule_is_caught_named_and_rolled_back(monkeypatch, name, fault, operator):
    model, inputs = build(name)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    loss_of(model(*inputs)).backward()
    optimizer.step()
    if fault == "shift":
        right = Flatten.flow

        def wrong(self, node, values, flow):
            value = right(self, node, values, flow)
            return value.with_dim(1, np.roll(value.dims[1], 1))

        monkeypatch.setattr(Flatten, "flow", wrong)
    else:
        monkeypatch.setattr(Conv, "couple", lambda *a: (a[5].written(a[2], 0), None))
    before = snapshot(model, optimizer)
    groups = channel_groups(model, capture(model, inputs))
    chosen = {g.id: [1] for g in groups if g.protected is None and g.id.startswith("conv")}
    edits = remove_edits(groups, chosen, "t")
    with pytest.raises(VerificationError, match=operator) as e:
        verified_apply(model, edits, examples=[inputs], optimizer=optimizer)
    assert "The model was left as it was" in str(e.value)
    assert same(before, snapshot(model, optimizer))


def test_a_fault_behind_a_zero_initialized_norm_is_seen(monkeypatch):
    model, inputs = build("residual")
    nn.init.zeros_(model.bn2.weight)
    groups = channel_groups(model, capture(model, inputs))
    wrong = remove_edits(groups, {"conv1.weight": [0]}, "t")[0]
    members = [
        m.model_copy(update={"keep": (0, 1, 2, 3)}) if m.at == "conv2.weight" else m
        for m in wrong.group
    ]
    with pytest.raises(VerificationError, match=r"'conv2' \(conv\)"):
        verified_apply(
            model, [wrong.model_copy(update={"group": tuple(members)})], examples=[inputs]
        )


def test_a_cut_of_statistics_alone_is_seen_in_the_buffers():
    model, inputs = build("residual")
    groups = channel_groups(model, capture(model, inputs))
    edit = remove_edits(groups, {"conv1.weight": [0]}, "t")[0]
    members = [
        m.model_copy(update={"keep": (0, 1, 2, 3)}) if m.at == "bn1.running_mean" else m
        for m in edit.group
    ]
    with pytest.raises(VerificationError, match=r"'bn1' \(batch_norm\)"):
        verified_apply(
            model, [edit.model_copy(update={"group": tuple(members)})], examples=[inputs]
        )


def test_a_diverged_model_cannot_be_proven():
    model, inputs = build("residual")
    edits = cut_of(model, inputs)
    nn.init.constant_(model.fc.bias, float("nan"))
    with pytest.raises(VerificationError, match="has no finite number"):
        verified_apply(model, edits, examples=[inputs])


def test_a_model_that_insists_on_float32_is_proven_in_it():
    class Insists(type(build("residual")[0])):
        def forward(self, x):
            return super().forward(x.float())

    model, inputs = build("residual")
    model.__class__ = Insists
    _, report = verified_apply(model, cut_of(model, inputs), examples=[inputs])
    assert report.proof.dtype == "float32"
    assert report.proof.max_error < report.proof.tolerance


def test_a_batch_of_one_is_enough_for_the_train_mode_check():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip
    x = torch.randn(1, 3, 6, 6)
    _, report = verified_apply(model, cut_of(model, (x,)), examples=[x])
    assert report.proof.checks == ("eval", "train")


def test_examples_are_needed_and_must_fit():
    model, inputs = build("residual")
    edits = cut_of(model, inputs)
    with pytest.raises(UserError, match="at least one example"):
        verified_apply(model, edits, examples=[])
    with pytest.raises(UserError, match=r"does not run on the example of shape \(2, 1, 8, 8\)"):
        verified_apply(model, edits, examples=[torch.randn(2, 1, 8, 8)])
    assert verified_apply(model, [], examples=[])[1].removed == 0


def test_hooks_and_modes_survive_a_cut():
    model, inputs = build("residual")
    model.eval()
    model.bn0.train()
    seen = []
    model.conv1.register_forward_hook(lambda *_: seen.append(1))
    verified_apply(model, cut_of(model, inputs), examples=[inputs])
    assert seen == []
    assert (model.training, model.bn0.training) == (False, True)
    model(*inputs)
    assert seen == [1]
