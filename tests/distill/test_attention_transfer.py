import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile.distill.features.at import at, attention


def maps(seed, channels=6):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, channels, 4, 5, generator=g, dtype=torch.float64)


def test_equation_2_by_hand():
    student = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # energies (1, 1)
    teacher = torch.tensor([[[[2.0, 0.0]]]])  # (4, 0)
    apart = math.sqrt((1 / math.sqrt(2) - 1) ** 2 + 1 / 2)
    assert at(student, teacher, beta=6.0).item() == pytest.approx(3 * apart / 2, rel=1e-6)
    squared = at(student, teacher, beta=6.0, squared=True)
    assert squared.item() == pytest.approx(3 * apart**2 / 2, rel=1e-6)


def test_squared_is_the_authors_mean_over_images_and_positions():
    s, t = maps(0), maps(1, 2)
    expected = 1e3 / 2 * (attention(s) - attention(t)).pow(2).mean()
    torch.testing.assert_close(at(s, t, squared=True), expected)


@given(st.integers(0, 30), st.floats(0.1, 10), st.randoms())
def test_order_and_scale_of_channels_do_not_count(seed, scale, random):
    s, t = maps(seed), maps(seed + 100, 3)
    order = random.sample(range(6), 6)
    torch.testing.assert_close(at(s[:, order] * scale, t), at(s, t), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(at(s, -scale * t), at(s, t), rtol=1e-4, atol=1e-4)


def test_a_copy_of_the_teacher_has_no_loss_and_a_finite_gradient():
    t = maps(0)
    s = t.clone().requires_grad_()
    loss = at(s, t)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(s.grad, torch.zeros_like(t))


def test_dead_maps_give_finite_gradients():
    s = torch.zeros(2, 3, 4, 4, requires_grad=True)
    at(s, torch.randn(2, 3, 4, 4)).backward()
    assert s.grad.isfinite().all()


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"one height and width, got \(1, 2, 4, 4\).*\(1, 2, 2, 2"):
        at(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match="channels and positions"):
        at(torch.zeros(1, 2), torch.zeros(1, 2))
