"""Bits chosen within a limit: what is kept to, what stays, what is refused, how it is told."""

import json

import pytest
import torch
from quant_session import PROFILE, batch, labelled, net
from torch.nn import functional as F

from gracile.errors import BindError, RecipeError, UserError
from gracile.quantize import choosing, engine
from gracile.quantize.sensitivity import fisher_traces
from gracile.recipe.load import loads
from gracile.train.session import Session

NUMEL = {"conv1.weight": 162, "conv2.weight": 324, "fc.weight": 30}


@pytest.fixture(autouse=True)
def _profile(monkeypatch):
    monkeypatch.setattr(engine, "load_profile", lambda name: PROFILE)
    monkeypatch.setattr(engine, "sums_saturate", lambda: False)


def session(precision, more="", name="ptq", when="at: end", epochs=0, calibration=None, path="r"):
    text = (
        f"recipe: 1\ntrain: {{epochs: {epochs}}}\nmethods:\n"
        f"  q: {{quantize: {name}, precision: {precision}, {more} when: {{{when}}}}}\n"
    )
    model = net()
    return Session(
        model,
        loads(text, name=path),
        torch.optim.SGD(model.parameters(), lr=0.01) if epochs else None,
        example=batch(99, 2),
        steps_per_epoch=4 if epochs else None,
        calibration=[labelled(k) for k in range(3)] if calibration is None else calibration,
        loss_of=F.cross_entropy,
    )


def bits(s):
    """Address or node -> bits, at the end."""
    return {e.at: e.bits for e in s.finish().plan.of_kind("bits")}


def size(found):
    return sum(found[a] * n for a, n in NUMEL.items()) / (8 * sum(NUMEL.values()))


@pytest.mark.parametrize("sensitivity", ["fisher", "hessian"])
@pytest.mark.parametrize("limit", [0.55, 0.7, 0.9])
def test_the_size_stays_within_its_limit(limit, sensitivity):
    s = session(f"{{limit: {{size: {limit}}}, sensitivity: {sensitivity}}}")
    found = bits(s)
    assert size(found) <= limit
    assert {found[a] for a in NUMEL} == {4, 8}
    assert {b for a, b in found.items() if a not in NUMEL} == {8}


def test_it_is_the_best_by_what_the_notes_say():
    s = session("{bits: [3, 4, 8], limit: {size: 0.6}}")
    method = s.methods[0]
    search = method._search(s)
    weights = {u.address: s.parameter(u.address) for u in search.units}
    traces = fisher_traces(lambda: s.losses(method, at_a_time=1), weights)
    moved = {w: method._all_moved(s, w) for w in (3, 4, 8)}
    losses = [[traces[u.address] * moved[w][u.address] for w, _ in u.choices] for u in search.units]
    best = search.bits(search.best(losses)).weights
    found = bits(s)
    assert {a: found[a] for a in NUMEL} == best
    told = {n[0]: n[4] for n in s.notes if n[1] == "precision" and n[5] == "q"}
    assert all(told[a].startswith(f"{best[a]} bits chosen; sensitivity at 3 bits") for a in NUMEL)


def test_pairs_keep_operands_of_one_addition_together():
    for limit in (0.4, 0.6, 0.8):
        found = bits(session(f"{{bits: [[4, 4], [8, 8]], limit: {{bit_operations: {limit}}}}}"))
        assert found["relu"] == found["bn2"]
        for weight, reads in (("conv1", "x"), ("conv2", "relu"), ("fc", "mean")):
            assert found[f"{weight}.weight"] == found[reads]
        macs = {"conv1": 162 * 64, "conv2": 324 * 64, "fc": 30}
        used = sum(m * found[f"{w}.weight"] ** 2 for w, m in macs.items())
        assert used <= limit * 64 * sum(macs.values())


def test_edges_and_overrides_stay_as_they_are():
    more = "edges_bits: 6, overrides: [{weights: fc, weight_bits: 5}],"
    found = bits(session("{limit: {size: 0.95}}", more))
    assert (found["conv1.weight"], found["fc.weight"], found["conv2.weight"]) == (6, 5, 8)
    found = bits(session("{limit: {size: 0.62}}", more))
    assert (found["conv1.weight"], found["fc.weight"], found["conv2.weight"]) == (6, 5, 4)


def test_weights_alone():
    s = session("{limit: {mac_bits: 0.7}}", "activations: false,")
    assert sorted(bits(s).values()) in ([4, 4, 8], [4, 8, 8])


def test_a_hessian_that_cannot_be_had_is_told(monkeypatch):
    def never(*_args, **_options):
        raise RuntimeError("no second derivative")

    want = bits(session("{limit: {size: 0.7}, sensitivity: fisher}"))
    monkeypatch.setattr(choosing, "hessian_traces", never)
    s = session("{limit: {size: 0.7}, sensitivity: hessian}")
    assert bits(s) == want
    ((code, text),) = s.warnings
    assert code == "precision-fisher"
    assert "cannot be differentiated twice (no second derivative)" in text


def test_traces_that_are_not_positive_are_told(monkeypatch):
    traces = {"conv1.weight": -1.0, "conv2.weight": 2.0, "fc.weight": 0.5}
    monkeypatch.setattr(choosing, "hessian_traces", lambda *_a, **_k: traces)
    s = session("{limit: {size: 0.7}, sensitivity: hessian}")
    bits(s)
    assert [code for code, _ in s.warnings] == ["precision-flat"]
    monkeypatch.setattr(choosing, "hessian_traces", lambda *_a, **_k: dict.fromkeys(traces, -1.0))
    s = session("{limit: {size: 0.7}, sensitivity: hessian}")
    bits(s)
    assert [code for code, _ in s.warnings] == ["precision-fisher"]


def test_samples_end_early():
    s = session("{limit: {size: 0.7}, samples: 10}")
    seen = []
    real = s.loss_of
    s.loss_of = lambda out, y: (seen.append(len(y)), real(out, y))[1]
    bits(s)
    assert seen == [1] * 10


def test_the_model_is_left_in_its_mode():
    s = session("{limit: {size: 0.7}, sensitivity: hessian}")
    s.model.train()
    s.methods[0].choose_precision(s)
    assert all(m.training for m in s.model.modules())
    assert all(p.grad is None for p in s.model.parameters())


# --- latency

TIMES = {
    "conv1": {"4": 1.0, "8": 2.0},
    "conv2": {"4": 2.0, "8": 5.0},
    "fc": {"4": 0.5, "8": 0.5},
}


def test_latency_by_a_table_in_the_recipe_or_beside_it(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(TIMES))
    for table in ("t.json", json.dumps(TIMES)):
        for limit in ("latency_ms: 5.6", "latency: 0.75"):
            precision = f"{{limit: {{{limit}}}, table: {table}}}"
            found = bits(session(precision, path=str(tmp_path / "r.yaml")))
            assert (found["conv1.weight"], found["conv2.weight"], found["fc.weight"]) == (8, 4, 8)


def test_tables_that_miss_something_are_refused(tmp_path):
    rest = {k: v for k, v in TIMES.items() if k != "fc"}
    cases = (
        (rest, "precision.table has no times of 'fc'"),
        ({**TIMES, "fc": {"8": 0.5}}, "precision.table.fc has no time at 4 bits"),
    )
    for table, says in cases:
        with pytest.raises(BindError, match=says):
            session(f"{{limit: {{latency_ms: 5}}, table: {json.dumps(table)}}}")
    with pytest.raises(UserError, match="no such file"):
        session("{limit: {latency_ms: 5}, table: none.json}")
    (tmp_path / "t.json").write_text("[1]")
    with pytest.raises(UserError, match="must be JSON such as"):
        session("{limit: {latency_ms: 5}, table: t.json}", path=str(tmp_path / "r.yaml"))


# --- refusals


@pytest.mark.parametrize(
    ("precision", "more", "says"),
    [
        ("{limit: {size: 0.4}}", "", r"size: 0.4 cannot be reached with bits \[4, 8\]; .* is 0.5"),
        ("{limit: {size_mb: 1e-4}}", "", "size_mb: 0.0001 cannot be reached.*smallest is 0.000258"),
        ("{limit: {size: 0.6}}", "edges_bits: 8,", r"the smallest is 0\.68"),
        (
            "{bits: [[4, 8], [8, 4]], limit: {size: 0.55, bit_operations: 0.4}}",
            "",
            "bit_operations: 0.4 cannot be reached",
        ),
        ("{bits: [4], limit: {size: 0.6}}", "", "nothing to choose"),
    ],
)
def test_what_cannot_be_reached_is_refused_before_anything_else(precision, more, says):
    with pytest.raises(BindError, match=says):
        session(precision, more)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("precision: {bits: [4, 8]}", "q.precision needs 'limit'|limit is missing|needs 'limit'"),
        ("precision: {limit: {}}", "needs a limit; write such as size: 0.6"),
        ("precision: {bits: [4, [8, 8]], limit: {size: 1}}", "numbers or pairs, not both"),
        ("precision: {bits: [[4, 4], [4, 8]], limit: {size: 1}}", "4 bits of weight twice"),
        ("precision: {bits: [1, 8], limit: {size: 1}}", "1 bit is too few here"),
        ("precision: {limit: {latency: 1}}", "limit.latency needs a table"),
        ("weight_bits: 4, precision: {limit: {size: 1}}", "keep one"),
        ("activations: false, precision: {limit: {bit_operations: 1}}", "activations is false"),
        ("precision: {limit: {sise: 1}}", "has no key 'sise'. Nearest: 'size'"),
    ],
)
def test_wrong_options_are_refused_with_their_place(options, says):
    with pytest.raises(RecipeError, match=f"r.yaml:3: .*({says})"):
        loads(f"recipe: 1\nmethods:\n  q: {{quantize: ptq, {options}}}\n", name="r.yaml")


def test_it_needs_labels():
    s = session("{limit: {size: 0.7}}", calibration=[batch(0)])
    with pytest.raises(BindError, match="needs calibration batches with labels"):
        s.finish()


# --- time


@pytest.mark.parametrize("name", ["qat", "lsq", "learned", "pact", "dorefa", "wrpn"])
def test_a_resumed_run_does_not_choose_again(name, monkeypatch):
    def started():
        return session("{limit: {size: 0.8}}", name=name, when="start: 0ep", epochs=1)

    first = started()
    method = first.methods[0]
    method.on_fire(first, 1.0)
    state = method.state_dict()
    assert {w["bits"] - 4 for w in state["placement"]["weights"]} <= {0, 1, 4}
    monkeypatch.setattr(choosing.Choosing, "_choose", lambda *_: pytest.fail("chose again"))
    again = started()
    again.methods[0].load_state_dict(state)
    assert again.methods[0].placement == method.placement
