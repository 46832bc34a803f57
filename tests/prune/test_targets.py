"""Costs of cuts that are not made yet: by hand, and against the cost of the cut model."""

import torch
from group_case import heads
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gracile.analyze.widths import CostModel, Term, Timeline, nearest_prefix, shortest_prefix
from gracile.graph.capture import capture
from gracile.graph.dependency import Slice, channel_groups


def model_of(net, *shape):
    graph = capture(net.eval(), torch.randn(2, *shape))
    groups = channel_groups(net, graph)
    return CostModel.of(net, graph, groups), groups


class Two(nn.Module):
    """conv a 3 -> 4 (3x3), conv b 4 -> 5 (1x1), both on 8 x 8, then a head 5 -> 2."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 5, 1, bias=False)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.bn(self.a(x))))).mean((2, 3)))


A = {("a.weight", 0): 2, ("a.bias", 0): 2, ("bn.weight", 0): 2, ("bn.bias", 0): 2,
     ("b.weight", 1): 2}  # fmt: skip
B = {("b.weight", 0): 3, ("head.weight", 1): 3}


def test_both_sides_of_a_weight_count():
    model, _ = model_of(Two(), 3, 8, 8)
    assert model.total("macs", {}) == 64 * 4 * 27 + 64 * 4 * 5 + 5 * 2
    assert model.total("macs", A) == 64 * 2 * 27 + 64 * 2 * 5 + 5 * 2
    assert model.total("macs", B) == 64 * 4 * 27 + 64 * 4 * 3 + 3 * 2
    assert model.total("macs", {**A, **B}) == 64 * 2 * 27 + 64 * 2 * 3 + 3 * 2
    assert model.total("params", {}) == 4 * 27 + 4 + 8 + 20 + 12
    assert model.total("params", {**A, **B}) == 2 * 27 + 2 + 4 + 6 + 2 * 3 + 2


def test_what_a_group_touches_is_what_would_go_with_it():
    model, groups = model_of(Two(), 3, 8, 8)
    (a,) = [g for g in groups if g.id == "a.weight"]
    assert model.touched("params", a) == 4 * 27 + 4 + 8 + 20
    assert model.touched("macs", a) == 64 * 4 * 27 + 64 * 4 * 5


def test_a_module_called_twice_multiplies_twice_and_stores_once():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.again, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(torch.relu(self.again(torch.relu(self.again(self.inp(x))))))

    model, _ = model_of(Again(), 3)
    half = {("inp.weight", 0): 2, ("again.weight", 0): 2, ("again.weight", 1): 2,
            ("out.weight", 1): 2}  # fmt: skip
    assert model.total("macs", half) == 3 * 2 + 2 * (2 * 2) + 2 * 2
    assert model.total("params", half) == 3 * 2 + 4 + 4 + 4 + 2 * 2 + 2


def test_products_of_activations_follow_the_layers_that_made_them():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x):
            scores = self.q(x) @ self.k(x).transpose(1, 2)
            return scores.softmax(-1) @ self.v(x)

    model, _ = model_of(Attention(), 5, 8)  # five tokens
    assert model.total("macs", {}) == 3 * 5 * 64 + 5 * 5 * 8 + 5 * 5 * 8
    width = {("q.weight", 0): 4, ("k.weight", 0): 4}
    assert model.total("macs", width) == 2 * 5 * 32 + 5 * 64 + 5 * 5 * 4 + 5 * 5 * 8
    assert model.total("macs", {("v.weight", 0): 2}) == 2 * 5 * 64 + 5 * 16 + 5 * 5 * 8 + 5 * 5 * 2


def test_a_term_by_hand():
    term = Term(60, ((("w", 0), 3), (("w", 1), 4)))
    assert [term.at(k) for k in ({}, {("w", 0): 1}, {("w", 0): 2, ("w", 1): 1})] == [60, 20, 10]


def test_an_index_of_two_units_goes_once():
    outer, inner = heads("q", 4, 8)  # 32 channels
    timeline = Timeline([[outer.units[0]], [inner.units[3]], [outer.units[2]]], outer.sizes)
    axis = ("q.weight", 0)
    assert [timeline.kept(k)[axis] for k in range(4)] == [32, 24, 21, 14]


def test_a_timeline_counts_slices_of_several_indices():
    unit = (Slice("w", 1, (0, 1, 2)), Slice("b", 0, (4,)))
    timeline = Timeline([[unit]], {("w", 1): 9, ("b", 0): 5, ("other", 0): 7})
    assert timeline.kept(1) == {("w", 1): 6, ("b", 0): 4}


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(-1, 60))
def test_shortest_prefix_is_the_first_that_fits(steps, limit):
    costs = [50]
    for s in steps:
        costs.append(costs[-1] - s)
    first = next((k for k, c in enumerate(costs) if c <= limit), None)
    assert shortest_prefix(len(steps), costs.__getitem__, limit) == first


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(0, 60))
def test_no_other_prefix_is_nearer(sizes, wanted):
    k = nearest_prefix(sizes, wanted)
    gaps = [abs(sum(sizes[:j]) - wanted) for j in range(len(sizes) + 1)]
    assert gaps[k] == min(gaps)
    assert k == gaps.index(min(gaps))
