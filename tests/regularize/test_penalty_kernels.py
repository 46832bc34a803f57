"""Penalties by hand, by finite differences, at zero, and against each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile import registry
from gracile.core.groups import group_max, group_norms, group_sizes, group_sums
from gracile.regularize.penalties.group_lasso import group_lasso
from gracile.regularize.penalties.group_variance import group_variance
from gracile.regularize.penalties.l1 import l1
from gracile.regularize.penalties.l2 import l2
from gracile.regularize.penalties.lp import lp

W = torch.tensor([[3.0, -4.0], [1.0, 0.0]], dtype=torch.float64)
ROWS = torch.tensor([[0, 0], [1, 1]])
FREE = torch.arange(4).reshape(2, 2)  # each entry on its own


def groups_of(name, shape, **options):
    return registry.get("granularity", name).obj(shape, **options)


def test_by_hand():
    assert l1(W, ROWS) == 8
    assert l2(W, ROWS) == 9 + 16 + 1
    assert lp(W, ROWS, p=0.5, eps=1e-30).item() == pytest.approx(3**0.5 + 2 + 1)
    assert group_lasso(W, ROWS) == 5 + 1
    assert group_lasso(W, ROWS, size_weighted=True).item() == pytest.approx(6 * 2**0.5)
    assert group_lasso(W, ROWS, eps=11.0).item() == pytest.approx(6 + 12**0.5)
    assert group_variance(W, ROWS).item() == pytest.approx(1 / 8)  # norms 5, 1: mean 3, variance 8


def test_the_gradient_of_group_lasso_is_the_direction_of_its_group():
    w = W.clone().requires_grad_()
    group_lasso(w, ROWS).backward()
    torch.testing.assert_close(w.grad, torch.tensor([[0.6, -0.8], [1.0, 0.0]]).double())


@pytest.mark.parametrize("name", registry.names("penalty"))
@pytest.mark.parametrize("granularity", ["element", "filter", "channel", "kernel", "block"])
def test_gradients_equal_finite_differences(name, granularity):
    w = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = {"channels": 2} if granularity == "block" else {}
    ids = groups_of(granularity, (4, 2, 3), **options)
    penalty = registry.get("penalty", name).obj
    assert torch.autograd.gradcheck(lambda v: penalty(v, ids), w.requires_grad_())


@pytest.mark.parametrize("name", registry.names("penalty"))
@pytest.mark.parametrize("ids", [ROWS, FREE])
def test_gradients_at_zero_are_zero(name, ids):
    w = torch.zeros(2, 2, requires_grad=True)
    registry.get("penalty", name).obj(w, ids).backward()
    assert torch.equal(w.grad, torch.zeros(2, 2))


def test_a_zero_group_beside_another_has_gradient_zero():
    w = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    for penalty in (group_lasso, group_variance):
        w.grad = None
        penalty(w, ROWS).backward()
        assert w.grad[0].tolist() == [0.0, 0.0]
        assert torch.isfinite(w.grad).all()
        assert w.grad[1].abs().min() > 0


def test_with_each_weight_as_a_group_the_group_lasso_is_l1_and_with_one_group_the_norm():
    w = torch.randn(2, 2, dtype=torch.float64)
    torch.testing.assert_close(group_lasso(w, FREE), l1(w, FREE))
    torch.testing.assert_close(group_lasso(w, groups_of("layer", (2, 2))), w.norm())


def test_lp_contains_l1_and_l2():
    w = torch.randn(50, dtype=torch.float64)
    torch.testing.assert_close(lp(w, w, p=2.0), l2(w, w))
    torch.testing.assert_close(lp(w, w, p=1.0, eps=1e-18), l1(w, w), atol=1e-7, rtol=0)


def test_l2_of_half_the_decay_is_the_weight_decay_of_sgd():
    a, b = (torch.nn.Parameter(W.clone()) for _ in range(2))
    decayed = torch.optim.SGD([a], lr=0.1, weight_decay=0.02)
    (a * 2).sum().backward()
    decayed.step()
    plain = torch.optim.SGD([b], lr=0.1)
    ((b * 2).sum() + 0.01 * l2(b, ROWS)).backward()
    plain.step()
    torch.testing.assert_close(a, b)


@given(st.floats(0.1, 10), st.integers(0, 9))
def test_scaling_the_weights_scales_the_penalty_by_its_degree(factor, seed):
    w = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids = groups_of("filter", (6, 4))
    for penalty, degree in ((l1, 1), (l2, 2), (group_lasso, 1)):
        torch.testing.assert_close(penalty(w * factor, ids), penalty(w, ids) * factor**degree)
    torch.testing.assert_close(
        group_variance(w * factor, ids, eps=1e-30), group_variance(w, ids, eps=1e-30) / factor**2
    )


def test_group_variance_falls_when_the_norms_move_apart():
    even, apart = torch.tensor([[1.0], [1.1]]), torch.tensor([[0.1], [2.0]])
    ids = groups_of("filter", (2, 1))
    assert group_variance(apart, ids) < group_variance(even, ids)


@pytest.mark.parametrize("granularity", ["filter", "channel", "kernel", "layer"])
def test_broadcast_ids_sum_as_written_out_ids_do(granularity):
    w = torch.randn(4, 2, 3, dtype=torch.float64)
    view = groups_of(granularity, (4, 2, 3))
    plain = view.contiguous().clone(memory_format=torch.contiguous_format)
    assert 0 in view.stride()
    assert 0 not in plain.stride()
    for f in (group_sums, group_norms, lambda v, g: group_max(v.abs(), g)):
        torch.testing.assert_close(f(w, view), f(w, plain))
    assert torch.equal(group_sizes(view), group_sizes(plain))
    assert torch.equal(group_sizes(view), torch.bincount(plain.flatten()).float())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: lp(W, ROWS, p=0.0), "p and eps must be > 0, got p=0"),
        (lambda: lp(W, ROWS, eps=0.0), "eps=0"),
        (lambda: group_lasso(W, ROWS, eps=-1.0), "eps must be >= 0, got -1"),
        (lambda: group_variance(W, ROWS, eps=0.0), "eps must be > 0"),
        (lambda: group_variance(W, torch.zeros(2, 2, dtype=torch.long)), "at least two groups"),
    ],
)
def test_wrong_options_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_lp_stays_finite_where_its_slope_is_not():
    w = torch.tensor([1e-12], requires_grad=True)
    lp(w, w, p=0.5).backward()
    assert math.isfinite(w.grad.item())
