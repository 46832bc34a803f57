"""LSQ by hand: first steps, the scaled gradient, signed grids in unsigned integers."""

import math

import pytest
import torch
from learned_case import fired, trained
from quant_session import PROFILE, batch, net

from gracile.quantize import engine
from gracile.quantize.learned_ranges import Step
from gracile.quantize.placement import ActivationSpec, WeightSpec


@pytest.fixture(autouse=True)
def _profile(monkeypatch):
    monkeypatch.setattr(engine, "load_profile", lambda name: PROFILE)
    monkeypatch.setattr(engine, "sums_saturate", lambda: False)


def test_first_steps_are_two_mean_magnitudes_over_the_root_of_qp():
    session, method, _ = fired("lsq", bits=4)
    w = session.parameter("conv2.weight").detach()
    got = method.learned["conv2.weight.weight"].values["step"]
    torch.testing.assert_close(got, 2 * w.abs().mean((1, 2, 3)) / math.sqrt(7))
    images = torch.cat(session.batches)
    got = method.learned["x.input"].values["step"]  # may be negative: 8 levels of each sign
    torch.testing.assert_close(got, 2 * images.abs().mean() / math.sqrt(7))
    relu = next(a for a in method.placement.activations if a.nonnegative)
    assert Step(relu).levels == 15


def test_one_step_a_tensor():
    session, method, _ = fired("lsq", bits=4, per_channel=False)
    w = session.parameter("fc.weight").detach()
    got = method.learned["fc.weight.weight"].values["step"]
    torch.testing.assert_close(got, 2 * w.abs().mean() / math.sqrt(7))


def test_an_observer_may_give_the_first_range_instead():
    session, method, _ = fired("lsq", observer="min_max", weight_observer="min_max")
    w = session.parameter("fc.weight").detach()
    got = method.learned["fc.weight.weight"].values["step"]
    torch.testing.assert_close(got, w.abs().amax(1) / 127)
    low, high = torch.cat(session.batches).aminmax()
    # The observed grid is asymmetric; the step covers all of it from the middle.
    span = torch.maximum(high / 127, -low / 128)
    torch.testing.assert_close(method.learned["x.input"].values["step"], span, rtol=0.01, atol=0)


@pytest.mark.parametrize(("spec", "each"), [
    (WeightSpec("w", 3, True, True, None, True), 8),
    (WeightSpec("w", 3, True, True, 0, True), 4),
    (ActivationSpec("a", "output", 2, False, True, True, None, True), 4),
])  # fmt: skip
def test_the_gradient_is_eq_3_divided_by_the_root_of_n_qp(spec, each):
    """v / s = 0.4, 1.3, 9, 0 twice: sum of -0.4, -0.3, Qp, 0."""
    x = torch.tensor([[0.4, 1.3, 9.0, 0.0], [0.4, 1.3, 9.0, 0.0]])
    r = Step(spec)
    r.start(torch.ones(2 if spec is not None and r.axis == 0 else ()), torch.tensor(0))
    r(x).sum().backward()
    rows = 1 if r.axis == 0 else 2
    want = rows * (-0.7 + 3) / math.sqrt(each * 3)
    assert r.values["step"].grad.reshape(-1)[0].item() == pytest.approx(want)


def test_values_of_both_signs_have_the_signed_grid_in_unsigned_integers():
    _, method, _ = fired("lsq", bits=4)
    q = method.quantizers["x"]
    assert (q.signed, int(q.zero_point)) == (False, 8)
    with torch.no_grad():
        y = q(1000 * batch(0)) / q.scale
    assert (float(y.min()), float(y.max())) == (-8, 7)


def test_a_pruned_filter_keeps_the_others_step():
    model = net()
    with torch.no_grad():
        model.conv1.weight[2] = 0
    _, method, _ = fired("lsq", model)
    step = method.learned["conv1.weight.weight"].values["step"]
    assert step[2] == step.max()


def test_first_and_last_layers_keep_8_bits():
    _, plan, _, _ = trained("lsq", bits=3, edges_bits=8)
    bits = {e.at: e.bits for e in plan.of_kind("bits")}
    assert (bits["conv1.weight"], bits["conv2.weight"], bits["fc.weight"]) == (8, 3, 8)
    assert bits["x"] == 8
    assert sorted(bits.values()).count(3) >= 3
