"""The integers of a weight survive export: recovered from floats, mirrored by a negative gamma."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile.core.plan import Architecture, Bits, Plan
from gracile.errors import UserError
from gracile.export.integers import folded, integers, weight_grids


def edit(axis=0, bits=8, narrow=True, signed=True):
    return Bits(at="w", role="weight", bits=bits, signed=signed, symmetric=signed, axis=axis,
                narrow=narrow, key="w.weight")  # fmt: skip


def tensors(scale, zero=None):
    scale = torch.as_tensor(scale)
    zero = torch.zeros_like(scale, dtype=torch.int32) if zero is None else torch.as_tensor(zero)
    return {"w.weight.scale": scale, "w.weight.zero_point": zero}


@given(st.integers(0, 10_000))
def test_integers_are_recovered_exactly(seed):
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, (3, 4), generator=g)
    scale = torch.rand(3, generator=g) + 1e-3
    grid = integers(q * scale[:, None], edit(), tensors(scale))
    assert torch.equal(grid.q, q.int())
    torch.testing.assert_close(grid.floats(), q * scale[:, None])


def test_asymmetric_integers_are_recovered():
    q, scale, zero = torch.tensor([[0, 5, 255]]), torch.tensor(0.5), torch.tensor(7)
    grid = integers((q - zero) * scale, edit(axis=None, signed=False, narrow=False),
                    tensors(scale, zero))  # fmt: skip
    assert grid.q.tolist() == [[0, 5, 255]]


def test_a_weight_that_left_its_grid_is_refused():
    with pytest.raises(UserError, match=r"'w' does not lie on its 8-bit grid \(off by 0.4"):
        integers(torch.tensor([[1.4]]), edit(), tensors([1.0]))
    with pytest.raises(UserError, match=r"integers 200\.\.200, allowed -127\.\.127"):
        integers(torch.tensor([[200.0]]), edit(), tensors([1.0]))


def test_a_missing_scale_is_named():
    with pytest.raises(UserError, match=r"'w' has a Bits edit, but its tensor 'w\.weight\.scale'"):
        integers(torch.ones(1, 1), edit(), {})


def test_batchnorm_moves_into_the_scale_and_flips_signs():
    grid = integers(torch.tensor([[2.0, -3.0], [4.0, 6.0], [1.0, 1.0]]), edit(),
                    tensors([1.0, 2.0, 1.0]))  # fmt: skip
    moved = folded(grid, edit(), torch.tensor([0.5, -3.0, 0.0]), 0)
    assert moved.q.tolist() == [[2, -3], [-2, -3], [0, 0]]
    assert moved.scale.tolist() == [0.5, 6.0, 1.0]  # 0 is no scale: the old one is kept
    assert moved.floats().tolist() == [[1.0, -1.5], [-12.0, -18.0], [0.0, 0.0]]


def test_a_scale_per_tensor_becomes_one_per_channel():
    grid = integers(torch.tensor([[2.0], [3.0]]), edit(axis=None), tensors(1.0))
    moved = folded(grid, edit(axis=None), torch.tensor([0.5, 2.0]), 0)
    assert (moved.axis, moved.scale.tolist(), moved.q.tolist()) == (0, [0.5, 2.0], [[2], [3]])


def test_an_unsigned_grid_is_mirrored_within_its_range():
    e = edit(axis=0, signed=False, narrow=False)
    grid = integers(torch.tensor([[-7.0, 248.0]]), e, tensors([1.0], [7]))
    moved = folded(grid, e, torch.tensor([-1.0]), 0)
    assert (moved.q.min() >= 0, moved.q.max() <= 255) == (True, True)
    assert moved.floats().tolist() == [[7.0, -248.0]]


def test_the_integer_without_mirror_stays_in_float_with_a_reason():
    grid = integers(torch.tensor([[-128.0]]), edit(narrow=False), tensors([1.0]))
    assert "-128, which has no mirror" in folded(grid, edit(narrow=False), torch.tensor([-1.0]), 0)


def test_what_no_kernel_takes_stays_in_float_with_a_reason():
    plan = Plan(architecture=Architecture(name="t"))
    wide = plan.extended([edit(bits=12)])
    w = {"w": torch.ones(2, 1)}
    assert weight_grids(wide, tensors([1.0, 1.0]), w, {}).floats.keys() == {"w"}
    e = edit(signed=False, narrow=False)
    got = weight_grids(plan.extended([e]), tensors([1.0, 1.0], [3, 4]), w, {})
    assert "different zero points" in got.floats["w"]
    assert got.grids == {}
