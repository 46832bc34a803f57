"""PACT by hand: where alpha starts, its gradient and decay, its weights."""

import pytest
import torch
from learned_case import fired, trained
from quant_session import PROFILE, batch

from gracile.quantize import engine
from gracile.quantize.dorefa import DorefaGrid
from gracile.quantize.learned_ranges import Clip, Step
from gracile.quantize.methods.pact import PactOptions


@pytest.fixture(autouse=True)
def _profile(monkeypatch):
    monkeypatch.setattr(engine, "load_profile", lambda name: PROFILE)
    monkeypatch.setattr(engine, "sums_saturate", lambda: False)


def clips(method):
    return [r for r in method.learned.values() if isinstance(r, Clip)]


def test_alpha_starts_where_it_is_told():
    _, method, _ = fired("pact", bits=4, clip_init=6.0)
    assert clips(method)
    assert all(r.values["alpha"].item() == pytest.approx(6) for r in clips(method))
    assert isinstance(method.learned["x.input"], Step)
    _, method, _ = fired("pact", bits=4, clip_init="observed")
    assert all(r.values["alpha"].item() < 6 for r in clips(method))


def test_the_rounded_activation_is_that_of_eq_2():
    """round(clip(x, 0, alpha) (2^k - 1) / alpha) alpha / (2^k - 1), alpha 6, k 2: steps of 2."""
    _, method, _ = fired("pact", bits=2, clip_init=6.0)
    got = clips(method)[0](torch.tensor([-1.0, 0.9, 1.1, 4.9, 5.1, 99.0]))
    torch.testing.assert_close(got, torch.tensor([0.0, 0, 2, 4, 6, 6]))


@pytest.mark.parametrize(("given", "decay"), [(None, 0.25), (0.125, 0.125), (0.0, 0.0)])
def test_alpha_decays_as_told_or_as_the_training_does_and_steps_do_not(given, decay):
    session, method, optimizer = fired("pact", bits=4, clip_decay=given)
    optimizer.param_groups[0]["weight_decay"] = 0.25
    method._make_optimizer(session)
    for group in method.optimizer.param_groups:
        of_clips = any(p is r.values.get("alpha") for r in clips(method) for p in group["params"])
        assert group["weight_decay"] == (decay if of_clips else 0.0) or decay == 0.0
    alpha = clips(method)[0].values["alpha"]
    for r in method.learned.values():
        for p in r.values.values():
            p.grad = torch.zeros_like(p)
    before = alpha.item()
    method.on_before_step(session)
    assert alpha.item() == pytest.approx(before * (1 - 0.05 * decay))


def test_weights_by_dorefa_or_as_observed():
    _, method, _ = fired("pact", bits=4)
    assert all(isinstance(g, DorefaGrid) for g in method.grids.values())
    _, method, _ = fired("pact", bits=4, weight_rule="observer", per_channel=True)
    assert not any(isinstance(g, DorefaGrid) for g in method.grids.values())
    assert {e.axis for e in method.edits(method.session) if e.role == "weight"} == {0}


def test_options_of_observed_weights_count_with_these_only():
    with pytest.raises(ValueError, match="per_channel does not count here"):
        PactOptions(when={"start": "0ep"}, per_channel=True)
    with pytest.raises(ValueError, match="1 bit has no level for 0"):
        PactOptions(when={"start": "0ep"}, bits=2, weight_bits=1, weight_rule="observer")


def test_entries_of_the_converter_are_taken():
    PactOptions(bits=4, weight_bits=3, clip_init=6.0, clip_decay=0.001, when={"start": "0ep"})
    PactOptions(bits=4, activations=False, clip_init=8.0, when={"start": "0ep"})


def test_no_activation_leaves_0_to_alpha():
    *_, method = trained("pact", bits=4, clip_init=1.5)
    with torch.no_grad():
        for a in method.placement.activations:
            q = method.quantizers[a.id]
            y = q(50 * batch(0))
            if a.nonnegative:
                assert float(y.min()) == 0
                assert float(y.max()) == pytest.approx(15 * float(q.scale))
