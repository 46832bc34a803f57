"""WRPN by hand: levels of weights and activations whose ends stand still."""

import pytest
import torch
from learned_case import fired
from quant_session import PROFILE, batch

from gracile.quantize import engine
from gracile.quantize.clipped import FixedGrid
from gracile.quantize.methods.wrpn import WrpnOptions
from gracile.quantize.placement import WeightSpec


@pytest.fixture(autouse=True)
def _profile(monkeypatch):
    monkeypatch.setattr(engine, "load_profile", lambda name: PROFILE)
    monkeypatch.setattr(engine, "sums_saturate", lambda: False)


def test_weights_are_those_of_section_3():
    """clip to [-1, 1], round((2^(k-1) - 1) w) / (2^(k-1) - 1): k = 3 has the levels n / 3."""
    g = FixedGrid(WeightSpec("w", 3, True, True, None, True), None, 1.0)
    w = torch.tensor([-2.0, -0.6, -0.1, 0.2, 0.5, 0.9], requires_grad=True)
    want = torch.round(3 * w.detach().clamp(-1, 1)) / 3
    torch.testing.assert_close(g(w), want)
    g(w).sum().backward()
    assert w.grad.tolist() == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_so_many_levels_and_no_more(bits):
    g = FixedGrid(WeightSpec("w", bits, True, True, None, True), None, 1.0)
    assert len(g(torch.linspace(-2, 2, 5001)).unique()) == 2**bits - 1


def test_ends_are_those_that_are_given():
    session, method, _ = fired("wrpn", bits=4, clip=3.0, weight_clip=0.7)
    for a in method.placement.activations:
        if a.nonnegative:
            assert method.quantizers[a.id].scale.item() == pytest.approx(3 / 15)
    w = session.overlays.effective("conv2.weight")
    torch.testing.assert_close(w * 10, (w * 10).round())
    for edit in method.edits(session):
        if edit.role == "weight":
            assert (edit.axis, edit.bits, edit.narrow) == (None, 4, True)


def test_only_what_may_be_negative_is_learned():
    _, method, _ = fired("wrpn", bits=4)
    learned = {k.rpartition(".")[0] for k in method.learned}
    specs = {a.id: a for a in method.placement.activations}
    assert learned
    assert not any(specs[id].nonnegative for id in learned)


def test_the_ends_do_not_move():
    session, method, _ = fired("wrpn", bits=4)
    before = {a.id: method.quantizers[a.id].scale.item() for a in method.placement.activations}
    session.model.train()(batch(0)).sum().backward()
    method.on_before_step(session)
    for a in method.placement.activations:
        moved = method.quantizers[a.id].scale.item() != before[a.id]
        assert moved is not a.nonnegative or not moved


def test_options_of_observed_weights_do_not_count():
    with pytest.raises(ValueError, match="weight_symmetric does not count here"):
        WrpnOptions(when={"start": "0ep"}, weight_symmetric=False)


def test_entries_of_the_converter_are_taken():
    WrpnOptions(bits=8, weight_bits=2, when={"start": "0ep"})
