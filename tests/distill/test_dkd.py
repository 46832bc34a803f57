"""Decoupled distillation by hand, and the identity that Hinton's loss is the sum of its parts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile.distill.losses.dkd import dkd
from gracile.distill.losses.soft import soft


def logits(seed, n=6, classes=5):
    g = torch.Generator().manual_seed(seed)
    s, t = (3 * torch.randn(n, classes, generator=g, dtype=torch.float64) for _ in range(2))
    return s, t, torch.randint(0, classes, (n,), generator=g)


def test_both_terms_by_hand():
    # teacher (1/2, 1/4, 1/4), student (1/3, 1/3, 1/3), y = 0: the others are split alike
    student = torch.zeros(1, 3, dtype=torch.float64)
    teacher = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    y = torch.tensor([0])
    answers = 0.5 * math.log(0.5 / (1 / 3)) + 0.5 * math.log(0.5 / (2 / 3))
    got = dkd(student, teacher, y, temperature=1.0, alpha=2.0, beta=8.0)
    assert got.item() == pytest.approx(2 * answers)
    # y = 1: the others are (2/3, 1/3) of the teacher and (1/2, 1/2) of the student
    y = torch.tensor([1])
    rest = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    got = dkd(student, teacher, y, temperature=1.0, alpha=0.0, beta=8.0)
    assert got.item() == pytest.approx(8 * rest)


@given(st.integers(0, 50), st.floats(0.5, 10))
def test_soft_is_tckd_plus_one_minus_py_of_nckd(seed, temperature):
    s, t, y = logits(seed, n=1)
    p = torch.softmax(t / temperature, 1)[0, y[0]].item()
    whole = dkd(s, t, y, temperature=temperature, alpha=1.0, beta=1 - p)
    torch.testing.assert_close(whole, soft(s, t, temperature=temperature))


@given(st.integers(0, 20))
def test_a_batch_is_the_mean_of_its_images(seed):
    s, t, y = logits(seed)
    each = [dkd(s[k : k + 1], t[k : k + 1], y[k : k + 1]) for k in range(len(y))]
    torch.testing.assert_close(dkd(s, t, y), torch.stack(each).mean())


@given(st.integers(0, 20), st.floats(-50, 50))
def test_what_is_added_to_all_logits_does_not_count(seed, shift):
    s, t, y = logits(seed)
    torch.testing.assert_close(dkd(s + shift, t, y), dkd(s, t - shift, y))


def test_agreement_is_zero_and_t2_is_a_factor():
    s, t, y = logits(0)
    assert abs(dkd(t, t, y).item()) < 1e-9
    plain = dkd(s, t, y, temperature=3.0, t2=False)
    torch.testing.assert_close(dkd(s, t, y, temperature=3.0), 9 * plain)


def test_sure_teachers_give_finite_gradients():
    s = torch.tensor([[80.0, -80.0, 0.0]], requires_grad=True)
    dkd(s, torch.tensor([[0.0, 90.0, -90.0]]), torch.tensor([0]), temperature=1.0).backward()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0]), r"must be 2 whole numbers, got \(1,\)"),
        (torch.tensor([0.0, 1.0]), "whole numbers"),
        (torch.tensor([0, 3]), r"in 0\.\.2, got 0 to 3"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        dkd(torch.zeros(2, 3), torch.zeros(2, 3), labels)


def test_one_class_has_no_others():
    with pytest.raises(ValueError, match="C >= 2"):
        dkd(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
