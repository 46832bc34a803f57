"""Random networks: any cut of any of them is proven, and all operators are reached."""

import copy
import random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gracile.graph.capture import capture
from gracile.graph.oprule import rules
from gracile.graph.surgery import apply, remove_edits
from patterns.collected import ALL
from patterns.cuts import cut, expected_params, groups_of, half, outputs, trained_step, zeroed
from patterns.random_graph import MERGES, STATISTIC, TABLE, RandomNet, Step

NAMES = ["cat", *MERGES, *TABLE]
small = st.integers(0, 5)
steps = st.lists(
    st.builds(Step, st.sampled_from(NAMES), small, small, st.integers(2, 5)),
    min_size=1,
    max_size=8,
)


def network(program, seed=0):
    torch.manual_seed(seed)
    return RandomNet(program), (torch.randn(2, 3, 4, 4),)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(program=steps, seed=st.integers(0, 99))
def test_any_cut_of_a_random_network_is_proven_and_equals_zeros(program, seed):
    model, inputs = network(program, seed)
    rng = random.Random(seed)
    groups = list(groups_of(model, inputs).values())
    free = [g for g in groups if g.protected is None]
    gone = {g.id: half(g, rng) for g in free if rng.random() < 0.8}
    gone = {id: units for id, units in gone.items() if units}
    if not gone:
        return
    params = expected_params(model, groups, gone)
    original = copy.deepcopy(model)
    smaller, report = cut(model, inputs, groups, gone)
    assert report.params_after == params < report.params_before
    assert all(g.isfinite().all() for g in trained_step(copy.deepcopy(smaller), inputs).values())
    if not STATISTIC & original.names:
        zeroed(original, groups, gone)
        for a, b in zip(outputs(original, inputs), outputs(smaller, inputs), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8)


def test_every_operator_of_the_table_can_be_made():
    for name in TABLE:
        to_kind = [Step("to_tokens", 0, 0, 2)] if TABLE[name][0] == "tokens" else []
        model, inputs = network([*to_kind, Step(name, 0, 0, 3)])
        assert name in model.names
        assert model(*inputs).shape == (2, 3)


def test_patterns_and_random_networks_reach_every_rule():
    models = [p.build() for p in ALL.values()]
    models += [network([Step("to_tokens", 0, 0, 2), Step(name, 0, 0, 3)]) for name in NAMES]
    reached = set()
    for model, inputs in models:
        reached |= {node.op for node in capture(model, inputs)}
        groups = list(groups_of(model, inputs).values())
        gone = {g.id: [0] for g in groups if g.protected is None}
        smaller = apply(model, remove_edits(groups, gone, by="test"), example=inputs)
        reached |= {node.op for node in capture(smaller, inputs)}  # what took a call's place
    with_edits = {"exits"}  # comes with an edit of its own, see tests/early_exit
    assert set(rules()) - reached == with_edits
