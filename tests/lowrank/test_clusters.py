"""Clusters of equal sizes."""

from itertools import permutations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gracile.lowrank.clusters import equal_kmeans, fairly_assigned, settled, swapped


def test_three_heaps_are_found():
    rng = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    truth = torch.randperm(12, generator=rng) % 3
    points = centres[truth] + torch.randn(12, 2, generator=rng)
    labels = equal_kmeans(points, 3, rng)
    same = truth.unsqueeze(0) == truth.unsqueeze(1)
    assert torch.equal(labels.unsqueeze(0) == labels.unsqueeze(1), same)


@settings(max_examples=25)
@given(st.integers(0, 50), st.integers(1, 4), st.integers(1, 4))
def test_sizes_are_equal_and_repeat(seed, clusters, size):
    points = torch.randn(clusters * size, 3, generator=torch.Generator().manual_seed(seed))
    first, again = (
        equal_kmeans(points, clusters, torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert first.bincount(minlength=clusters).tolist() == [size] * clusters
    assert torch.equal(first, again)


@given(st.integers(0, 50))
def test_no_swap_is_left_and_for_two_clusters_that_is_the_optimum(seed):
    cost = torch.rand(6, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = swapped(cost, fairly_assigned(cost))
    total = cost.gather(1, labels.unsqueeze(1)).sum()
    best = min(
        sum(cost[i, c] for i, c in enumerate(p)) for p in set(permutations([0, 0, 0, 1, 1, 1]))
    )
    torch.testing.assert_close(total, best)


def test_equal_points_do_not_go_round_in_circles():
    points = torch.zeros(6, 2)
    labels = equal_kmeans(points, 3, torch.Generator().manual_seed(0))
    assert labels.bincount().tolist() == [2, 2, 2]


def test_costs_are_worked_out_anew_until_nothing_moves():
    asked = []

    def cost(labels):
        asked.append(labels.clone())
        return torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    assert settled(torch.tensor([0, 1]), cost).tolist() == [1, 0]
    assert len(asked) == 2
