"""Two networks side by side: costs and zeros as they are, distances as computed by hand."""

import copy
import csv

import pytest
import torch
from torch import nn

from gracile import capture, channel_groups
from gracile.analyze.comparison import compare_models
from gracile.errors import UserError
from gracile.graph.surgery import apply, remove_edits


class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.second(torch.relu(self.first(x))).mean((2, 3)))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return Net()


def test_a_network_beside_itself_is_the_same():
    model = net().train()
    found = compare_models(model, copy.deepcopy(model), X)
    assert {o.status for o in found.operators} == {"same"}
    assert {o.distance for o in found.operators} == {0.0}
    assert found.one == found.other
    assert model.training


def test_a_cut_changes_shapes_and_costs_and_what_follows():
    model, small = net(), net()
    graph = capture(small, X)
    groups = channel_groups(small, graph)
    (group,) = [g for g in groups if "first.weight" in g.producers]
    small = apply(small, remove_edits(groups, {group.id: [0, 1]}, "t"), example=X, graph=graph)
    found = compare_models(model, small, X)
    by = {o.id: o for o in found.operators}
    assert [o.id for o in found.of_status("changed")] == ["first", "relu", "second"]
    first = by["first"]
    assert (first.one.shape, first.other.shape) == ((6, 8, 8), (4, 8, 8))
    assert (first.one.macs, first.other.macs) == (64 * 27 * 6, 64 * 27 * 4)
    assert (first.one.params, first.other.params) == (6 * 28, 4 * 28)
    assert first.distance is None  # nothing to compare index by index
    assert by["second"].distance > 0
    assert found.one.macs - found.other.macs == 64 * (27 * 2 + 2 * 4)


def test_zeros_are_counted_and_the_distance_is_that_of_the_outputs():
    model, other = net(), net()
    with torch.no_grad():
        other.head.weight[:2] = 0
        features = model.second(torch.relu(model.first(X))).mean((2, 3))
        a, b = model.head(features), other.head(features)
    found = compare_models(model, other, X)
    (changed,) = found.of_status("changed")
    assert (changed.id, changed.one.zeros, changed.other.zeros) == ("head", 0.0, 0.4)
    assert changed.distance == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-5)


def test_operators_of_one_network_only():
    class Longer(Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.head(self.extra(self.second(self.first(x)).mean((2, 3))))

    found = compare_models(net(), Longer(), X)
    assert [o.id for o in found.of_status("gone")] == ["relu"]
    assert [o.id for o in found.of_status("new")] == ["extra"]
    rows = {r["operator"]: r for r in csv.DictReader(found.to_csv().splitlines())}
    assert (rows["relu"]["shape"], rows["relu"]["shape_other"]) == ("6x8x8", "")
    assert rows["extra"]["params_other"] == "8"
    assert len(found.to_dict()["operators"]) == len(found.operators)


def test_both_must_take_the_example():
    with pytest.raises(UserError, match="does not take inputs of shape"):
        compare_models(net(), nn.Linear(3, 2), X)
