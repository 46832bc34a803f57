"""Aging evolution of a scale and a shift for each layer."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile.prune.evolution import evolve, mutant


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def searched(loss_of, layers=4, **options):
    """What is found, and all candidates in order."""
    seen = []

    def watched(x):
        seen.append(x)
        return loss_of(x)

    given = {"generations": 40, "population": 8, "samples": 4, "mutate": 0.25, "sigma": 1.0}
    found = evolve(watched, torch.ones(layers), **{**given, "rng": rng(), **options})
    return found, seen


def from_start(x):
    """Distance from scale 1, shift 0."""
    return float((x[:, 0].log() ** 2 + x[:, 1] ** 2).sum())


def changed(a, b):
    return int((a != b).any(1).sum())


@given(st.integers(1, 30), st.floats(0.01, 1), st.integers(0, 9))
def test_a_mutant_differs_in_the_share_of_its_layers_rounded_down_but_in_one(layers, share, seed):
    parent = torch.tensor([[2.0, 3.0]], dtype=torch.float64).repeat(layers, 1)
    child = mutant(parent, torch.ones(layers), share=share, sigma=1, rng=rng(seed))
    assert changed(parent, child) == max(1, math.floor(share * layers + 1e-6))
    assert bool((child[:, 0] > 0).all())


def test_steps_are_log_normal_and_normal_with_the_layers_spread():
    n = 20_000
    parent = torch.tensor([[2.0, 3.0]], dtype=torch.float64).repeat(n, 1)
    child = mutant(parent, torch.full((n,), 5.0), share=1, sigma=0.5, rng=rng())
    scales, shifts = (child[:, 0] / 2).log(), child[:, 1] - 3
    assert (float(scales.mean()), float(scales.std())) == pytest.approx((0, 0.5), abs=0.02)
    assert (float(shifts.mean()), float(shifts.std())) == pytest.approx((0, 5), abs=0.2)


def test_it_begins_unchanged_and_tries_as_many_as_asked_no_two_alike():
    (_, loss), seen = searched(from_start)
    assert (len(seen), loss) == (40, 0)
    assert torch.equal(seen[0], torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(4, 1))
    assert len({tuple(x.flatten().tolist()) for x in seen}) == 40


def test_until_there_are_samples_all_descend_from_the_start():
    _, seen = searched(lambda x: -from_start(x), samples=4)  # whoever is farther is fitter
    assert [changed(seen[0], x) for x in seen[:5]] == [0, 1, 1, 1, 2]


def test_the_best_of_the_samples_is_the_parent():
    _, seen = searched(from_start, population=40, samples=40)
    assert all(changed(seen[0], x) == 1 for x in seen[1:])


def test_the_oldest_leaves_even_if_it_is_the_best():
    (best, _), seen = searched(from_start, population=1, samples=1)
    assert all(changed(a, b) == 1 for a, b in pairwise(seen))  # a random walk
    assert torch.equal(best, seen[0])  # and still the best of all is returned


def test_it_finds_a_ranking_that_is_known():
    wanted = torch.tensor([[4.0, 0.0], [0.25, 1.0], [1.0, -1.0], [2.0, 2.0]], dtype=torch.float64)

    def loss_of(x):
        return float(((x[:, 0] / wanted[:, 0]).log() ** 2 + (x[:, 1] - wanted[:, 1]) ** 2).sum())

    (_, early), _ = searched(loss_of, generations=20)
    (_, late), _ = searched(loss_of, generations=600)
    assert late < early / 4


def test_what_is_not_finite_loses_and_may_be_all_there_is():
    (best, loss), _ = searched(lambda x: math.nan if from_start(x) == 0 else from_start(x))
    assert math.isfinite(loss)
    assert from_start(best) == loss
    assert searched(lambda x: math.nan)[0][1] == math.inf


def test_the_generator_decides():
    a, b, c = (searched(from_start, rng=rng(seed))[1] for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[1], c[1])
