"""fake_quantize and its gradients against a reference in NumPy, by hand and by differences."""

import numpy as np
import pytest
import torch

from gracile.nn import rounding
from gracile.nn.rounding import fake_quantize

ONE, ZERO = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
GRIDS = [
    (qmin, qmax, zero)
    for bits in (2, 3, 4, 8)
    for qmin, qmax, zero in (
        (0, 2**bits - 1, 0),  # unsigned, symmetric
        (0, 2**bits - 1, 2 ** (bits - 1)),  # asymmetric
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0),  # signed
        (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1, 0),  # narrow
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 1),
    )
]


def reference(x, g, scale, zero, qmin, qmax, residue):
    """(y, dL/dx, dL/dscale, dL/dzero) for one scale, term by term from the papers, in float64."""
    q = np.clip(np.rint(x / scale) + zero, qmin, qmax)
    below, above = x < (qmin - zero) * scale, x > (qmax - zero) * scale
    inside = ~(below | above)
    to_scale = np.where(below, qmin - zero, np.where(above, qmax - zero, 0.0))
    if residue:
        to_scale = to_scale + np.where(inside, np.rint(x / scale) - x / scale, 0.0)
    y = (q - zero) * scale
    return y, g * inside, (g * to_scale).sum(), (g * np.where(inside, 0.0, -scale)).sum()


def values(shape=(2, 3, 4, 5), seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape)


def ours(x, g, scale, zero, qmin, qmax, **options):
    x = torch.tensor(x, requires_grad=True)
    scale = torch.tensor(scale, dtype=torch.float32, requires_grad=True)
    zero = torch.tensor(zero, dtype=torch.float32, requires_grad=True)
    y = fake_quantize(x, scale, zero, qmin, qmax, **options)
    y.backward(torch.tensor(g, dtype=torch.float32))
    return [t.detach().numpy() for t in (y, x.grad, scale.grad, zero.grad)]


@pytest.mark.parametrize("residue", [True, False])
@pytest.mark.parametrize(("qmin", "qmax", "zero"), GRIDS)
def test_forward_and_all_gradients_are_those_of_the_papers(qmin, qmax, zero, residue):
    x, g = values()
    scale = np.float32(2.2 / (qmax - qmin))  # some values are clipped at both ends
    got = ours(x, g, scale, zero, qmin, qmax, residue=residue)
    want = reference(x, g, scale, zero, qmin, qmax, residue)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("qmin", "qmax", "zero"), GRIDS[::3])
def test_per_channel_is_the_reference_channel_by_channel(qmin, qmax, zero):
    x, g = values()
    scale = np.float32([1.1, 2.2, 3.3]) / np.float32(qmax - qmin)
    got = ours(x, g, scale, [zero] * 3, qmin, qmax, axis=1)
    for c in range(3):
        want = reference(x[:, c], g[:, c], scale[c], zero, qmin, qmax, True)
        for a, b in zip((got[0][:, c], got[1][:, c], got[2][c], got[3][c]), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_of_the_scale_by_hand():
    """v / s = -1, 0.4, 1.3, 9 on 0..3: below 0, then 0 - 0.4, 1 - 1.3, Qp = 3."""
    s = ONE.clone().requires_grad_()
    fake_quantize(torch.tensor([-1.0, 0.4, 1.3, 9.0]), s, ZERO, 0, 3).sum().backward()
    assert s.grad.item() == pytest.approx(-0.4 - 0.3 + 3)
    s.grad = None
    x = torch.tensor([-1.0, 0.4, 1.3, 9.0])
    fake_quantize(x, s, ZERO, 0, 3, residue=False).sum().backward()
    assert s.grad.item() == 3


@pytest.mark.parametrize("zero", [0, 3])
def test_gradients_are_the_differences_where_values_are_clipped(zero):
    """There y = (end - zero) * scale: no straight-through."""
    x = torch.tensor([-9.0, 20.0, 40.0], dtype=torch.float64)
    s = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    z = torch.tensor(float(zero), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: fake_quantize(x, s, z.detach(), 0, 7), (s,))
    y = fake_quantize(x, s, z, 0, 7)
    y.sum().backward()
    step = fake_quantize(x, s, z + 1, 0, 7) - y
    assert z.grad.item() == pytest.approx(step.sum().item())


def test_the_gradient_of_the_scale_is_the_difference_with_the_rounding_held():
    """Inside, rounding is the identity: y = s (x / s + residue), the residue a constant."""
    x = torch.tensor([0.2, 0.9, 1.7, -0.6], dtype=torch.float64)
    s = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    residue = torch.round(x / 0.5) - x / 0.5
    fake_quantize(x, s, ZERO, -8, 7).sum().backward()
    held = lambda s: ((x / s + residue) * s).sum()  # noqa: E731
    assert s.grad.item() == pytest.approx((held(0.5 + 1e-6) - held(0.5 - 1e-6)).item() / 2e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("residue", [True, False])
def test_in_pieces_is_the_same_as_at_once(monkeypatch, layout, residue):
    monkeypatch.setattr(rounding, "PIECE", 50)  # the last piece is shorter
    x, g = (torch.tensor(v, dtype=torch.float32) for v in values((3, 4, 5, 7)))
    got = []
    for function in (rounding._InPieces, rounding._AtOnce):
        a = x.clone().to(memory_format=layout).requires_grad_()
        s, z = torch.tensor(0.31, requires_grad=True), torch.tensor(2.0, requires_grad=True)
        y = function.apply(a, s, z, 0, 7, residue)
        y.backward(g)
        got.append((y.detach(), a.grad, s.grad, z.grad))
    assert torch.equal(got[0][0], got[1][0])
    assert torch.equal(got[0][1], got[1][1])
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residue", [True, False])
@pytest.mark.parametrize(("qmin", "qmax", "zero"), GRIDS)
def test_what_a_compiler_sees_is_the_same(qmin, qmax, zero, residue):
    x, g = (torch.tensor(v, dtype=torch.float32) for v in values())
    got = []
    for function in (rounding._fusible, rounding._AtOnce.apply):
        a = x.clone().requires_grad_()
        s = torch.tensor(2.2 / (qmax - qmin), requires_grad=True)
        z = torch.tensor(float(zero), requires_grad=True)
        y = function(a, s, z, qmin, qmax, residue)
        y.backward(g)
        got.append((y.detach(), a.grad, s.grad, z.grad))
    assert torch.equal(got[0][0], got[1][0])
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_ends_of_the_range_are_inside():
    s = torch.tensor(0.1)
    ends = torch.tensor([-8, 7]) * s
    for function in (rounding._InPieces, rounding._AtOnce):
        x = torch.stack([ends, torch.nextafter(ends, ends * 2)]).requires_grad_()
        function.apply(x, s, ZERO, -8, 7, True).sum().backward()
        assert x.grad.tolist() == [[1, 1], [0, 0]]


def test_a_gradient_of_any_layout_is_taken():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    fake_quantize(x, torch.tensor(0.1), ZERO, -8, 7).sum().backward()  # an expanded gradient
    y = torch.randn(2, 3, 4, 4).transpose(1, 2).requires_grad_()  # no line in memory
    fake_quantize(y, torch.tensor(0.1), ZERO, -8, 7).sum().backward()
    assert torch.equal(y.grad, ((y >= -0.8) & (y <= torch.tensor(0.1) * 7)).float())


def test_in_half_precision_the_scale_still_has_its_gradient_in_float():
    x = torch.tensor([100.3, 0.7, 300.0], dtype=torch.bfloat16)
    s = torch.tensor(0.5, requires_grad=True)
    fake_quantize(x, s, ZERO, 0, 255).sum().backward()
    q = x.float() / 0.5
    want = (q[:2].round() - q[:2]).sum() + 255
    assert s.grad.dtype == torch.float32
    assert s.grad.item() == pytest.approx(want.item(), rel=1e-5)


def test_nothing_is_differentiated_twice():
    x = torch.randn(3, requires_grad=True)
    (g,) = torch.autograd.grad(
        fake_quantize(x, ONE, ZERO, -8, 7).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
