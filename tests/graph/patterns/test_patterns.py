"""Every pattern: the groups worked out by hand, and cuts that compute what zeros compute."""

import copy
import random
from collections import Counter

import pytest
import torch

from gracile.graph.capture import capture
from gracile.graph.dependency import ChannelGroup
from patterns.collected import ALL, Pattern
from patterns.cuts import (
    cut,
    expected_params,
    groups_of,
    half,
    outputs,
    trained_step,
    zeroed,
)

every_pattern = pytest.mark.parametrize("pattern", ALL.values(), ids=ALL)


def free_groups(groups: dict[str, ChannelGroup]) -> list[ChannelGroup]:
    return [g for g in groups.values() if g.protected is None]


def test_there_are_enough_patterns():
    assert len(ALL) >= 60


@every_pattern
def test_groups_are_those_worked_out_by_hand(pattern: Pattern):
    model, inputs = pattern.build()
    groups = groups_of(model, inputs)
    free = {g.id: len(g.units) for g in free_groups(groups)}
    wanted = {id: units for id, (units, _) in pattern.free.items()}
    assert {id: free.get(id) for id in wanted} == wanted, {
        g.id: g.protected for g in groups.values()
    }
    if not pattern.more:
        assert free == wanted
    kinds = Counter((g.kind, len(g.units)) for g in free_groups(groups))
    assert Counter(pattern.kinds) <= kinds, [
        (g.id, g.kind, len(g.units), g.protected) for g in groups.values()
    ]
    for id, reason in pattern.protected.items():
        assert reason in str(groups[id].protected)


@every_pattern
def test_one_unit_takes_the_parameters_counted_by_hand(pattern: Pattern):
    for id, (_, params) in pattern.free.items():
        if params is None:
            continue
        model, inputs = pattern.build()
        groups = groups_of(model, inputs)
        _, report = cut(model, inputs, list(groups.values()), {id: [0]})
        assert report.removed == params, id


@every_pattern
def test_a_cut_model_takes_the_batches_that_the_whole_one_takes(pattern: Pattern):
    model, inputs = pattern.build()
    larger = tuple(torch.cat([x, x[:1]]) if x.dim() else x for x in inputs)
    try:
        wanted = [x.shape for x in outputs(copy.deepcopy(model), larger)]
    except Exception:
        return  # its first dim is no batch, or its size is written in the forward
    groups = groups_of(model, inputs)
    rng = random.Random(2)
    gone = {g.id: half(g, rng) for g in free_groups(groups)[:1]}
    if any(gone.values()):
        smaller, _ = cut(model, inputs, list(groups.values()), gone)
        assert [x.shape for x in outputs(smaller, larger)] == wanted


@every_pattern
def test_nothing_that_writes_channels_is_missing(pattern: Pattern):
    model, inputs = pattern.build()
    graph = capture(model, inputs)
    groups = groups_of(model, inputs)
    written = {at for g in groups.values() for at in g.producers}
    tied = {
        id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))
    }
    for node in graph.of_op("conv", "conv_transpose", "linear"):
        if "weight" in node.params:
            assert tied[id(model.get_parameter(node.params["weight"]))] in written
    for group in groups.values():
        assert group.units
        assert set(group.overlaps) <= set(groups)


@every_pattern
def test_each_group_alone_and_all_together(pattern: Pattern):
    model, inputs = pattern.build()
    rng = random.Random(pattern.name)
    groups = list(groups_of(model, inputs).values())
    gone = {g.id: half(g, rng) for g in groups if g.protected is None}
    assert all(gone.values())
    for chosen in [*({id: units} for id, units in gone.items()), gone]:
        if chosen:
            check_cut(pattern, groups, chosen)


def check_cut(pattern: Pattern, groups: list[ChannelGroup], gone: dict[str, list[int]]) -> None:
    """Proven, trainable, as small as it should be, and equal to zeros where zeros mean the same."""
    model, inputs = pattern.build()
    original = copy.deepcopy(model)
    before = trained_step(copy.deepcopy(model), inputs)
    params = expected_params(model, groups, gone)
    smaller, report = cut(model, inputs, groups, gone)
    assert report.proof is not None
    assert report.proof.max_error <= report.proof.tolerance
    assert report.params_after == params < report.params_before
    after = trained_step(copy.deepcopy(smaller), inputs)
    assert set(after) == set(before)
    assert all(g.isfinite().all() for g in after.values())
    if pattern.masked:
        zeroed(original, groups, gone)
        for a, b in zip(outputs(original, inputs), outputs(smaller, inputs), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8)


@every_pattern
def test_a_cut_model_can_be_analysed_and_cut_again(pattern: Pattern):
    model, inputs = pattern.build()
    groups = groups_of(model, inputs)
    # A group that is left with one unit (one head) has nothing to choose and no id of its own.
    gone = {g.id: g.removable([1]) for g in free_groups(groups) if len(g.units) > 2}
    smaller, _ = cut(model, inputs, list(groups.values()), gone) if gone else (model, None)
    left = groups_of(smaller, inputs)
    assert set(left) == set(groups)
    for id, group in groups.items():
        assert len(left[id].units) == len(group.units) - len(gone.get(id, ()))
        if group.protected is not None:
            assert left[id].protected is not None
    again = {g.id: units for g in free_groups(left) if (units := g.removable([0]))}
    if again:
        _, report = cut(smaller, inputs, list(left.values()), again)
        assert report.removed > 0
