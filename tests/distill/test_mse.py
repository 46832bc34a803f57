import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile.distill.losses.mse import mse
from gracile.distill.losses.soft import soft


def test_the_mean_over_all_numbers_by_hand():
    student, teacher = (
        torch.tensor([[1.0, 0.0], [2.0, 5.0]]),
        torch.tensor([[1.0, 4.0], [0.0, 5.0]]),
    )
    assert mse(student, teacher).item() == (16 + 4) / 4


@given(st.floats(0.5, 20))
def test_t2_takes_the_temperature_out(temperature):
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    torch.testing.assert_close(mse(student, teacher, temperature=temperature), torch.tensor(5.0))
    got = mse(student, teacher, temperature=temperature, t2=False)
    torch.testing.assert_close(got, torch.tensor(5.0 / temperature**2))


def test_soft_targets_become_it_at_high_temperature():
    # Hinton et al. 2015, eq. 4: for logits of mean 0 the gradient is (z - v) / (N C T^2)
    g = torch.Generator().manual_seed(0)
    z, v = (torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    z, v = z - z.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    z.requires_grad_()
    (by_soft,) = torch.autograd.grad(soft(z, v, temperature=1000), z)
    (by_mse,) = torch.autograd.grad(mse(z, v), z)  # 2 (z - v) / (N C)
    torch.testing.assert_close(by_soft, by_mse / 2, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "temperature", "message"),
    [((2, 4), 1.0, r"\(2, 3\) and \(2, 4\)"), ((2, 3), 0, "> 0")],
)
def test_what_does_not_fit_is_refused(shape, temperature, message):
    with pytest.raises(ValueError, match=message):
        mse(torch.zeros(2, 3), torch.zeros(shape), temperature=temperature)
