"""Expansion: what was cut comes back bit for bit, in any order, and what was trained stays."""

import copy
import random

import pytest
import torch
from channel_zoo import ZOO, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patterns.collected import ALL as PATTERNS
from torch import nn

from gracile.core.plan import Architecture, Plan, Skip
from gracile.errors import UserError, VerificationError
from gracile.graph import expand as expand_module
from gracile.graph.additions import cuts
from gracile.graph.capture import capture
from gracile.graph.dependency import channel_groups
from gracile.graph.expand import apply_adds, expand, inverse
from gracile.graph.instrument import instrument
from gracile.graph.surgery import apply, prepared, remove_edits
from gracile.nn.quantized import ActivationQuantizer

ARCH = Architecture(name="net")
random_seeds = given(seed=st.integers(0, 10**6))
few = settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))


def cut(model, inputs, seed, plan=None):
    """Remove random units of every group that may be cut, one edit a group."""
    rng = random.Random(seed)
    groups = channel_groups(model, capture(model, inputs))
    gone = {}
    for g in groups:
        if g.protected is None and len(g.units) > 1:
            order = rng.sample(range(len(g.units)), rng.randint(1, len(g.units) - 1))
            gone[g.id] = g.removable(order)
    edits = remove_edits(groups, gone, by="test")
    return apply(model, edits, example=inputs), (plan or Plan(architecture=ARCH)).extended(edits)


def by_hand(model, inputs, gone):
    """The same for units that are named."""
    edits = remove_edits(channel_groups(model, capture(model, inputs)), gone, "test")
    return apply(model, edits, example=inputs), Plan(architecture=ARCH).extended(edits)


def replayed(original, inputs, plan):
    return apply(copy.deepcopy(original), cuts(plan), example=inputs)


def counts(model):
    """All that a module says of itself: channels, groups, features, channel maps."""
    return {name: str(m) for name, m in model.named_modules() if name and not list(m.children())}


def assert_same(a, b, inputs):
    """The same tensors bit for bit and the same counts, with channel maps in both."""
    assert counts(prepared(a, inputs)) == counts(prepared(b, inputs))
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("name", ZOO)
@few
@random_seeds
def test_remove_then_add_is_the_original_bit_for_bit(name, seed):
    original, inputs = build(name, seed)
    model, plan = cut(copy.deepcopy(original), inputs, seed)
    done = expand(model, plan, [e.id for e in plan], original, examples=[inputs])
    assert done.proof.max_error < 1e-10
    assert done.params_after == sum(p.numel() for p in original.parameters()) > done.params_before
    assert_same(model, original, inputs)


@pytest.mark.parametrize("name", ZOO)
@few
@random_seeds
def test_remove_a_and_b_then_add_a_is_remove_b(name, seed):
    original, inputs = build(name, seed)
    model, plan = cut(copy.deepcopy(original), inputs, seed)
    if any(g.protected is None for g in channel_groups(model, capture(model, inputs))):
        model, plan = cut(model, inputs, seed + 1, plan)
    drop = set(random.Random(seed).sample(range(len(plan)), max(1, len(plan) // 2)))
    done = expand(model, plan, [f"e{k}" for k in drop], original, examples=[inputs])
    assert_same(model, replayed(original, inputs, done.plan), inputs)
    model = apply(model, inverse(done.plan.of_kind("add")), example=inputs)
    assert_same(model, replayed(original, inputs, plan), inputs)


HEADS = (
    "Separate", "ByMatmul", "FusedQKV", "FusedChunks", "ByEinsum", "Grouped", "TransposedGrouped",
    "ResNeXt",
)  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_whole_heads_and_widths_come_back_in_any_order(name):
    original, inputs = PATTERNS[name].build()
    cut_once, plan = cut(copy.deepcopy(original), inputs, 0)
    assert len(plan) > 1
    for k in range(len(plan)):
        model = copy.deepcopy(cut_once)
        done = expand(model, plan, f"e{k}", original, examples=[inputs])
        assert_same(model, replayed(original, inputs, done.plan), inputs)
        expand(model, done.plan, 1.0, original, examples=[inputs])
        assert_same(model, original, inputs)


@pytest.mark.parametrize("name", ["residual", "concat", "option_a"])
@few
@random_seeds
def test_a_share_of_every_group_comes_back(name, seed):
    original, inputs = build(name, seed)
    model, plan = cut(copy.deepcopy(original), inputs, seed)
    gone = plan.to_original()
    done = expand(model, plan, 0.5, original, examples=[inputs])
    for axis, there in done.plan.to_original().items():
        assert set(gone[axis]) <= set(there)
    if cuts(done.plan):
        expand(model, done.plan, 1.0, original, examples=[inputs])
    assert_same(model, original, inputs)


def test_the_largest_filters_come_back_first():
    original = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        original[0].weight.copy_(torch.tensor([[1.0], [-3.0], [2.0], [9.0]]))
    x = torch.randn(3, 1)
    model, plan = by_hand(copy.deepcopy(original), x, {"0.weight": {0, 1, 2}})
    done = expand(model, plan, 0.3, original, examples=[x])  # 0.3 of 3 units: one
    assert done.edits[0].origin == ((1,), (1,))
    assert model[0].weight.flatten().tolist() == [-3, 9]
    assert done.tensors["added1.0.weight.0"].tolist() == [[-3]]


def test_trained_values_stay_and_only_new_places_are_the_originals():
    original, inputs = build("residual")
    gone = {"conv1.weight": [0, 3], "stem.weight": [1]}
    model, plan = by_hand(copy.deepcopy(original), inputs, gone)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
        model.bn1.running_mean.fill_(8.0)
    first = next(e for e in plan if e.group[0].at == "conv1.weight")
    expand(model, plan, first.id, original, examples=[inputs])
    for i in range(5):
        fresh = i in (0, 3)
        wanted = original.conv1.weight[i, [0, 2, 3, 4, 5]] if fresh else torch.full((5, 3, 3), 7.0)
        assert torch.equal(model.conv1.weight[i], wanted)
        assert model.bn1.running_mean[i] == (original.bn1.running_mean[i] if fresh else 8)
    assert model.stem.weight.shape[0] == 5


def test_parameters_stay_the_same_objects_and_new_state_is_zero():
    original, inputs = build("residual")
    model, plan = cut(copy.deepcopy(original), inputs, 1)
    optimizer = torch.optim.Adam(model.parameters())
    loss = model(*inputs).square().mean()
    loss.backward()
    optimizer.step()
    weight = model.conv1.weight
    moment = optimizer.state[weight]["exp_avg"].clone()
    expand(model, plan, "test", original, examples=[inputs], optimizer=optimizer)
    assert model.conv1.weight is weight
    assert weight.grad is None
    there = plan.to_original()
    rows, columns = there["conv1.weight", 0], there["conv1.weight", 1]
    grown = optimizer.state[weight]["exp_avg"]
    assert grown.shape == weight.shape == (5, 6, 3, 3)
    assert torch.equal(grown[rows][:, columns], moment)
    assert grown.count_nonzero() == moment.count_nonzero()
    model(*inputs).square().mean().backward()
    optimizer.step()
    assert loss.requires_grad


def test_a_graph_module_that_shares_the_parameters_follows():
    original, inputs = build("option_a")
    model, plan = cut(copy.deepcopy(original), inputs, 2)
    laid = instrument(capture(model, inputs), {"conv": ActivationQuantizer()})
    expand(laid, plan, 1, original, examples=[inputs])
    assert_same(model, original, inputs)


def test_a_larger_model_that_computes_something_else_is_refused(monkeypatch):
    original, inputs = build("residual")
    model, plan = cut(copy.deepcopy(original), inputs, 0)
    before = copy.deepcopy(model)
    real = expand_module.apply_adds

    def wrong(larger, *args, **options):
        real(larger, *args, **options)
        larger.bn1.register_forward_hook(lambda m, a, out: out + out.mean(1, keepdim=True))

    monkeypatch.setattr(expand_module, "apply_adds", wrong)
    with pytest.raises(VerificationError, match="changed what the model computes"):
        expand(model, plan, 1.0, original, examples=[inputs])
    assert_same(model, before, inputs)


def test_what_does_not_fit_is_refused_before_anything_is_touched():
    original, inputs = build("residual")
    model, plan = cut(copy.deepcopy(original), inputs, 0)
    for what, message in [
        (0.0, r"must be in \(0, 1\], got 0.0"),
        ("e9", "no step 'e9'"),
        ([], "nothing to add back"),
    ]:
        with pytest.raises(UserError, match=message):
            expand(model, plan, what, original, examples=[inputs])
    with pytest.raises(UserError, match=r"e\d is of kind 'skip'"):
        expand(model, plan.extended([Skip(block="x")]), f"{len(plan)}", original, examples=[inputs])
    with pytest.raises(UserError, match="at least one example input"):
        expand(model, plan, 1.0, original, examples=[])
    with pytest.raises(UserError, match=r"the model has 6 indices of .*; give the plan that led"):
        expand(original, plan, 1.0, original, examples=[inputs])
    with pytest.raises(UserError, match="the original has"):
        apply_adds(model, plan, [], model)
