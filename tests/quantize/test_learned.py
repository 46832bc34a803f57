"""Learned ranges: how they start, are trained, stopped, resumed, cut, and what is deployed."""

import copy

import pytest
import torch
from learned_case import fired, resumed, same, start, trained
from quant_session import PROFILE, batch, labelled, net, run
from torch.nn import functional as F

from gracile.errors import BindError
from gracile.nn.rounding import fake_quantize
from gracile.quantize import engine
from gracile.quantize.learned_ranges import Clip, End, Span, Step
from gracile.quantize.methods.qat import Qat, QatOptions
from gracile.quantize.placement import ActivationSpec, WeightSpec
from gracile.quantize.restore import simulate

ALL = ["lsq", "learned", "pact", "dorefa", "wrpn"]
every = pytest.mark.parametrize("name", ALL)


@pytest.fixture(autouse=True)
def _profile(monkeypatch):
    monkeypatch.setattr(engine, "load_profile", lambda name: PROFILE)
    monkeypatch.setattr(engine, "sums_saturate", lambda: False)


def weight(bits=4, symmetric=True, axis=None):
    return WeightSpec("w", bits, True, symmetric, axis, symmetric)


def activation(bits=4, *, nonnegative=True):
    return ActivationSpec("a", "output", bits, False, nonnegative, nonnegative, None, True)


# ------------------------------------------------------------------ ranges


def test_a_symmetric_end_has_the_gradient_of_its_scale_over_qmax():
    """v = -9, 0.3, 0.3, 9 and end 3 on -3..3: s = 1; (-3 + (0 - 0.3) * 2 + 3) / 3."""
    r = End(weight(3))
    r.start(torch.tensor(1.0), torch.tensor(0))
    r(torch.tensor([-9.0, 0.3, 0.3, 9.0])).sum().backward()
    assert r.values["end"].item() == 3
    assert r.values["end"].grad.item() == pytest.approx(-0.2)


def test_a_span_has_the_gradients_of_both_its_parameters_by_hand():
    """low -1, span 3, 2 bits: s = 1, z = 1, grid -1..2. Below: y = low. Above: y = low + span.
    Inside d/dspan = (round(v) - v) / 3."""
    r = Span(activation(2, nonnegative=False))
    r.start(torch.tensor(1.0), torch.tensor(1, dtype=torch.int32))
    x = torch.tensor([-5.0, 0.4, 1.2, 7.0], requires_grad=True)
    y = r(x)
    assert y.tolist() == [-1, 0, 1, 2]
    (y * torch.tensor([1.0, 10, 100, 1000])).sum().backward()
    assert r.values["low"].grad.item() == pytest.approx(1001)
    assert r.values["span"].grad.item() == pytest.approx((10 * -0.4 + 100 * -0.2) / 3 + 1000)
    assert x.grad.tolist() == [0, 10, 100, 0]


def test_zero_stays_on_the_grid_of_a_span_and_inside_it():
    r = Span(activation(4, nonnegative=False))
    r.start(torch.tensor(0.1), torch.tensor(5, dtype=torch.int32))
    with torch.no_grad():
        before = {k: v.clone() for k, v in r.values.items()}
        r.values["low"].fill_(0.3)
        r.limit(before)
    assert r.values["low"].item() == 0
    with torch.no_grad():
        r.values["low"].fill_(-0.4437)
    scale, zero = r.fixed()
    assert r(torch.zeros(3)).tolist() == [0, 0, 0]
    assert zero.item() == round(0.4437 / scale.item())


def test_a_step_may_at_most_double_or_halve():
    r = Step(weight())
    r.start(torch.tensor(0.5), torch.tensor(0))
    for wanted, got in ((-3.0, 0.25), (9.0, 0.5), (0.4, 0.4)):
        before = {k: v.detach().clone() for k, v in r.values.items()}
        with torch.no_grad():
            r.values["step"].fill_(wanted)
        r.limit(before)
        assert r.values["step"].item() == pytest.approx(got)


def test_a_clip_gets_a_gradient_from_what_it_clips_only():
    r = Clip(activation(2))
    r.start(torch.tensor(2.0), torch.tensor(0, dtype=torch.int32))
    assert r.values["alpha"].item() == 6
    r(torch.tensor([-1.0, 0.7, 3.3, 8.0, 7.0])).sum().backward()
    assert r.values["alpha"].grad.item() == 2


# ------------------------------------------------------------------ every method that learns


@every
@pytest.mark.parametrize("stop_after", [1, 2])
def test_stopped_and_resumed_equals_uninterrupted(name, stop_after):
    options = {"bits": 4, "when": {"start": "1ep"}}
    same(trained(name, **options), resumed(name, stop_after, **options))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resuming_before_and_after_the_freeze(kind, stop_after):
    options = {"bits": 4, "freeze": "2ep", "range_optimizer": kind, "epochs": 4}
    same(trained("lsq", **options), resumed("lsq", stop_after, **options))


@every
def test_what_is_deployed_is_what_was_trained(name):
    session, method, optimizer = start(name, bits=3)
    run(session, method, optimizer, 3)
    session.model.eval()
    with torch.no_grad():
        before = session.model(batch(2))
    model, plan, tensors = session.finish(method)
    with torch.no_grad():
        assert torch.equal(model(batch(2)), before)
        plain = net()
        own = plain.state_dict()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in own})
        assert torch.equal(simulate(plain, plan, tensors, batch(0, 2))(batch(2)), before)
    for edit in plan.of_kind("bits"):
        scale, zero = tensors[f"{edit.key}.scale"], tensors[f"{edit.key}.zero_point"]
        assert bool((scale > 0).all())
        assert edit.qmin <= int(zero.min()) <= int(zero.max()) <= edit.qmax
        if edit.role == "weight":
            w = model.get_parameter(edit.at)
            again = fake_quantize(w, scale, zero, edit.qmin, edit.qmax, edit.axis and 0)
            wide = scale.reshape(-1, *[1] * (w.ndim - 1)) if scale.ndim else scale
            level = w / wide
            torch.testing.assert_close(level, level.round(), rtol=0, atol=1e-4)
            assert again.shape == w.shape


@every
def test_training_lowers_the_loss(name):
    options = {"weight_bits": 8} if name == "wrpn" else {}  # most of its weights are below 1 / 7
    session, method, optimizer = start(name, epochs=8, bits=4, **options)
    losses = run(session, method, optimizer, 8)
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])


@pytest.mark.parametrize("name", ["lsq", "learned"])
def test_ranges_move_and_stand_still_from_the_freeze_on(name):
    session, method, optimizer = start(name, epochs=4, bits=4, freeze="2ep")
    method_scales = lambda: {k: r.fixed()[0].clone() for k, r in method.learned.items()}  # noqa: E731
    run(session, method, optimizer, 1)
    first = method_scales()
    run(session, method, optimizer, 2, first=1)
    second = method_scales()
    assert all(not torch.equal(first[k], second[k]) for k in first)
    run(session, method, optimizer, 4, first=2)
    assert method.frozen
    assert all(torch.equal(second[k], v) for k, v in method_scales().items())
    _, _, tensors = session.finish(method)
    assert torch.equal(tensors["fc.weight.weight.scale"], second["fc.weight.weight"])


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_scales_and_their_optimizer_follow_a_cut(kind):
    session, method, optimizer = start("lsq", bits=4, range_optimizer=kind)
    run(session, method, optimizer, 2)
    range_ = method.learned["conv1.weight.weight"]
    before = range_.values["step"].detach().clone()
    name = "momentum_buffer" if kind == "sgd" else "exp_avg"
    momentum = method.optimizer.state[range_.values["step"]][name].clone()
    session.cut({"conv1.weight": {1, 4}}, method, optimizer)
    left = torch.tensor([0, 2, 3, 5])
    assert torch.equal(range_.values["step"], before[left])
    assert torch.equal(method.optimizer.state[range_.values["step"]][name], momentum[left])
    run(session, method, optimizer, 3, first=2)
    model, _, tensors = session.finish(method)
    assert tensors["conv1.weight.weight.scale"].shape == (4,)
    assert model.get_parameter("conv1.weight").shape[0] == 4


def test_the_ranges_follow_the_learning_rate_of_the_training_unless_told():
    session, method, optimizer = fired("lsq")
    optimizer.param_groups[0]["lr"] = 0.123
    step(session, method)
    assert method.optimizer.param_groups[0]["lr"] == 0.123
    session, method, _ = fired("lsq", range_lr=0.5)
    step(session, method)
    assert method.optimizer.param_groups[0]["lr"] == 0.5


def step(session, method):
    x, y = labelled(0)
    F.cross_entropy(session.model.train()(x), y).backward()
    method.on_before_step(session)


def test_copies_of_the_model_have_ranges_of_their_own():
    session, method, _ = fired("lsq", bits=4)
    twin = copy.deepcopy(session.model)
    twin(batch(0)).sum().backward()
    assert all(
        v.grad is None
        for k, r in method.learned.items()
        if not k.endswith(".weight")
        for v in r.values.values()
    )


def test_another_entry_takes_over():
    session, method, optimizer = start("lsq", bits=4)
    run(session, method, optimizer, 1)
    later = Qat("later", QatOptions(when={"start": "1ep"}, after="q"))
    later.on_attach(session)
    later.on_fire(session, 1.0)
    assert all(q.rule is fake_quantize for q in later.quantizers.values())
    assert method.edits(session) == []
    assert {e.bits for e in later.edits(session)} == {8}


def test_weights_alone_need_no_calibration():
    session, method, optimizer = start("lsq", bits=4, activations=False)
    assert method.needs == {"train"}
    run(session, method, optimizer, 3)
    _, plan, _ = session.finish(method)
    assert {e.role for e in plan.of_kind("bits")} == {"weight"}


def test_small_batches_beside_batch_norm_are_warned_of():
    for options, said in (({}, True), ({"freeze_bn": "2ep"}, False)):
        session, method, _ = fired("lsq", **options)
        session.inputs = (batch(0),)
        method.on_batch_end(session)
        assert [c for c, _ in session.warnings] == ["small-batch"] * said
    session, method, _ = fired("lsq")
    session.inputs = (batch(0, 256),)
    method.on_batch_end(session)
    assert session.warnings == []


# ------------------------------------------------------------------ errors


def test_what_cannot_be_is_refused_with_the_way_out():
    with pytest.raises(BindError, match="freeze: 1ep must be after the start"):
        start("lsq", when={"start": "1ep"}, freeze="1ep")
    with pytest.raises(BindError, match="freeze: 3ep is not before the end"):
        start("lsq", freeze="3ep")
    with pytest.raises(ValueError, match="'at: end' is too late"):
        start("learned", when={"at": "end"})


def test_fp16_and_a_missing_optimizer_are_refused():
    session, method, _ = start("lsq")
    session.recipe.train.autocast = "fp16"
    with pytest.raises(BindError, match="Use autocast: bf16"):
        method.on_attach(session)
    session.recipe.train.autocast, session.optimizer = "none", None
    with pytest.raises(BindError, match="Set range_lr"):
        method.on_attach(session)
