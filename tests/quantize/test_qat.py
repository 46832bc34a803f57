"""Quantization-aware training: what moves, when it stops, and that a stop changes nothing."""

import copy

import pytest
import torch
from quant_session import PROFILE, FakeSession, batch, labelled, net, run

from gracile.core.schedule import timetable
from gracile.errors import BindError
from gracile.quantize import engine
from gracile.quantize.affine import quantize
from gracile.quantize.methods.qat import Qat, QatOptions
from gracile.quantize.restore import simulate


@pytest.fixture(autouse=True)
def _profile(monkeypatch):
    monkeypatch.setattr(engine, "load_profile", lambda name: PROFILE)
    monkeypatch.setattr(engine, "sums_saturate", lambda: False)


def start(model=None, *, epochs=3, **options):
    options.setdefault("when", {"start": "1ep"})
    session = FakeSession(model or net(), epochs=epochs)
    method = Qat("qat", QatOptions(**options))
    method.on_attach(session)
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05, momentum=0.9)
    return session, method, optimizer


def scales(method):
    return {id: q.scale.item() for id, q in method.quantizers.items()}


def test_nothing_is_quantized_before_the_start():
    session, method, optimizer = start()
    run(session, method, optimizer, 1)
    assert not method.laid
    run(session, method, optimizer, 2, first=1)
    assert all(q.mode == "quantize" for q in method.quantizers.values())


def test_it_fires_once_whatever_way_the_start_is_written():
    for when in ({"start": "1ep"}, {"at": "1ep"}):
        method = Qat("q", QatOptions(when=when))
        assert timetable(method.options.timing, FakeSession(net()).calendar).instants == ((1, 0),)


def test_training_lowers_the_loss_of_the_rounded_network():
    session, method, optimizer = start(epochs=8, bits=4, when={"start": "0ep"})
    losses = run(session, method, optimizer, 8)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_weight_scales_follow_the_weights():
    session, method, optimizer = start()
    run(session, method, optimizer, 3)
    weight = session.parameter("conv2.weight").detach().clone()
    assert method.grids["conv2.weight"].scale is None
    _, _, tensors = session.finish(method)
    torch.testing.assert_close(
        tensors["conv2.weight.weight.scale"], weight.abs().amax((1, 2, 3)) / 127
    )


def test_activation_ranges_move_and_stand_still_in_the_last_third():
    session, method, optimizer = start(epochs=4)  # starts at 1, frozen from 3
    run(session, method, optimizer, 2)
    early = scales(method)
    run(session, method, optimizer, 3, first=2)
    before_freeze = scales(method)
    assert early != before_freeze
    assert not method.frozen
    run(session, method, optimizer, 4, first=3)
    assert method.frozen
    assert scales(method) == before_freeze


def test_the_freeze_can_be_set():
    session, method, optimizer = start(freeze_observers="6mb")
    run(session, method, optimizer, 2)
    assert method.frozen
    session, method, optimizer = start(freeze_observers="2ep")
    run(session, method, optimizer, 2)
    assert not method.frozen


def test_a_moving_average_follows_the_training_batches_by_hand():
    """The input's range after one step: 0.5 of calibration, 0.5 of the batch."""
    session, method, optimizer = start(
        when={"start": "0ep"}, observer={"name": "moving_average", "momentum": 0.5}
    )
    session.batches = [torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)]
    session.steps = 1
    run(session, method, optimizer, 1)
    low, high = labelled(100)[0].aminmax()
    expected = ((high + 1) / 2 - (low - 1) / 2) / 255
    assert method.quantizers["x"].scale.item() == pytest.approx(expected.item(), rel=1e-5)


def test_batch_norm_stands_still_from_freeze_bn_on():
    session, method, optimizer = start(freeze_bn="2ep")
    run(session, method, optimizer, 2)
    before = session.model.get_buffer("bn1.running_mean").clone()
    gamma = session.parameter("bn1.weight").detach().clone()
    run(session, method, optimizer, 3, first=2)
    assert torch.equal(session.model.get_buffer("bn1.running_mean"), before)
    assert not torch.equal(session.parameter("bn1.weight"), gamma)


def test_evaluation_and_copies_do_not_move_ranges():
    session, method, optimizer = start()
    run(session, method, optimizer, 2)
    before = copy.deepcopy(method.state_dict()["observers"])
    twin = copy.deepcopy(session.model).train()
    twin(100 * batch(0))
    session.model.eval()(100 * batch(0))
    after = method.state_dict()["observers"]
    assert all(torch.equal(before[k][e], after[k][e]) for k in before for e in ("low", "high"))


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_stopped_and_resumed_equals_uninterrupted(stop_after):
    session, method, optimizer = start(epochs=4)
    whole = run(session, method, optimizer, 4)
    expected = session.finish(method)

    session, method, optimizer = start(epochs=4)
    losses = run(session, method, optimizer, stop_after)
    stored = copy.deepcopy(
        {
            "method": method.state_dict(),
            "model": session.model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
    )
    session, method, optimizer = start(net(seed=5), epochs=4)  # other weights, all overwritten
    method.load_state_dict(stored["method"])
    session.model.load_state_dict(stored["model"])
    optimizer.load_state_dict(stored["optimizer"])
    losses += run(session, method, optimizer, 4, first=stop_after)
    assert losses == whole
    model, plan, tensors = session.finish(method)
    assert plan == expected[1]
    assert all(torch.equal(tensors[k], v) for k, v in expected[2].items())
    assert torch.equal(model(batch(1)), expected[0](batch(1)))


def test_the_result_is_the_network_that_was_trained():
    session, method, optimizer = start()
    run(session, method, optimizer, 3)
    session.model.eval()
    with torch.no_grad():
        trained = session.model(batch(2))
    quantizers = dict(method.quantizers)
    model, plan, tensors = session.finish(method)
    with torch.no_grad():
        assert torch.equal(model(batch(2)), trained)
        assert torch.equal(simulate(model_of(model), plan, tensors, batch(0, 2))(batch(2)), trained)
    assert all(q.observer is None and not q._forward_pre_hooks for q in quantizers.values())
    w, scale = model.get_parameter("fc.weight"), tensors["fc.weight.weight.scale"]
    zero = torch.zeros(5, dtype=torch.int32)
    again = quantize(w, scale, zero, -127, 127, 0) * scale.unsqueeze(1)
    assert torch.equal(again, w)


def model_of(quantized):
    plain = net()
    own = plain.state_dict()
    plain.load_state_dict({k: v for k, v in quantized.state_dict().items() if k in own})
    return plain


def test_training_goes_on_after_channels_were_removed():
    session, method, optimizer = start()
    run(session, method, optimizer, 2)
    session.cut({"conv1.weight": {1, 4}}, method, optimizer)
    run(session, method, optimizer, 3, first=2)
    model, _, tensors = session.finish(method)
    assert model.get_parameter("conv1.weight").shape[0] == 4
    assert tensors["conv1.weight.weight.scale"].shape == (4,)
    assert tensors["conv2.weight.weight.scale"].shape == (4,)  # added to conv1's channels
    w, scale = model.get_parameter("conv2.weight"), tensors["conv2.weight.weight.scale"]
    q = w / scale[:, None, None, None]
    torch.testing.assert_close(q, q.round())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"when": {"at": "end"}}, "'at: end' is too late"),
        ({"when": {"start": "1ep", "every": "1ep"}}, "begins once"),
        ({"when": {"at": ["1ep", "2ep"]}}, "begins once"),
        ({}, "when"),
    ],
)
def test_bad_timing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QatOptions(**options)


def test_a_freeze_after_the_end_is_refused():
    with pytest.raises(BindError, match="freeze_observers: 3ep is not before the end"):
        start(freeze_observers="3ep")
    with pytest.raises(BindError, match="freeze_bn: 9ep"):
        start(freeze_bn="9ep")
