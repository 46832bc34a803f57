"""Criteria, granularities and the selection of what goes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile.core.groups import group_sums
from gracile.prune.criteria.l1 import l1
from gracile.prune.criteria.l2 import l2
from gracile.prune.granularity.channel import channel
from gracile.prune.granularity.element import element
from gracile.prune.granularity.filter import filter_
from gracile.prune.selection import (
    lowest,
    lowest_overall,
    mask_without,
    removed_count,
)


def test_criteria_by_hand():
    w = torch.tensor([[3.0, -4.0], [0.5, 0.0]])
    assert l1(w).tolist() == [[3.0, 4.0], [0.5, 0.0]]
    assert l2(w).tolist() == [[9.0, 16.0], [0.25, 0.0]]


def test_a_filters_l1_score_is_its_norm():
    w = torch.tensor([[[[1.0, -2.0]]], [[[0.5, 0.25]]]])
    assert group_sums(l1(w), filter_(tuple(w.shape))).tolist() == [3.0, 0.75]


def test_one_large_weight_saves_a_filter_under_l2_only():
    w = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    groups = filter_((2, 3))
    assert lowest(group_sums(l1(w), groups), 1).item() == 0
    assert lowest(group_sums(l2(w), groups), 1).item() == 1


@given(st.floats(0.1, 10), st.integers(0, 9))
def test_the_order_ignores_the_scale_of_the_weights(factor, seed):
    w = torch.randn(32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(l1(w).argsort(), l1(w * factor).argsort())
    assert torch.equal(l2(w).argsort(), l2(w * factor).argsort())


@pytest.mark.parametrize(("kernel", "count"), [(element, 24), (filter_, 4), (channel, 3)])
def test_a_granularity_numbers_all_groups_of_equal_size(kernel, count):
    ids = kernel((4, 3, 2))
    assert ids.shape == (4, 3, 2)
    assert torch.bincount(ids.reshape(-1)).tolist() == [24 // count] * count


@given(st.floats(0, 0.999), st.integers(1, 200), st.integers(1, 32), st.integers(1, 4))
def test_counts_stay_in_bounds(level, n, multiple, least):
    gone = removed_count(level, n, multiple_of=multiple, min_keep=least)
    assert 0 <= gone < n
    assert n - gone >= min(least, n)
    assert gone <= level * n + 1e-6
    assert (n - gone) % multiple == 0 or gone == 0


def test_equal_scores_are_not_pruned_together():
    assert lowest(torch.ones(8), 3).tolist() == [0, 1, 2]


def test_the_global_choice_leaves_something_everywhere():
    scores = {"a": torch.tensor([0.0, 0.1]), "b": torch.tensor([5.0, 6.0, 7.0])}
    gone = lowest_overall(scores, 3)
    assert {k: v.tolist() for k, v in gone.items()} == {"a": [0], "b": [0, 1]}


def test_a_mask_hides_exactly_the_groups_that_go():
    mask = mask_without(filter_((3, 2)), [1])
    assert mask.tolist() == [[True, True], [False, False], [True, True]]
