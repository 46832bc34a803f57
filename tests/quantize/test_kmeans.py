"""k-means of numbers and of vectors: by hand, and what holds for all inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gracile.quantize.kmeans import (
    cluster_numbers,
    cluster_vectors,
    density_start,
    linear_start,
    random_start,
)

VALUES = torch.tensor([-1.0, 0.1, 0.2, 3.0])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def error(values, centroids, codes):
    return float((values - centroids[codes]).square().sum())


def test_two_rounds_by_hand():
    # start 0 and 4; border 2: {-1, .1, .2, 1.9} and {3}; means .3 and 3; border 1.65: 1.9 moves
    # over: means -.7 / 3 and 2.45; border 1.108...: nothing moves
    values = torch.tensor([1.9, 0.1, 3.0, -1.0, 0.2], dtype=torch.float64)
    centroids, codes = cluster_numbers(values, torch.tensor([0.0, 4.0]))
    torch.testing.assert_close(centroids, torch.tensor([-0.7 / 3, 2.45], dtype=torch.float64))
    assert codes.tolist() == [1, 0, 1, 0, 0]


def test_the_three_starts_by_hand():
    torch.testing.assert_close(linear_start(VALUES, 5), torch.tensor([-1.0, 0, 1, 2, 3]))
    assert density_start(VALUES, 4).tolist() == VALUES.tolist()
    assert sorted(random_start(VALUES, 4, rng()).tolist()) == sorted(VALUES.tolist())
    assert set(random_start(VALUES, 2, rng()).tolist()) < set(VALUES.tolist())


def test_the_linear_start_keeps_large_weights_apart():
    # Han et al. 2016, section 3.2: the few large weights get centroids of their own.
    values = torch.cat([torch.randn(1000, generator=rng()) * 0.1, torch.tensor([3.0])])
    linear, _ = cluster_numbers(values, linear_start(values, 8))
    density, _ = cluster_numbers(values, density_start(values, 8))
    assert linear[-1] == pytest.approx(3.0)
    assert (density - 3.0).abs().min() >= (linear - 3.0).abs().min()


def test_a_cluster_without_numbers_keeps_its_centroid():
    centroids, codes = cluster_numbers(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 5.0, 9.0]))
    assert centroids.tolist() == [0.5, 5.0, 9.0]
    assert codes.tolist() == [0, 0]


numbers = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40)


@given(numbers, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_every_number_has_its_nearest_centroid_and_every_centroid_is_a_mean(values, k):
    x = torch.tensor(values, dtype=torch.float64)
    centroids, codes = cluster_numbers(x, linear_start(x, k))
    distance = (x[:, None] - centroids).abs()
    torch.testing.assert_close(distance.gather(1, codes[:, None])[:, 0], distance.amin(1))
    for c in codes.unique():
        torch.testing.assert_close(centroids[c], x[codes == c].mean(), rtol=1e-9, atol=1e-9)


@given(numbers, st.integers(2, 9))
@settings(max_examples=40, deadline=None)
def test_it_never_ends_worse_than_it_began(values, k):
    x = torch.tensor(values, dtype=torch.float64)
    start = linear_start(x, k)
    first = (x[:, None] - start).abs().argmin(1)
    centroids, codes = cluster_numbers(x, start)
    assert error(x, centroids, codes) <= error(x, start, first) * (1 + 1e-9) + 1e-9


def test_vectors_that_lie_in_heaps_are_told_apart():
    heaps = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = heaps.repeat_interleave(20, 0) + 0.1 * torch.randn(60, 2, generator=rng())
    centroids, codes = cluster_vectors(x, 3, rng())
    for heap in codes.split(20):
        assert len(heap.unique()) == 1
        torch.testing.assert_close(centroids[heap[0]], x[codes == heap[0]].mean(0))


def test_as_many_vectors_as_centroids_are_found_exactly():
    x = torch.randn(6, 3, generator=rng())
    centroids, codes = cluster_vectors(x, 6, rng())
    torch.testing.assert_close(centroids[codes], x)


def test_equal_vectors_do_not_stop_it():
    centroids, codes = cluster_vectors(torch.ones(5, 2), 3, rng())
    assert torch.equal(centroids[codes], torch.ones(5, 2))


def test_vectors_of_one_number_end_as_numbers_do():
    values = torch.tensor([0.0, 0.1, 5.0, 5.2, 9.0, 9.1])
    vectors, codes = cluster_vectors(values[:, None], 3, rng(1))
    numbers, _ = cluster_numbers(values, vectors[:, 0])
    torch.testing.assert_close(vectors[:, 0].sort().values, numbers)
    assert error(values, vectors[:, 0], codes) == pytest.approx(0.03, abs=1e-4)
