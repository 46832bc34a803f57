"""Factors that a table of latencies does not predict to be faster are not made."""

import pytest
import torch
from test_factorize import X, net
from test_joint_ranks import Y, begun
from torch.nn.functional import cross_entropy

from gracile import Recipe, Session
from gracile.errors import UserError
from gracile.latency.difference import Point
from gracile.latency.replacement import program
from gracile.latency.table import Table
from gracile.latency.unit import Setting
from gracile.lowrank.candidates import ladder
from gracile.lowrank.faster import Faster, LatencyRef
from gracile.lowrank.predicted import Predicted
from gracile.nn.chain import Chain, build, drawn, layer_of
from gracile.nn.schemes import chain_of

LAYERS = {"wide": (2, 16, 12, 12), "grouped": (2, 24, 6, 6), "head": (2, 24)}
RUNTIME = "onnxruntime"


def table(path, price, rules=("svd",)):
    """A file with a price for each unit of the layers and of their candidates, alone and inside."""
    made, model = Table(), net()
    here, units = program(model, X, Setting(RUNTIME, "", ""))
    for name, shape in LAYERS.items():
        layer = layer_of(model.get_submodule(name))
        for scheme in rules:
            for ranks in ladder(scheme, layer, shape[2:], 4, 1):
                chain = chain_of(scheme, layer, ranks)
                module = build(chain, drawn(chain, torch.Generator()))
                units |= program(module, torch.zeros(shape), here)[1]
                other = net()
                setattr(other, name, module)
                units |= program(other, X, here)[1]
        units |= program(build(Chain((layer,))), torch.zeros(shape), here)[1]
    made.at(here).points |= {u: Point(price(u), 0.0, 14, 1.0) for u in units}
    made.save(path)
    return str(path)


def session(**options):
    entry = {
        "lowrank": "factorize", "when": {"at": "0ep"}, "round_to": 1, "weights": ["wide"], **options
    }  # fmt: skip
    recipe = Recipe.build(methods={"r": entry}, train={"epochs": 1})
    return Session(
        net(), recipe, example=X, calibration=[(X, Y)], steps_per_epoch=1, loss_of=cross_entropy
    )


def rank_of(k):
    return list(ladder("svd", layer_of(net().wide), (12, 12), 4, 1)[k])


def test_what_is_not_faster_is_refused_with_both_times(tmp_path):
    rule = {"name": "fixed", "ranks": rank_of(1)}
    file = table(tmp_path / "t.jsonl", lambda unit: 1.0)
    s = begun(session(rank=rule, latency=file))
    assert not s.plan.of_kind("factorize")
    (why,) = [why for a, _, _, reason, why, _ in s.notes if reason == "no_gain"]
    assert "rank" in why
    assert "onnxruntime would take 2.0000 ms for it (measured), 1.0000 ms as it is" in why


def test_what_is_faster_is_made(tmp_path):
    rule = {"name": "fixed", "ranks": rank_of(1)}
    file = table(tmp_path / "t.jsonl", lambda unit: 1e-3 * (1 + unit.weights))
    s = begun(session(rank=rule, latency=file))
    assert [e.at for e in s.plan.of_kind("factorize")] == ["wide"]


def test_times_of_a_layer_and_its_candidates_are_those_of_their_units(tmp_path):
    file = table(tmp_path / "t.jsonl", lambda unit: 1e-3 * unit.weights)
    faster = Faster(LatencyRef(file), "<python>")
    layer = layer_of(net().wide)
    chains = [chain_of("svd", layer, r) for r in ladder("svd", layer, (12, 12), 4, 1)]
    shape = LAYERS["wide"]

    def expected(chain):
        units = program(build(chain), torch.zeros(shape), faster.times.setting)[1]
        return sum(n * 1e-3 * unit.weights for unit, n in units.items())

    found = Predicted(faster).ms(layer, chains, shape)
    assert found == pytest.approx([expected(Chain((layer,))), *map(expected, chains)], rel=1e-6)


def test_what_the_table_does_not_know_is_never_chosen(tmp_path):
    made = Table()
    here, units = program(build(Chain((layer_of(net().wide),))), torch.zeros(LAYERS["wide"]),
                          Setting(RUNTIME, "", ""))  # fmt: skip
    made.at(here).points |= {u: Point(1.0, 0.0, 14, 1.0) for u in units}
    made.save(tmp_path / "t.jsonl")
    faster = Faster(LatencyRef(str(tmp_path / "t.jsonl")), "<python>")
    layer = layer_of(net().wide)
    _, depthwise = Predicted(faster).ms(layer, [chain_of("cp3", layer, (4,))], LAYERS["wide"])
    assert depthwise == float("inf")


def test_a_budget_of_milliseconds_is_kept(tmp_path):
    file = table(tmp_path / "t.jsonl", lambda unit: 1e-3 * unit.weights)
    rule = {"name": "knapsack", "of": "latency", "ratio": 0.7, "candidates": 4}
    s = begun(session(rank=rule, latency=file, weights=list(LAYERS)))
    layers = [layer_of(net().get_submodule(n)) for n in LAYERS]
    made = {e.at: e for e in s.plan.of_kind("factorize")}
    assert made
    now = [
        chain_of("svd", layer, made[n].ranks).params if n in made else layer.params
        for n, layer in zip(LAYERS, layers, strict=True)
    ]
    assert sum(now) <= 0.72 * sum(layer.params for layer in layers)


def test_milliseconds_without_a_table_are_refused():
    with pytest.raises(UserError, match=r"of: latency needs a table\. Write latency: FILE"):
        session(rank={"name": "knapsack", "of": "latency"})
