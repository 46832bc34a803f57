"""Choosing channels: scores, scopes, exact shares, budgets, widths."""

import dataclasses

import pytest
import torch
from group_case import chain, heads
from hypothesis import given
from hypothesis import strategies as st

from gracile.errors import UserError
from gracile.graph.dependency import ChannelGroup, Slice
from gracile.prune.ranking import normalized, pattern, pools, unit_scores
from gracile.prune.structure import Budget, Share, candidates, select
from gracile.prune.widths import Limits, steps, stops


def scored(*values):
    """Groups a, b, ... with these scores."""
    groups = [chain(name, len(v)) for name, v in zip("abcdefgh", values, strict=False)]
    return groups, {
        g.id: torch.tensor(v, dtype=torch.float64) for g, v in zip(groups, values, strict=True)
    }


def chosen(values, goal, scope="global", **limits):
    groups, scores = scored(*values)
    return select(groups, scores, goal, pool_of=pools(groups, scope), limits=Limits(**limits))


# ------------------------------------------------------------------ scores


def test_a_unit_scores_the_sum_over_all_weights_that_make_it():
    weights = {
        "a.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),  # rows: 3, 7
        "t.weight": torch.tensor([[10.0, 20.0, 30.0]]),  # a transposed convolution writes dim 1
    }
    group = ChannelGroup(
        id="a.weight",
        units=(
            (Slice("a.weight", 0, (1,)), Slice("t.weight", 1, (0, 2)), Slice("r.weight", 1, (0,))),
            (Slice("a.weight", 0, (0,)), Slice("t.weight", 1, (1,)), Slice("r.weight", 1, (1,))),
        ),
        producers=("a.weight", "t.weight"),
        consumers=("r.weight",),
        protected=None,
        sizes={("a.weight", 0): 2, ("t.weight", 1): 3, ("r.weight", 1): 2},
        writes={"a.weight": 0, "t.weight": 1},
        kind="channels",
        overlaps=(),
    )
    asked = []
    got = unit_scores([group], lambda at: asked.append(at) or weights[at])
    assert got["a.weight"].tolist() == [7 + 10 + 30, 3 + 20]
    assert asked == ["a.weight", "t.weight"]  # once each; readers have no say


def test_norms_by_hand():
    scores = torch.tensor([1.0, 3.0, 8.0])
    assert normalized(scores, "none").tolist() == [1, 3, 8]
    assert normalized(scores, "mean").tolist() == [0.25, 0.75, 2]
    assert normalized(scores, "max").tolist() == [0.125, 0.375, 1]
    assert normalized(torch.zeros(2), "mean").tolist() == [0, 0]


# ------------------------------------------------------------------ scopes


def test_layer_takes_the_same_share_of_each_group_and_global_the_smallest_of_all():
    values = [[1, 2, 3, 4], [50, 40, 30, 20, 10, 60]]
    assert chosen(values, Share(0.5), "layer").gone == {"a.weight": [0, 1], "b.weight": [2, 3, 4]}
    # five of ten go; the last of a stays
    assert chosen(values, Share(0.5)).gone == {"a.weight": [0, 1, 2], "b.weight": [3, 4]}


def test_isomorphic_ranks_groups_of_one_shape_together():
    a, b, c = chain("a", 4, reader="x"), chain("b", 4, reader="y"), chain("c", 4)
    assert pattern(a) == pattern(b) != pattern(c)
    assert pattern(chain("d", 5, reader="x")) != pattern(a)
    scores = {
        "a.weight": torch.tensor([1.0, 2, 3, 9]),
        "b.weight": torch.tensor([4.0, 5, 6, 7]),
        "c.weight": torch.tensor([100.0, 400, 300, 200]),
    }
    got = select([a, b, c], scores, Share(0.5), pool_of=pools([a, b, c], "isomorphic"))
    assert got.gone == {"a.weight": [0, 1, 2], "b.weight": [0], "c.weight": [0, 3]}


def test_equal_scores_go_in_order_and_exactly_so_many():
    assert chosen([[1] * 5, [1] * 5], Share(0.3)).gone == {"a.weight": [0, 1, 2]}


GROUPS = st.lists(
    st.lists(st.integers(0, 9), min_size=2, max_size=12), min_size=1, max_size=5
)  # small numbers: many are equal


@given(GROUPS, st.integers(0, 19), st.sampled_from(["layer", "global"]))
def test_the_share_is_exact_and_the_weakest_go(values, twentieths, scope):
    share = twentieths / 20
    got = chosen(values, Share(share), scope)
    gone = {name: got.gone.get(f"{name}.weight", []) for name in "abcde"[: len(values)]}
    if scope == "layer":
        for name, v in zip(gone, values, strict=True):
            assert len(gone[name]) == twentieths * len(v) // 20
    room = sum(len(v) - 1 for v in values)  # one of each group stays
    assert got.before - got.reached == sum(map(len, gone.values())) <= room
    if scope == "global":
        assert got.before - got.reached == min(twentieths * int(got.before) // 20, room)
    for name, v in zip(gone, values, strict=True):
        kept = [x for u, x in enumerate(v) if u not in gone[name]]
        assert max((v[u] for u in gone[name]), default=0) <= min(kept)


@given(GROUPS, st.sampled_from(["layer", "global"]))
def test_two_steps_remove_as_much_as_one(values, scope):
    groups, scores = scored(*values)
    original = {g.id: len(g.units) for g in groups}
    pool_of = pools(groups, scope)
    whole = select(groups, scores, Share(0.5), pool_of=pool_of)
    first = select(groups, scores, Share(0.25), pool_of=pool_of)
    stay = {
        g.id: [u for u in range(len(g.units)) if u not in first.gone.get(g.id, ())] for g in groups
    }
    rest = [chain(g.id[0], len(stay[g.id])) for g in groups]
    second = select(
        rest,
        {id: scores[id][units] for id, units in stay.items()},
        Share(0.5),
        pool_of=pool_of,
        original=original,
    )
    assert second.reached == whole.reached
    for id, units in stay.items():
        both = sorted([*first.gone.get(id, []), *(units[u] for u in second.gone.get(id, []))])
        assert both == whole.gone.get(id, [])


# ------------------------------------------------------------------ budgets


def weighted(price):
    """Each unit of group x costs price[x]."""
    return lambda kept: sum(price[at[0]] * n for (at, _), n in kept.items())


def test_a_budget_is_met_by_the_shortest_prefix():
    values = [[1, 3, 5, 7], [2, 4, 6, 8]]  # a costs 10 each, b 1 each: 44 in all
    goal = Budget("params", 20, weighted({"a": 10, "b": 1}))
    got = chosen(values, goal)
    # going: a0 34, b0 33, a1 23, b1 22, a2 12
    assert got.gone == {"a.weight": [0, 1, 2], "b.weight": [0, 1]}
    assert (got.before, got.wanted, got.reached) == (44, 20, 12)
    assert chosen(values, Budget("params", 44, goal.cost)).gone == {}


def test_layers_shrink_in_step_towards_a_budget():
    goal = Budget("macs", 4, weighted({"a": 1, "b": 1}))
    got = chosen([[1, 2, 3, 4], [100, 200, 300, 400]], goal, "layer")
    assert got.gone == {"a.weight": [0, 1], "b.weight": [0, 1]}


def test_a_budget_out_of_reach_says_how_far_it_goes():
    goal = Budget("macs", 1, weighted({"a": 300, "b": 1}))
    with pytest.raises(UserError, match=r"target of 1 macs .* has 606, .* leaves 301\. Ask for"):
        chosen([[1, 2], [3, 4, 5, 6, 7, 8]], goal)


# ------------------------------------------------------------------ widths


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]),
        ({"min_keep": 8}, [10, 9, 8]),
        ({"min_width": 9}, [10, 9]),
        ({"max_ratio": 0.25}, [10, 9, 8]),  # floor(2.5) may go
        ({"multiple_of": 4}, [10, 8, 4]),
        ({"multiple_of": 4, "min_keep": 5}, [10, 8]),
        ({"min_width": 20}, [10]),
    ],
)
def test_stops_by_hand(limits, expected):
    assert stops(chain("a", 10), Limits(**limits), 10) == expected


def test_widths_of_heads_are_counted_in_channels():
    outer, inner = heads("q", 6, 8)
    assert stops(outer, Limits(multiple_of=16), 6) == [6, 4, 2]
    assert stops(outer, Limits(min_width=20), 6) == [6, 5, 4, 3]
    assert stops(inner, Limits(multiple_of=4), 8) == [8, 4]  # the width in each head itself


def test_steps_end_where_a_width_is_allowed():
    assert steps("abcdef", [10, 8, 4]) == ["ab", "cdef"]
    assert steps("abcde", [10, 8, 4]) == ["ab"]  # the rest would end between two multiples
    assert steps("abc", [10]) == []


def test_max_ratio_counts_from_the_original():
    assert stops(chain("a", 6), Limits(max_ratio=0.5), 10) == [6, 5]


def test_rounded_widths_stay_nearest_to_the_target():
    values = [list(range(40)) for _ in range(4)]
    got = chosen(values, Share(0.5), "layer", multiple_of=16)
    left = [40 - len(got.gone.get(f"{n}.weight", [])) for n in "abcd"]
    # 80 of 160 asked; blocks of 8 (40 -> 32) and 16 (32 -> 16): 4 * 8 + 3 * 16 = 80
    assert sorted(left) == [16, 16, 16, 32]
    assert got.reached == got.wanted == 80


@given(GROUPS, st.integers(1, 4), st.floats(0, 0.9))
def test_every_width_that_changes_is_a_multiple(values, multiple, share):
    got = chosen(values, Share(share), multiple_of=multiple)
    for name, v in zip("abcde", values, strict=False):
        left = len(v) - len(got.gone.get(f"{name}.weight", []))
        assert left == len(v) or left % multiple == 0
        assert left >= 1


def test_no_tensor_loses_its_last_index_even_between_groups():
    # two of three channels of a and of b lie on one axis of four, which c reads
    def part(name, places):
        at = f"{name}.weight"
        units = [(Slice(at, 0, (u,)),) for u in range(3)]
        for u, i in enumerate(places):
            units[u] = (*units[u], Slice("c.weight", 1, (i,)))
        g = chain(name, 3)
        sizes = {**g.sizes, ("c.weight", 1): 4}
        return ChannelGroup(
            at, tuple(units), (at,), ("c.weight",), None, sizes, {at: 0}, kind="channels",
            overlaps=(),
        )  # fmt: skip

    groups = [part("a", (0, 1)), part("b", (2, 3))]
    scores = {g.id: torch.tensor([1.0, 2.0, 3.0]) for g in groups}
    got = select(groups, scores, Share(0.9), pool_of=pools(groups, "global"))
    assert got.gone == {"a.weight": [0, 1], "b.weight": [0, 2]}  # b's 1 keeps the axis alive
    assert (got.wanted, got.reached) == (1, 2)  # and the miss is told


# ------------------------------------------------------------------ candidates


def test_protected_and_ignored_groups_are_no_candidates():
    groups = [chain("a", 4), chain("b", 4, protected="an output"), chain("c", 4)]
    assert [g.id for g in candidates(groups, {"c.weight"})] == ["a.weight"]


def test_of_groups_on_the_same_axes_only_the_outermost_is_cut():
    outer, inner = heads("q", 4, 8)
    assert candidates([inner, outer]) == [outer]
    assert candidates([inner, outer], families="all") == [inner, outer]
    stuck = dataclasses.replace(outer, protected="an output")
    assert candidates([stuck, inner]) == [inner]


def test_groups_on_different_indices_of_one_weight_are_both_cut():
    # widths of q and of v in one weight: the first and the second half of its rows
    _, q = heads("qv", 2, 3)
    moved = [[Slice(s.at, s.dim, tuple(i + 6 for i in s.index)) for s in u] for u in q.units]
    v = dataclasses.replace(q, id="qv.weight:inner2", units=tuple(map(tuple, moved)))
    q = dataclasses.replace(q, overlaps=(v.id,))
    v = dataclasses.replace(v, overlaps=(q.id,))
    assert candidates([q, v]) == [q, v]
