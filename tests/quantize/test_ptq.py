"""Post-training quantization of a small net: known grids, exact integers, edits, refusals."""

import copy

import pytest
import torch
from quant_session import PROFILE, FakeSession, batch, net
from torch import nn
from torch.nn import functional as F

from gracile.core.plan import Plan
from gracile.errors import BindError, GracileError, UserError
from gracile.quantize import engine
from gracile.quantize.affine import dequantize, quantize
from gracile.quantize.methods.ptq import Ptq, PtqOptions
from gracile.quantize.restore import simulate


@pytest.fixture(autouse=True)
def _profile(monkeypatch):
    monkeypatch.setattr(engine, "load_profile", lambda name: PROFILE)
    monkeypatch.setattr(engine, "sums_saturate", lambda: False)


def ptq(session, id="int8", **options):
    method = Ptq(id, PtqOptions(**options))
    method.on_attach(session)
    return method


def quantized(model=None, **options):
    session = FakeSession(model or net())
    method = ptq(session, **options)
    method.on_fire(session, 1.0)
    return session, method


def error(model, float_model):
    x = batch(7, 64)
    with torch.no_grad():
        return ((model(x) - float_model(x)).norm() / float_model(x).norm()).item()


# --- reference


def test_known_calibration_data_give_known_grids():
    x = torch.full((1, 3, 8, 8), 0.5)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = -1.0, 1.55
    session = FakeSession(net(), calibration=[x])
    method = ptq(session, observer={"name": "min_max"})
    method.on_fire(session, 1.0)
    scale, zero_point = (method.tensors()[f"x.input.{k}"] for k in ("scale", "zero_point"))
    assert scale.item() == pytest.approx(0.01)
    assert zero_point.item() == 100
    weight = session.parameter("conv2.weight").detach()
    torch.testing.assert_close(
        method.tensors()["conv2.weight.weight.scale"], weight.abs().amax((1, 2, 3)) / 127
    )


def test_every_edit_and_its_tensors():
    session, method = quantized()
    edits = method.edits(session)
    assert [(e.at, e.role) for e in edits] == [
        ("conv1.weight", "weight"),
        ("conv2.weight", "weight"),
        ("fc.weight", "weight"),
        ("x", "input"),
        ("relu", "output"),
        ("bn2", "output"),
        ("relu_1", "output"),
        ("pool", "output"),
        ("mean", "output"),
        ("flatten", "output"),
    ]
    tensors = method.tensors()
    assert set(tensors) == {f"{e.key}.{k}" for e in edits for k in ("scale", "zero_point")}
    assert tensors["fc.weight.weight.scale"].shape == (5,)
    assert all(
        v.shape == ()
        for k, v in tensors.items()
        if not k.endswith(".weight.scale") and not k.endswith(".weight.zero_point")
    )
    for a, b in (("relu_1", "pool"), ("mean", "flatten")):
        assert tensors[f"{a}.output.scale"] == tensors[f"{b}.output.scale"]
    plan = session.finish(method)[1]
    assert Plan.model_validate_json(plan.to_json()) == plan


def test_nonnegative_activations_have_zero_point_zero():
    tensors = quantized()[1].tensors()
    for id in ("relu", "relu_1", "pool", "mean", "flatten"):
        assert tensors[f"{id}.output.zero_point"] == 0
    assert tensors["bn2.output.zero_point"] != 0


# --- properties


def test_more_bits_are_closer_to_the_float_network():
    errors = []
    for bits in (4, 6, 8, 12):
        session = FakeSession(net(), calibration=[batch(7, 64)])
        method = ptq(session, bits=bits, observer={"name": "min_max"})
        method.on_fire(session, 1.0)
        errors.append(error(session.model, net()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.02
    assert errors[3] < errors[2] / 8  # steps are 16 times finer


@pytest.mark.parametrize(
    "options",
    [
        {"symmetric": True},
        {"weight_symmetric": False},
        {"per_channel": False},
        {"weight_bits": 6},
        {"observer": {"name": "percentile", "q": 99.0}},
        {"weight_observer": {"name": "percentile", "q": 90.0}},
        {"weights": ["type:Conv2d", "!conv1"]},
    ],
)
def test_options_change_the_result_and_keep_it_close(options):
    default = quantized()[0].model(batch(1)).detach()
    session, method = quantized(**options)
    assert not torch.equal(session.model(batch(1)), default)
    assert error(session.model, net()) < 0.2
    assert len(method.edits(session)) > 4


def test_weights_on_the_grid_give_their_integers_back():
    session, method = quantized(weight_symmetric=False)
    for bits, symmetric in ((8, True), (8, False), (4, True), (16, True)):
        session, method = quantized(weight_bits=bits, weight_symmetric=symmetric)
        before = {a: session.parameter(a).detach().clone() for a in method.grids}
        grids = dict(method.grids)
        model, _, tensors = session.finish(method)
        for address, grid in grids.items():
            scale = tensors[f"{address}.weight.scale"]
            zero_point = tensors[f"{address}.weight.zero_point"]
            q = quantize(before[address], scale, zero_point, grid.qmin, grid.qmax, 0)
            stored = model.get_parameter(address).detach()
            assert torch.equal(dequantize(q, scale, zero_point, 0), stored)
            assert torch.equal(quantize(stored, scale, zero_point, grid.qmin, grid.qmax, 0), q)
            assert q.abs().max() == grid.qmax or not symmetric  # the whole grid is used


@pytest.mark.parametrize(
    ("options", "without_vnni", "with_vnni"),
    [
        ({}, 7, 8),
        ({"half_range": True}, 7, 7),
        ({"half_range": False}, 8, 8),
        ({"activations": False}, 8, 8),
        ({"activations": False, "half_range": True}, 7, 7),
        ({"activations": False, "after": "other"}, 7, 8),
        ({"weight_bits": 4}, 4, 4),
        ({"bits": 4, "weight_bits": 8}, 7, 8),
    ],
)
def test_weights_use_half_their_range_where_sums_would_saturate(
    monkeypatch, options, without_vnni, with_vnni
):
    for saturate, bits in ((True, without_vnni), (False, with_vnni)):
        monkeypatch.setattr(engine, "sums_saturate", lambda answer=saturate: answer)
        session, method = quantized(**options)
        assert {w.bits for w in method.placement.weights} == {bits}
        for address, grid in method.grids.items():
            weight = session.parameter(address).detach()
            scale, zero_point = grid.params(weight)
            levels = quantize(weight, scale, zero_point, grid.qmin, grid.qmax, grid.spec.axis)
            assert levels.abs().max() == 2 ** (bits - 1) - 1


def test_masked_weights_stay_zero():
    session = FakeSession(net())
    keep = torch.rand(6, 6, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    session.overlays.set("conv2.weight", "mask", lambda w: w * keep)
    method = ptq(session, weight_symmetric=False)
    method.on_fire(session, 1.0)
    session.finish(method)
    assert (session.parameter("conv2.weight")[~keep] == 0).all()
    assert (session.parameter("conv2.weight")[keep] != 0).float().mean() > 0.9


# --- equivalences


def test_simulation_equals_integer_arithmetic():
    """conv2 of the net in int64: sum (q_x - z_x) q_w + b, rescaled and rounded once."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.fc = nn.Linear(4 * 64, 2)

        def forward(self, x):
            return self.fc(torch.flatten(F.relu(self.conv(x)), 1))

    torch.manual_seed(0)
    session = FakeSession(Two().eval())
    method = ptq(session)
    method.on_fire(session, 1.0)
    seen = {}
    quantizers = dict(method.quantizers)
    quantizers["relu"].register_forward_hook(lambda m, a, out: seen.update(relu=out))
    model, _, t = session.finish(method)
    x = batch(3)
    with torch.no_grad():
        model(x)
    q_x = quantize(x, t["x.input.scale"], t["x.input.zero_point"], 0, 255)
    weight, w_scale = model.get_parameter("conv.weight"), t["conv.weight.weight.scale"]
    q_w = quantize(weight, w_scale, torch.zeros(4, dtype=torch.int32), -127, 127, 0)
    bias_scale = t["x.input.scale"].double() * w_scale.double()
    q_b = torch.round(model.get_parameter("conv.bias").double() / bias_scale).long()
    total = F.conv2d((q_x - t["x.input.zero_point"]).long(), q_w.long(), q_b, padding=1)
    real = total * bias_scale.reshape(1, -1, 1, 1) / t["relu.output.scale"].double()
    q_out = torch.round(real).clamp(0, 255)  # relu: zero point 0
    q_simulated = seen["relu"] / t["relu.output.scale"]
    difference = (q_simulated - q_out).abs()
    assert difference.max() <= 1.001  # the bias is rounded to 32 bits only in integers
    assert (difference < 1e-3).double().mean() > 0.999


def test_a_model_restored_from_plan_and_tensors_computes_the_same():
    plain = net()
    session, method = quantized(plain)
    model, plan, tensors = session.finish(method)
    loaded = net()
    loaded.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    again = simulate(loaded, Plan.model_validate_json(plan.to_json()), tensors, batch(0, 2))
    with torch.no_grad():
        assert torch.equal(again(batch(5)), model(batch(5)))
        assert not torch.equal(loaded(batch(5)), model(batch(5)))


def test_state_round_trip_restores_the_quantized_model():
    session, method = quantized()
    fresh = FakeSession(net())
    other = ptq(fresh)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    with torch.no_grad():
        assert torch.equal(fresh.model(batch(5)), session.model(batch(5)))
    assert other.edits(fresh) == method.edits(session)
    idle = ptq(FakeSession(net()))
    idle.load_state_dict(ptq(FakeSession(net())).state_dict())
    assert not idle.laid


def test_removed_filters_take_their_scales_with_them():
    session, method = quantized()
    before = method.tensors()["conv1.weight.weight.scale"]
    fc = method.tensors()["fc.weight.weight.scale"]
    session.cut({"conv1.weight": {1, 4}}, method, None)
    after = method.tensors()
    assert torch.equal(after["conv1.weight.weight.scale"], before[[0, 2, 3, 5]])
    assert after["conv2.weight.weight.scale"].shape == (4,)
    assert torch.equal(after["fc.weight.weight.scale"], fc)  # only its inputs were cut
    assert session.model(batch(0)).shape == (8, 5)


def test_weights_alone_need_no_calibration():
    assert "calibration" not in Ptq("w", PtqOptions(activations=False)).needs
    session = FakeSession(net(), calibration=[])
    method = ptq(session, activations=False, weight_bits=4)
    method.on_fire(session, 1.0)
    assert {e.role for e in method.edits(session)} == {"weight"}
    assert type(session.model).__name__ == "Net"
    model, plan, tensors = session.finish(method)
    assert simulate(model, plan, tensors, batch(0, 2)) is model


def test_the_later_of_two_methods_owns_the_grids():
    session, first = quantized()
    second = ptq(session, "again", bits=6, after="int8")
    second.on_fire(session, 1.0)
    assert first.edits(session) == []
    assert {e.bits for e in second.edits(session)} == {6}
    assert len([n for n in session.graph if n.op == "quantize"]) == len(second.quantizers)


# --- refusals


def test_two_quantizers_claim_the_same_things():
    session = FakeSession(net())
    one, other = ptq(session, "a"), ptq(session, "b", weights="fc")
    both = set(one.claims(session)) & set(other.claims(session))
    assert ("bits:weight", "fc.weight") in both
    assert ("bits:output", "flatten") in both
    assert ("bits:input", "x") in set(one.claims(session))


def test_a_selector_without_match_is_refused_at_attach():
    with pytest.raises(
        BindError, match=r"'conv2.weigth' matches no tensor.*Nearest: 'conv2.weight'"
    ):
        ptq(FakeSession(net()), weights="conv2.weigth")
    with pytest.raises(BindError, match="no selected weight can be quantized"):
        ptq(FakeSession(net()), weights="bn1")


def test_a_forward_that_branches_on_data_is_refused_with_a_way_out():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else self.fc(-x)

    session = FakeSession(Branch())
    session.example = torch.ones(2, 4)
    with pytest.raises(BindError, match="activations: false"):
        ptq(session)


def test_what_stays_in_float_is_noted_with_the_reason():
    session, _ = quantized(weights=["conv2", "fc"])
    assert session.notes == [
        (
            "conv1", "precision", "float", "not_asked",
            "its weight 'conv1.weight' is not selected", "int8",
        )
    ]  # fmt: skip


def test_ranges_of_a_diverged_network_name_the_operator():
    model = net()
    with torch.no_grad():
        model.bn2.weight.fill_(float("nan"))
    with pytest.raises(GracileError, match=r"'int8': the range of 'bn2': .*NaN"):
        quantized(model)


def test_a_plan_of_another_network_is_refused():
    session, method = quantized()
    _, plan, tensors = session.finish(method)
    lost = dict(tensors)
    del lost["bn2.output.scale"]
    with pytest.raises(UserError, match=r"lacks 'bn2\.output\.scale'"):
        simulate(net(), plan, lost, batch(0, 2))
    with pytest.raises(UserError, match="belongs to another network"):
        simulate(nn.Sequential(nn.Conv2d(3, 4, 3)), plan, tensors, batch(0, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"when": {"start": "1ep"}}, "acts once"),
        ({"when": {"at": ["1ep", "2ep"]}}, "acts once"),
        ({"bits": 1}, "greater than or equal to 2"),
        ({"observer": {"name": "percentil"}}, "Nearest: 'percentile'"),
        ({"bit": 8}, "Extra inputs"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PtqOptions(**options)


@pytest.mark.parametrize(
    ("observer", "message"),
    [
        ({"name": "percentile", "q": 20.0}, r"q must be in \(50, 100\] percent, got 20"),
        ({"name": "aciq", "distribution": "beta"}, "distribution must be 'best' or"),
        ({"name": "mse", "steps": 0}, "steps must be 2 or more"),
    ],
)
def test_options_of_an_observer_are_checked_with_the_recipe(observer, message):
    for key in ("observer", "weight_observer"):
        with pytest.raises(ValueError, match=message):
            PtqOptions(**{key: observer})


# --- grids


def test_all_scales_are_powers_of_two_if_asked():
    session, method = quantized(scale="power_of_two", weight_symmetric=False, zero="tune")
    for name, value in method.tensors().items():
        if name.endswith(".scale"):
            assert (torch.frexp(value).mantissa == 0.5).all(), name
    assert error(session.model, net()) < 0.1


def test_tuned_ranges_hold_all_that_was_seen():
    session = FakeSession(net())
    method = ptq(session, observer="min_max", bits=4, zero="tune")
    method.on_fire(session, 1.0)
    for id, r in method.ranges().items():
        q = method.quantizers[id]
        assert (q.qmin - q.zero_point) * q.scale <= r.low + 1e-6
        assert (q.qmax - q.zero_point) * q.scale >= r.high - 1e-6


@pytest.mark.parametrize("observer", ["kl", "mse", "histogram", "aciq", "three_sigma"])
def test_observers_are_told_the_grid(observer):
    told = {}
    session = FakeSession(net())
    method = ptq(session, observer=observer, weight_observer=observer, bits=5, weight_bits=3)
    method.lay(session)
    for a in method.placement.activations:
        if a.observed:
            o = method.quantizers[a.id].observer
            told[a.id] = (o.bits, o.signed, o.symmetric, o.axis)
    assert told["x"] == (5, False, False, None)
    assert told["relu"] == (5, False, True, None)
    made = []
    grid = method.grids["conv2.weight"]
    grid.make_observer = lambda: made.append(method.options.weight_observer.fn()) or made[0]
    grid.params(session.parameter("conv2.weight"))
    o = made[0]
    assert (o.bits, o.signed, o.symmetric, o.narrow, o.axis) == (3, True, True, True, 0)


def test_clipped_weights_round_better_at_few_bits():
    errors = []
    for observer in ("min_max", "mse"):
        session, method = quantized(weight_bits=3, weight_observer=observer, per_channel=False)
        weight = session.parameter("conv2.weight").detach()
        errors.append((method.grids["conv2.weight"](weight) - weight).pow(2).sum().item())
    assert errors[1] < errors[0]


def test_sums_that_could_outgrow_32_bits_are_told():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    for bits, told in ((8, False), (16, True)):
        session = FakeSession(model)
        method = ptq(session, bits=bits)
        method.on_fire(session, 1.0)
        session.finish(method)
        codes = [code for code, _ in session.warnings]
        assert ("quantize.accumulator" in codes) is told
    assert "'1' need" in session.warnings[0][1]
