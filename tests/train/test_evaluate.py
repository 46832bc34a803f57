"""Scores, sample-wise agreement and McNemar's test against values worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gracile.train.evaluate import agreement, mcnemar, predict, predict_module, score


def one_hot(answers, classes=4):
    return F.one_hot(torch.tensor(answers), classes).float()


def test_score_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    found = score(logits, torch.tensor([0, 1, 1, 2]))
    assert found.top1 == 0.75
    assert found.top5 is None  # of three classes it would always be 1
    assert found.n == 4
    row = [
        math.log(math.exp(2) + math.e + 1) - 2,
        math.log(1 + math.exp(3) + math.e) - 3,
        math.log(math.exp(5) + 2) - 0,
        math.log(2 + math.e) - 1,
    ]
    assert found.loss == pytest.approx(sum(row) / 4, rel=1e-6)


def test_top5_counts_the_five_largest():
    logits = torch.arange(8.0).repeat(8, 1)  # 7 is the answer, then 6, 5, 4, 3
    found = score(logits, torch.arange(8))
    assert (found.top1, found.top5) == (1 / 8, 5 / 8)


def test_equal_logits_are_ranked_by_class_so_that_a_score_repeats():
    assert score(torch.zeros(2, 6), torch.tensor([0, 5])).top1 == 0.5
    assert score(torch.zeros(2, 6), torch.tensor([4, 5])).top5 == 0.5


def test_agreement_by_hand():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])
    before = one_hot([0, 0, 1, 2, 2, 2, 2, 0])  # right: 0 0 1 . 2 2 2 .
    after = one_hot([0, 1, 1, 1, 2, 3, 3, 1])  # right: 0 . 1 1 2 . . .
    found = agreement(before, after, labels)
    assert found.n == 8
    assert found.share == 3 / 8
    assert (found.flips, found.lost, found.gained) == (5, 3, 1)  # one wrong answer became another
    assert found.worst_class == 0  # 100 % -> 50 %, class 2 only 75 % -> 25 %: the first of two
    assert found.worst_class_drop == 50.0
    assert found.mcnemar_p == mcnemar(3, 1)


def test_the_same_model_agrees_with_itself():
    logits = torch.randn(20, 5)
    found = agreement(logits, logits, torch.randint(5, (20,)))
    assert (found.share, found.flips, found.worst_class_drop, found.mcnemar_p) == (1.0, 0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 2 / 32),
        (3, 1, 2 * (1 + 4) / 16),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (4, 4, 1.0),
    ],
)
def test_mcnemar_is_the_exact_binomial(lost, gained, p):
    assert mcnemar(lost, gained) == pytest.approx(p, rel=1e-9)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_symmetric_a_probability_and_equals_the_sum_of_integers(a, b):
    n, k = a + b, min(a, b)
    exact = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(exact, abs=1e-9)


def test_mcnemar_stands_large_counts():
    assert 0 <= mcnemar(6000, 4000) < 1e-80
    assert mcnemar(5000, 5000) == 1.0


def test_predict_takes_arrays_and_tensors_in_order():
    batches = [(torch.full((2, 1), float(i)), torch.full((2,), i)) for i in range(3)]
    logits, labels = predict(lambda x: (10 * x).numpy(), batches)
    assert logits.flatten().tolist() == [0, 0, 10, 10, 20, 20]
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("training", [True, False])
def test_predict_module_leaves_mode_statistics_and_gradients_alone(training):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2)).train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))] * 2
    logits, _ = predict_module(model, batches)
    assert torch.equal(logits[:4], logits[4:])  # no dropout
    assert not logits.requires_grad
    assert model.training is training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
