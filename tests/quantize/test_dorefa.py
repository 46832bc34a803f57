"""DoReFa by hand: levels of weights, one bit, rounded gradients, and what is stored."""

import pytest
import torch
from learned_case import fired, resumed, same, start, trained
from quant_session import PROFILE, batch, net, run

from gracile.quantize import engine
from gracile.quantize.dorefa import (
    DorefaGrid,
    dorefa_spec,
    odd_levels,
    rounded_gradient,
    squeezed,
)
from gracile.quantize.methods.dorefa import DorefaOptions
from gracile.quantize.placement import WeightSpec


@pytest.fixture(autouse=True)
def _profile(monkeypatch):
    monkeypatch.setattr(engine, "load_profile", lambda name: PROFILE)
    monkeypatch.setattr(engine, "sums_saturate", lambda: False)


def grid(bits, *, zero=False):
    spec, odd = dorefa_spec(WeightSpec("w", bits, True, True, 0, True), 8, zero)
    return DorefaGrid(spec, None, odd)


def test_the_weights_of_eq_9_by_hand():
    """k = 2: 2 round(3 (t / (2 max) + 1/2)) / 3 - 1 is one of -1, -1/3, 1/3, 1."""
    w = torch.tensor([-2.0, -0.5, 0.1, 0.5, 1.5])
    t = w.tanh()
    want = 2 * torch.round(3 * (t / (2 * t.abs().max()) + 0.5)) / 3 - 1
    torch.testing.assert_close(grid(2)(w), want)
    assert want.tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1 / 3, 1])


@pytest.mark.parametrize("bits", range(2, 8))
def test_the_levels_are_all_odd_numbers_and_stored_in_one_more_bit(bits):
    g = grid(bits)
    levels = odd_levels(torch.linspace(-1, 1, 4001), bits)
    assert levels.unique().tolist() == list(range(1 - 2**bits, 2**bits, 2))
    assert (g.spec.bits, g.qmax) == (bits + 1, 2**bits - 1)
    w = torch.randn(500)
    torch.testing.assert_close(g(w), odd_levels(squeezed(w), bits) / (2**bits - 1))


def test_the_gradient_is_that_of_the_squeezed_weight():
    w = torch.randn(40, dtype=torch.float64, requires_grad=True)
    g = torch.randn(40, dtype=torch.float64)
    for bits, zero in ((3, False), (3, True)):
        got = torch.autograd.grad((grid(bits, zero=zero)(w) * g).sum(), w)[0]
        want = torch.autograd.grad((squeezed(w) * g).sum(), w)[0]
        torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(squeezed, (w,))


def test_one_bit_is_the_sign_times_the_mean_magnitude():
    g, w = grid(1), torch.tensor([-3.0, 1.0, -0.5, 1.5], requires_grad=True)
    y = g(w)
    assert y.tolist() == [-1.5, 1.5, -1.5, 1.5]
    y.sum().backward()
    assert w.grad.tolist() == [1, 1, 1, 1]
    assert (g.spec.bits, g.qmin, g.qmax) == (2, -1, 1)


def test_where_one_more_bit_is_too_many_0_is_on_the_grid():
    for bits, widest, zero, stored in ((8, 8, False, 8), (7, 7, False, 7), (3, 8, True, 3)):
        spec, odd = dorefa_spec(WeightSpec("w", bits, True, True, 0, True), widest, zero)
        assert (spec.bits, odd, spec.axis) == (stored, False, None)
    g = grid(3, zero=True)
    assert g(torch.tensor([0.0, 1.0, -1.0])).tolist() == [0, 1, -1]


def test_an_all_zero_weight_gives_numbers():
    for g in (grid(3), grid(3, zero=True), grid(1)):
        assert torch.isfinite(g(torch.zeros(4))).all()


def test_rounded_gradients_by_hand():
    """k = 2, max 1 in the first image and 2 in the second: steps of 2 m / 3."""
    g = torch.tensor([[1.0, -0.2, 0.4], [2.0, 0.5, -1.1]])
    got = rounded_gradient(g, 2, torch.zeros_like(g))
    torch.testing.assert_close(got, torch.tensor([[3.0, -1, 1], [6, 2, -2]]) / 3)


def test_noise_makes_the_rounded_gradient_right_in_the_mean():
    g = torch.tensor([[1.0, -0.23, 0.41, 0.07]]).expand(4000, 4)
    noise = torch.rand(g.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    mean = rounded_gradient(g, 2, noise).mean(0)
    torch.testing.assert_close(mean[1:], g[0, 1:], rtol=0, atol=0.02)


def test_gradients_of_layers_have_so_many_levels():
    session, method, _ = start("dorefa", bits=4, gradient_bits=3)
    method.on_fire(session, 1.0)
    method.on_batch_start(session)
    seen = []
    layer = session.model.get_submodule("conv2")
    layer.register_forward_hook(lambda m, x, y: y.register_hook(seen.append) and None)
    session.model.train()(batch(0)).square().sum().backward()
    for image in seen[0]:
        levels = (image / image.abs().max() * 7).round(decimals=3).unique()
        assert len(levels) <= 8
        assert set(levels.tolist()) <= {-7, -5, -3, -1, 1, 3, 5, 7}


@pytest.mark.parametrize("stop_after", [1, 2])
def test_noise_is_the_same_after_resuming(stop_after):
    options = {"bits": 4, "gradient_bits": 6}
    same(trained("dorefa", **options), resumed("dorefa", stop_after, **options))
    assert not trained("dorefa", **options)[0].get_submodule("conv2")._forward_hooks


def test_the_activations_are_clipped_to_the_end_that_is_given():
    _, method, _ = fired("dorefa", bits=2, clip=3.0)
    for a in method.placement.activations:
        if a.nonnegative:
            assert method.quantizers[a.id].scale.item() == pytest.approx(1)


def test_pruned_weights_need_zero():
    for zero, said in ((False, ["zeros-lost"]), (True, [])):
        session, method, optimizer = start("dorefa", bits=4, zero=zero)
        session.overlays.set("conv2.weight", "mask", lambda w: w * (w.detach().abs() > 0.1))
        run(session, method, optimizer, 1)
        model, _, _ = session.finish(method)
        assert [c for c, _ in session.warnings if c == "zeros-lost"] == said
        zeros = (model.get_parameter("conv2.weight") == 0).float().mean()
        assert (zeros > 0.1) is (zero is True) or bool(zeros > 0.1) is zero


def test_options_of_observed_weights_do_not_count():
    with pytest.raises(ValueError, match="weight_observer does not count here"):
        DorefaOptions(when={"start": "0ep"}, weight_observer="percentile")
    with pytest.raises(ValueError, match="1 bit has no level for 0"):
        DorefaOptions(when={"start": "0ep"}, bits=1, zero=True)


def test_entries_of_the_converter_are_taken():
    DorefaOptions(bits=8, weight_bits=1, weights=["**.weight"], when={"start": "0ep"})


def test_a_binary_network_trains():
    model, plan, _, _ = trained("dorefa", model=net(), bits=1, edges_bits=8)
    w = model.get_parameter("conv2.weight")
    assert len(w.abs().unique()) == 1
    assert {e.bits for e in plan.of_kind("bits") if e.at == "conv2.weight"} == {2}
