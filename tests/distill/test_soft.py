"""Hinton's soft loss by hand and by another route."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile.distill.losses.soft import soft


def test_by_hand_at_temperature_one():
    p = 1 / (1 + math.e)  # softmax of (0, 1)
    teacher = torch.tensor([[0.0, 1.0]])
    student = torch.zeros(1, 2)
    expected = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    assert soft(student, teacher, temperature=1.0).item() == pytest.approx(expected, rel=1e-6)


def test_equals_kl_of_the_tempered_distributions():
    s, t = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = torch.softmax(t / 3, 1), torch.softmax(s / 3, 1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(soft(s, t, temperature=3.0), expected)


@given(st.floats(0.5, 20), st.integers(0, 20))
def test_is_zero_only_for_the_teachers_own_logits(temperature, seed):
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(4, 6, generator=g, dtype=torch.float64)
    s = torch.randn(4, 6, generator=g, dtype=torch.float64)
    assert abs(soft(t + 3.0, t, temperature=temperature).item()) < 1e-9
    assert soft(s, t, temperature=temperature).item() > 0


def test_t2_keeps_the_gradients_size():
    def size(temperature, t2):
        s = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        t = torch.tensor([[0.01, 0.0, -0.01]], dtype=torch.float64)
        soft(s, t, temperature=temperature, t2=t2).backward()
        return s.grad.norm().item()

    assert size(8.0, True) == pytest.approx(size(1.0, True), rel=0.01)
    assert size(8.0, False) == pytest.approx(size(1.0, False) / 64, rel=0.01)


def test_wrong_shapes_and_temperatures_are_named():
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        soft(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="temperature must be > 0"):
        soft(torch.zeros(1, 2), torch.zeros(1, 2), temperature=0.0)
