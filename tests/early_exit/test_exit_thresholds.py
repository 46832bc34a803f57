import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gracile.early_exit.thresholds import (
    calibrated,
    cheapest,
    curve,
    most_accurate,
    operate,
)
from gracile.nn.exits import entropy

# four inputs; exit 0 is right about the first two, exit 1 about the first three, the end about all
ENTROPIES = np.array([[0.1, 0.3, 0.5, 0.7], [0.2, 0.2, 0.4, 0.6]])
RIGHT = np.array([[True, True, False, False], [True, True, True, False], [True] * 4])
COSTS = [0.25, 0.5, 1.0]


def test_entropy_by_hand():
    half = torch.tensor([[0.0, 0.0, -1e9, -1e9]])  # two of four classes: log 2 / log 4
    torch.testing.assert_close(entropy(half), torch.tensor([0.5]))
    p = 1 / (1 + np.exp(-1.0))  # softmax([2, 0] / 2)
    wanted = -(p * np.log(p) + (1 - p) * np.log(1 - p)) / np.log(2)
    assert float(entropy(torch.tensor([[2.0, 0.0]]), 2.0)) == pytest.approx(wanted, abs=1e-6)


def test_operate_by_hand():
    got = operate(ENTROPIES, RIGHT, COSTS, [0.4, 0.5])
    # 0 and 1 leave at exit 0, 2 at exit 1, 3 at the end: all right
    assert got.rates == (0.5, 0.25, 0.25)
    assert got.accuracy == 1.0
    assert got.mean_cost == pytest.approx(0.5 * 0.25 + 0.25 * 0.5 + 0.25 * 1.0)


def test_an_entropy_at_the_threshold_goes_on():
    assert operate(ENTROPIES[:1], RIGHT[[0, 2]], [1, 2], [0.1]).rates == (0.0, 1.0)


def test_the_curve_by_hand():
    found = [(p.mean_cost, p.accuracy) for p in curve(ENTROPIES, RIGHT, COSTS)]
    # all out at exit 0: 2 of 4; two out there and two at exit 1: 3 of 4; and as above
    assert found == [(0.25, 0.5), (0.375, 0.75), (0.5, 1.0)]


def test_goals_pick_from_the_curve():
    found = curve(ENTROPIES, RIGHT, COSTS)
    assert cheapest(found, 0.75).mean_cost == 0.375
    assert cheapest(found, 0.76).mean_cost == 0.5
    assert most_accurate(found, 0.45).accuracy == 0.75
    assert most_accurate(found, 0.2) is None


def test_a_goal_out_of_reach_gives_the_most_accurate():
    found = curve(ENTROPIES, ~RIGHT, COSTS)
    assert cheapest(found, 0.9).accuracy == max(p.accuracy for p in found)


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_one_at_a_time_is_no_better_than_all_combinations(seed):
    rng = np.random.default_rng(seed)
    entropies, right = rng.random((2, 30)), rng.random((3, 30)) < [[0.5], [0.7], [0.9]]
    exact = curve(entropies, right, COSTS)
    greedy = curve(entropies, right, COSTS, combinations=1)
    for point in greedy:
        best = most_accurate(exact, point.mean_cost)
        assert best is not None
        assert best.accuracy >= point.accuracy
    costs, accuracies = [p.mean_cost for p in exact], [p.accuracy for p in exact]
    assert costs == sorted(set(costs))
    assert accuracies == sorted(set(accuracies))


def test_the_network_alone_is_never_beaten_by_nothing():
    rng = np.random.default_rng(0)
    entropies, right = rng.random((1, 200)), rng.random((2, 200)) < [[0.3], [0.9]]
    found = curve(entropies, right, [0.5, 1.0])
    assert cheapest(found, right[-1].mean()).accuracy >= right[-1].mean()


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_calibration_finds_the_scale_of_the_logits(scale):
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=rng)
    labels = torch.multinomial(logits.softmax(1), 1, generator=rng)[:, 0]
    assert calibrated(scale * logits, labels) == pytest.approx(scale, rel=0.05)
