"""Rules that see all layers: exact against all combinations, by hand, and in a session."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_factorize import Net, X, net
from torch.nn.functional import cross_entropy

from gracile import Recipe, Session
from gracile.errors import BindError, UserError
from gracile.lowrank.candidates import Candidate, ladder, response_error, work
from gracile.lowrank.ranks.knapsack import knapsack, least_error
from gracile.lowrank.ranks.sensitivity import descended, exchanged, sensitivity
from gracile.lowrank.scheme import factorize
from gracile.nn.chain import Layer, layer_of
from gracile.nn.schemes import chain_of
from gracile.nn.schemes import product as product_of

Y = torch.arange(4) % 10


def tables(*rows):
    """Rows of (cost, error)."""
    return [[Candidate((k,), c, e) for k, (c, e) in enumerate(row)] for row in rows]


def drawn(seed, rows, choices, whole=True):
    rng = np.random.default_rng(seed)
    draw = rng.integers(0, 30, (rows, choices)) if whole else rng.random((rows, choices))
    return rng.random((rows, choices)).tolist(), draw.tolist()


def brute(errors, costs, limit):
    best = None
    for picks in product(*(range(len(row)) for row in errors)):
        cost = sum(c[k] for c, k in zip(costs, picks, strict=True))
        error = sum(e[k] for e, k in zip(errors, picks, strict=True))
        if cost <= limit * (1 + 1e-9) and (best is None or error < best):
            best = error
    return best


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1), st.booleans())
def test_the_knapsack_is_the_best_of_all_combinations(seed, rows, choices, share, whole):
    errors, costs = drawn(seed, rows, choices, whole)
    least, most = (sum(f(row) for row in costs) for f in (min, max))
    limit = least + share * (most - least)
    picks = least_error(errors, costs, limit)
    assert sum(c[k] for c, k in zip(costs, picks, strict=True)) <= limit * (1 + 1e-9)
    got = sum(e[k] for e, k in zip(errors, picks, strict=True))
    assert got == pytest.approx(brute(errors, costs, limit), abs=1e-12)


def test_the_knapsack_of_a_deep_network_is_quick():
    errors, costs = drawn(0, 80, 12, whole=False)
    picks = least_error(errors, costs, 0.4 * sum(max(row) for row in costs))
    assert len(picks) == 80


def test_the_knapsack_where_greedy_errs_by_hand():
    """Budget 10 of 20: greedy takes the best ratio 1/6 and must then go on with 5/5."""
    made = tables([(10, 0), (4, 1), (1, 9)], [(10, 0), (5, 2)])
    assert knapsack(made, ratio=0.5) == [1, 1]
    made = tables([(10, 0), (5, 1)], [(10, 0), (5, 1.2), (0, 1.5)])
    assert knapsack(made, ratio=0.5) == [0, 2]


def test_sensitivity_steps_by_hand():
    """First 1 unit for 6 saved; then 2 for 5, not 8 for 3."""
    made = tables([(10, 0), (4, 1), (1, 9)], [(10, 0), (5, 2)])
    assert descended(made, 14) == [1, 0]
    assert descended(made, 10) == [1, 1]
    assert sensitivity(made, ratio=0.5) == [1, 1]


def test_exchanges_mend_what_steps_spoil():
    """Steps take 5 for 0.5, then 10 for 1.5; giving the first 5 back costs nothing."""
    made = tables([(10, 0), (5, 0.5)], [(10, 0), (0, 1.5)])
    assert descended(made, 10) == [1, 1]
    assert exchanged(made, [1, 1], 10) == [0, 1]


@given(st.integers(0, 1000), st.floats(0.3, 1.0))
def test_sensitivity_keeps_to_the_budget_and_never_beats_the_knapsack(seed, ratio):
    errors, costs = drawn(seed, 4, 4)
    made = [
        [Candidate(None, 30.0), *(Candidate((k,), c, e) for k, (c, e) in enumerate(pairs))]
        for pairs in (zip(c, e, strict=True) for c, e in zip(costs, errors, strict=True))
    ]
    if sum(min(c.cost for c in row) for row in made) > ratio * 120:
        return
    steps, best = sensitivity(made, ratio=ratio), knapsack(made, ratio=ratio)
    off = [sum(row[k].error for row, k in zip(made, p, strict=True)) for p in (steps, best)]
    assert sum(row[k].cost for row, k in zip(made, steps, strict=True)) <= ratio * 120 + 1e-6
    assert off[0] >= off[1] - 1e-12


def test_a_budget_out_of_reach_says_what_is_in_reach():
    made = tables([(10, 0), (6, 1)], [(10, 0), (8, 1)])
    with pytest.raises(UserError, match=r"have 20 multiply-adds, and at least 14 .* 70\.0% of it"):
        knapsack(made, ratio=0.5)
    for wrong, text in (({"of": "time"}, "of must be one of macs"), ({"by": "x"}, "by must be"),
                        ({"candidates": 0}, "candidates must be >= 1")):  # fmt: skip
        with pytest.raises(UserError, match=text):
            sensitivity(made, ratio=0.9, **wrong)


def test_a_ladder_has_equal_steps_on_the_period_below_the_layer():
    layer = Layer(64, 64, (3, 3), padding=(1, 1))
    steps = ladder("tucker2", layer, (8, 8), 6, 8)
    assert all(r % 8 == 0 for ranks in steps for r in ranks)
    costs = [work(chain_of("tucker2", layer, r), (8, 8)) for r in steps]
    assert costs == sorted(costs)
    assert costs[-1] < work(layer, (8, 8))
    assert len(ladder("svd", Layer(16, 16), (), 100, 8)) == 0  # 8 x 32 is no gain


def test_the_response_error_is_that_of_the_responses():
    module = net().grouped
    layer, rng = layer_of(module), torch.Generator().manual_seed(1)
    x = torch.randn(4, 50, 54, generator=rng)
    weight = module.weight.detach()
    near = product_of(chain_of("svd", layer, (3,)), factorize("svd", weight, layer, (3,)), layer)
    flat, off = (w.reshape(4, 6, 54) for w in (weight, near - weight))
    expected = (x @ off.mT).square().sum() / (x @ flat.mT).square().sum()
    got = response_error(weight, near, x.mT @ x, 4)
    assert got == pytest.approx(float(expected), rel=1e-5)


def session(rule, *, when="0ep", epochs=1, calibration=None, **options):
    entry = {"lowrank": "factorize", "when": {"at": when}, "rank": rule, "round_to": 1, **options}
    recipe = Recipe.build(methods={"r": entry}, train={"epochs": epochs})
    return Session(
        net(), recipe, example=X, calibration=calibration or [(X, Y)], steps_per_epoch=1,
        loss_of=cross_entropy,
    )  # fmt: skip


def begun(s):
    s.on_epoch_begin(0)
    s.on_minibatch_begin(0, 0, 1)
    return s


def macs(s):
    from gracile.analyze.cost import cost

    return sum(row.macs for row in cost(s.model, s.graph))


@pytest.mark.parametrize("rule", ["knapsack", "sensitivity"])
def test_a_session_keeps_to_the_budget_of_all_layers(rule):
    whole = macs(session({"name": rule, "ratio": 0.6}))
    s = begun(session({"name": rule, "ratio": 0.6}))
    assert macs(s) <= 0.6 * whole
    assert s.plan.of_kind("factorize")


def test_the_loss_of_each_candidate_is_that_of_the_network_with_it():
    s = session({"name": "sensitivity", "ratio": 0.9})
    method = s.methods[0]
    weight = s.model.wide.weight.detach().clone()
    values = [weight * 0.5, torch.zeros_like(weight), weight]
    got = s.losses_with(method, "wide.weight", values)
    assert torch.equal(s.model.wide.weight, weight)
    s.model.eval()
    with torch.no_grad():
        before = float(cross_entropy(s.model(X), Y))
        for value, found in zip(values, got, strict=True):
            s.model.wide.weight.copy_(value)
            assert found == pytest.approx(float(cross_entropy(s.model(X), Y)) - before, abs=1e-5)


def test_a_mask_does_not_lie_over_what_is_tried():
    methods = {
        "m": {"prune": "oneshot", "weights": "wide", "sparsity": 0.5, "when": {"at": "0ep"}},
        "r": {"lowrank": "factorize", "weights": "wide", "when": {"at": "0ep"}, "round_to": 1,
              "rank": {"name": "sensitivity", "ratio": 0.5}},
    }  # fmt: skip
    recipe = Recipe.build(methods=methods, train={"epochs": 1})
    s = Session(
        net(), recipe, example=X, steps_per_epoch=1, calibration=[(X, Y)], loss_of=cross_entropy
    )
    ones = torch.ones_like(s.model.wide.weight)
    s.set_mask("m", "wide.weight", torch.zeros_like(ones))
    plain = session({"name": "sensitivity", "ratio": 0.9})
    with torch.no_grad():
        plain.model.wide.weight.zero_()
    expected = plain.losses_with(plain.methods[0], "wide.weight", [ones])
    assert s.losses_with(s.methods[1], "wide.weight", [ones]) == pytest.approx(expected, abs=1e-5)


def test_ranks_chosen_together_survive_a_stop():
    rule = {"name": "knapsack", "ratio": 0.6}
    options = {"weights": ["wide", "grouped", "head"]}
    s = begun(session(rule, **options))
    again = session(rule, **options)
    again.load_state_dict(s.state_dict())
    assert again.methods[0].ranks == s.methods[0].ranks
    assert again.plan == s.plan


def test_what_stays_whole_is_in_the_ledger():
    s = begun(session({"name": "knapsack", "ratio": 0.95}))
    whys = [why for _, _, _, reason, why, _ in s.notes if reason == "no_gain"]
    assert any("'knapsack' spends its budget on keeping it whole" in w for w in whys)


def test_impossible_budgets_and_missing_losses_are_refused_before_training():
    with pytest.raises(BindError, match=r"'r': these layers have .* Ask for a larger ratio"):
        session({"name": "knapsack", "ratio": 0.01})
    recipe = Recipe.build(
        methods={"r": {"lowrank": "factorize", "rank": "sensitivity", "when": {"at": "end"}}}
    )
    with pytest.raises(BindError, match=r"'r' compares losses on calibration data"):
        Session(Net(), recipe, example=X, calibration=[X], epochs=0)
