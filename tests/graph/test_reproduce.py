"""A failed proof comes with the smallest cut that fails, the operator and its neighbours."""

import json

import numpy as np
import pytest
import torch
from channel_zoo import build
from torch import nn

from gracile.core.plan import Architecture, Plan, Remove
from gracile.errors import VerificationError
from gracile.graph.capture import capture
from gracile.graph.dependency import channel_groups
from gracile.graph.ops.shape import Flatten
from gracile.graph.reproduce import PROOFS, Refusal, operator, smallest
from gracile.graph.surgery import remove_edits, verified_apply

X = torch.randn(2, 3, 8, 8)


def failing(monkeypatch, name="cat_twice"):
    model, inputs = build(name)
    right = Flatten.flow

    def wrong(self, node, values, flow):
        value = right(self, node, values, flow)
        return value.with_dim(1, np.roll(value.dims[1], 1))

    monkeypatch.setattr(Flatten, "flow", wrong)
    groups = channel_groups(model, capture(model, inputs))
    edits = remove_edits(groups, {"conv.weight": [0, 1, 2]}, "t")
    return model, inputs, edits


def test_units_are_left_out_until_one_is_left(monkeypatch):
    model, inputs, edits = failing(monkeypatch)
    with pytest.raises(VerificationError) as e:
        verified_apply(model, edits, examples=[inputs])
    (edit,) = e.value.edits
    assert [len(m.keep) for m in edit.group if m.at == "conv.weight"] == [3]
    assert edit.by == "t"
    assert e.value.operator.id == "flatten"


def test_the_smallest_cut_fails_again_by_itself(monkeypatch):
    model, inputs, edits = failing(monkeypatch)
    with pytest.raises(VerificationError) as first:
        verified_apply(model, edits, examples=[inputs])
    with pytest.raises(VerificationError) as second:
        verified_apply(model, first.value.edits, examples=[inputs])
    assert second.value.edits == first.value.edits
    assert str(second.value) == str(first.value)


def test_not_made_small_on_request(monkeypatch):
    model, inputs, edits = failing(monkeypatch)
    with pytest.raises(VerificationError) as e:
        verified_apply(model, edits, examples=[inputs], reproduce=False)
    assert e.value.edits == tuple(edits)


class Search:
    """A proof that fails if certain indices of '0' go together."""

    def __init__(self, *guilty):
        self.guilty, self.asked = guilty, []

    def __call__(self, edits):
        gone = {(m.at, i) for e in edits for m in e.group for i in range(m.of) if i not in m.keep}
        self.asked.append(gone)
        if gone >= set(self.guilty):
            raise VerificationError("differs", edits, None)


def layers(n=8, width=8):
    model = nn.Sequential(
        nn.Conv2d(3, width, 1), *(nn.Conv2d(width, width, 1) for _ in range(n)),
        nn.Conv2d(width, 2, 1),
    )  # fmt: skip
    groups = channel_groups(model, capture(model, X))
    gone = {g.id: [1, 3, 5, 6] for g in groups if g.protected is None}
    return groups, remove_edits(groups, gone, "t")


def first_error(search, edits):
    with pytest.raises(VerificationError) as e:
        search(edits)
    return e.value


def test_one_guilty_unit_of_nine_groups_is_found_in_few_proofs():
    groups, edits = layers()
    assert len(edits) == 9
    search = Search(("4.weight", 5), ("4.bias", 5))
    error = smallest(first_error(search, edits), search, groups)
    (edit,) = error.edits
    gone = {m.at: set(range(m.of)) - set(m.keep) for m in edit.group}
    assert gone == {"4.weight": {5}, "4.bias": {5}, "5.weight": {5}}
    assert len(search.asked) <= 1 + PROOFS


def test_no_more_proofs_than_allowed():
    groups, edits = layers()
    search = Search(("4.weight", 5))
    error = smallest(first_error(search, edits), search, groups, proofs=2)
    assert len(search.asked) <= 3
    assert error.edits


def test_what_only_fails_together_stays_together():
    groups, edits = layers(2)
    search = Search(("0.weight", 1), ("2.weight", 6))
    error = first_error(search, edits)
    assert smallest(error, search, groups).edits == tuple(edits)


def test_an_error_without_edits_stays_as_it_is():
    error = VerificationError("no finite number")
    assert smallest(error, Search(), []) is error


def test_an_operator_knows_its_neighbours():
    model, inputs = build("residual")
    found = operator(capture(model, inputs), "conv2")
    assert found.op == "conv"
    assert found.shape[1] == 6
    assert [(o.id, o.op) for o in found.inputs] == [("dropout", "dropout")]
    assert [(o.id, o.inputs) for o in found.readers] == [("bn2", ())]


def test_a_refusal_is_a_plan_from_the_original(monkeypatch, tmp_path):
    model, inputs, edits = failing(monkeypatch)
    with pytest.raises(VerificationError) as e:
        verified_apply(model, edits, examples=[inputs])
    before = Plan(architecture=Architecture(name="net")).extended([edits[0]])
    refusal = Refusal.of(e.value, before)
    refusal.save(tmp_path / "refused")
    data = json.loads((tmp_path / "refused" / "conv.weight.json").read_text())
    assert data["group"] == "conv.weight"
    assert data["why"] == str(e.value)
    assert data["operator"]["op"] == "flatten"
    assert set(data["operator"]["inputs"][0]) == {"id", "op", "shape"}
    plan = Plan.model_validate(data["plan"])
    assert [type(edit) for edit in plan] == [Remove, Remove]
    assert [edit.id for edit in plan] == ["e0", "e1"]
    other = Refusal.of(e.value, Plan(architecture=Architecture(name="net")))
    for each in (other, refusal, other):  # a run saves all it has again and again
        each.save(tmp_path / "refused")
    files = sorted((tmp_path / "refused").iterdir())
    assert [f.name for f in files] == ["conv.weight.2.json", "conv.weight.json"]
    assert [f.read_text() for f in files] == [other.to_json(), refusal.to_json()]
