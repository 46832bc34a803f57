"""Binary networks: formulas by hand, stages, surgery, resuming, what is deployed."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from binary_case import BATCH, STEPS, Tiny, data, finished, session, train
from torch import nn

import gracile
from gracile.benchmark.runtimes.base import load as load_artifact
from gracile.errors import BindError
from gracile.export import parity
from gracile.nn.binary import Binarizer, Step, step
from gracile.quantize.binary import BinaryGrid, ScaleThreshold, binary_spec, magnitude
from gracile.recipe.nncf import convert
from gracile.train.checkpoint import load_model

START = {"when": {"start": "0ep"}}


# ------------------------------------------------------------------ formulas


def test_the_step_and_its_gradients_by_hand():
    """Scale 2, thresholds 0.5 and 0.25: levels 1 and 0.5; NNCF's backward for a gradient of 1."""
    x = torch.tensor([[-1.0, 0.4], [0.0, 0.5], [1.0, 0.6], [1.5, 2.0], [3.0, -0.5]])
    x.requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)
    threshold = torch.tensor([0.5, 0.25], requires_grad=True)
    y = step(x, scale, threshold)
    assert y.tolist() == [[0, 0], [0, 0], [0, 2], [2, 2], [2, 0]]  # at the level itself: 0
    y.sum().backward()
    assert x.grad.tolist() == [[0, 1], [1, 1], [1, 1], [1, 1], [0, 0]]
    below = [(0 + 1) / 2, -0.2, 0, -0.25, -0.5, 0.7, 0.25, 0, 0.25]  # (y - x) / 2 where x <= 2
    assert float(scale.grad) == pytest.approx(sum(below) + 1)
    assert threshold.grad.tolist() == [-2, -3]  # of 0 < x < 2


def test_channels_of_a_linear_layer_lie_along_the_last_dim():
    y = step(torch.ones(2, 3, 2), torch.tensor(4.0), torch.tensor([0.5, 0.1]), -1)
    assert y[..., 0].unique().tolist() == [0]
    assert y[..., 1].unique().tolist() == [4]


@pytest.mark.parametrize(
    ("axis", "want"),
    [
        (0, [[1.5, -1.5], [-0.25, 0.25]]),
        (1, [[0.5, -1.25], [-0.5, 1.25]]),
        (None, [[0.875, -0.875], [-0.875, 0.875]]),
    ],
)
def test_weights_are_a_sign_and_a_mean_magnitude(axis, want):
    w = torch.tensor([[1.0, -2.0], [0.0, 0.5]], requires_grad=True)
    got = BinaryGrid(binary_spec("w", axis))(w)
    torch.testing.assert_close(got, torch.tensor(want))
    (got * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert w.grad.tolist() == [[1, 2], [3, 4]]


def test_the_gradient_of_xnor_net_by_hand():
    """1 / n + scale where |w| <= 1, n = 2 weights in a filter of scale 1.5."""
    w = torch.tensor([[1.0, -2.0]], requires_grad=True)
    BinaryGrid(binary_spec("w", 0), "xnor")(w).sum().backward()
    assert w.grad.tolist() == [[0.5 + 1.5, 0.5]]


def test_the_scale_is_that_of_least_squares():
    w = torch.randn(3, 50)
    best = (w * w.sign()).sum(1) / (w.sign() ** 2).sum(1)
    torch.testing.assert_close(magnitude(w, 0), best)


def test_what_is_deployed_is_what_was_trained():
    x, learned = torch.randn(4, 6, 5, 5), ScaleThreshold(6, 1)
    learned.start(torch.tensor(1.7))
    with torch.no_grad():
        learned.values["logit"].copy_(torch.randn(6))
    scale, level = learned.fixed()
    assert torch.equal(Step(scale, level)(x), learned(x))


# ------------------------------------------------------------------ in a network


def test_the_first_and_the_last_layer_and_kernels_of_one_place_stay_float():
    s = session()
    assert [w.address for w in s.methods[0].placement.weights] == ["inner.weight", "outer.weight"]
    named = session(weights="type:Conv2d").methods[0].placement.weights
    assert [w.address for w in named] == ["stem.weight", "inner.weight", "outer.weight"]
    with pytest.raises(BindError, match="no weight to put on one bit"):
        session(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)))


def test_activations_may_begin_before_weights_and_a_shortcut_stays_float():
    s = session(activations_from="1ep", when={"start": "2ep"})
    ids = {"inner.input.quantize", "outer.input.quantize"}
    for epoch, (read, weights) in enumerate([(False, False), (True, False), (True, True)]):
        train(s, epoch, epoch + 1)
        assert {n.id for n in s.graph.of_op("quantize")} == (ids if read else set())
        assert (s.overlays.get("inner.weight", "quantize") is not None) == weights
    assert s.graph["add"].inputs == ("relu", "outer")
    assert s.graph["inner"].inputs == ("inner.input.quantize",)


def test_the_first_scale_is_the_percentile_of_what_is_read():
    s = session()
    s.on_epoch_begin(0)
    seen = []
    s.model.eval().get_submodule("relu").register_forward_hook(lambda m, x, y: seen.append(y))
    s.on_minibatch_begin(0, 0, STEPS)
    values = torch.cat([y for y in seen if len(y) == BATCH]).flatten()
    q = s.methods[0].quantizers["inner"]
    want = values.quantile(0.999)
    torch.testing.assert_close(q.scale, want, rtol=2e-2, atol=0)
    torch.testing.assert_close(q.threshold, q.scale.expand(8) / 2)


def test_scales_thresholds_and_float_weights_are_trained():
    s = session()
    before = s.parameter("inner.weight").detach().clone()
    train(s, 0, 1)
    q = s.methods[0].quantizers["inner"]
    first = q.threshold.clone()
    train(s, 1, 2)
    assert not torch.equal(q.threshold, first)
    assert len(q.threshold.unique()) > 1
    assert not torch.equal(before, s.parameter("inner.weight"))


def test_weight_decay_ends_when_told():
    s = session(decay_until="1ep")
    train(s, 0, 1)
    assert s.optimizer.param_groups[0]["weight_decay"] == 1e-3
    train(s, 1, 2)
    assert s.optimizer.param_groups[0]["weight_decay"] == 0


@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_is_uninterrupted_in_every_stage(stop):
    options = {"activations_from": "0ep", "when": {"start": "1ep"}}
    _, result = finished(**options)
    s = session(**options)
    train(s, 0, stop)
    state = copy.deepcopy(s.state_dict())
    s = session(**options)
    s.load_state_dict(state)
    train(s, stop, 3)
    again = s.finish()
    assert again.plan == result.plan
    assert all(torch.equal(again.tensors[k], result.tensors[k]) for k in result.tensors)
    x = data(5)[0][0]
    assert torch.equal(again.model(x), result.model(x))


def test_thresholds_and_scales_follow_a_cut():
    s = session()
    train(s, 0, 1)
    b = s.methods[0]
    kept = [0, 2, 3, 4, 6]
    group = next(g for g in s.groups if any(m[0] == "inner.weight" and m[1] == 0 for m in g.layout))
    gone = [u for u in range(8) if u not in kept]
    level, state = b.quantizers["outer"].threshold, b.optimizer.state
    moments = state[b.learned["outer.input"].values["logit"]]["exp_avg"].clone()
    s.cut({group.id: gone}, by="test")
    assert torch.equal(b.quantizers["outer"].threshold, level[kept])
    after = b.optimizer.state[b.learned["outer.input"].values["logit"]]["exp_avg"]
    assert torch.equal(after, moments[kept])
    train(s, 1, 2)
    train(s, 2, 3)
    result = s.finish()
    assert result.tensors["outer.input.threshold"].shape == (5,)
    assert result.tensors["inner.weight.weight.scale"].shape == (5,)


def test_the_ledger_counts_operations_of_one_bit():
    _, result = finished()
    shares = result.ledger.shares()["macs"]["precision"]
    inner = 2 * 8 * 8 * 9 * 64
    assert shares["binary"] == pytest.approx(inner / (inner + 3 * 8 * 9 * 64 + 8 * 4))
    _, result = finished(activations=False)
    assert "binary" not in result.ledger.shares()["macs"]["precision"]
    assert result.ledger.shares()["parameters"]["precision"]["binary"] > 0.7


def test_what_reads_eight_bits_with_a_binary_weight_is_not_binary():
    qat = {"q": {"quantize": "qat", "weights": ["stem", "head"], **START}}
    _, result = finished(activations=False, more=qat)
    rows = {r.name: r for r in result.ledger if r.kind == "operator"}
    assert rows["inner"].precision == "int8"


def test_pruned_weights_are_told_not_to_stay_zero():
    zeros = {"p": {"prune": "oneshot", "weights": "inner", "sparsity": 0.5, "when": {"at": "0ep"}}}
    s, _ = finished(more=zeros)
    assert "zeros-lost" in dict(s.warnings)


# ------------------------------------------------------------------ deployed


@pytest.mark.parametrize("form", ["xnor", "dorefa"])
def test_stored_and_loaded_again_it_computes_the_same(tmp_path, form):
    _, result = finished(form=form)
    gracile.save_model(tmp_path, result)
    x = data(3)[0][0]
    loaded = load_model(tmp_path, x[:4], factory=lambda: SimpleNamespace(model=Tiny()))
    with torch.no_grad():
        assert torch.equal(loaded.model(x), result.model(x))
    w = loaded.model.get_parameter("inner.weight")
    assert len(w[0].abs().unique()) == 1


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("scale", ["filter", "input_channel", "tensor"])
def test_runtimes_compute_the_same(tmp_path, runtime, scale):
    _, result = finished(scale=scale, more={"q": {"quantize": "ptq", "weights": "head"}})
    x = data(3)[0][0]
    artifact = gracile.export(result, runtime, tmp_path / "m", example=x[:4])
    report = parity.check(result.model, load_artifact(artifact), x)
    assert report.ok, report.problems


def test_openvino_runs_one_bit_where_its_kernel_takes_it(tmp_path):
    x = data(3)[0][0]
    for width, one_bit in ((16, 2), (12, 0)):
        _, result = finished(Tiny(width))
        artifact = gracile.export(result, "openvino", tmp_path / str(width), example=x[:4])
        kernels = load_artifact(artifact).kernels()
        binary = [k for k in kernels if k.type.startswith("BinaryConvolution")]
        assert len(binary) == one_bit
        assert {k.unit for k in binary} <= {"relu_1", "outer"}
        assert [k.precision for k in binary] == ["binary"] * one_bit
        left = artifact.metadata.get("left_wider", {})
        assert len(left) == 2 - one_bit
        assert all("in eights, not 12" in why for why in left.values())


def test_onnx_runtime_has_no_such_kernel_and_says_so(tmp_path):
    _, result = finished()
    x = data(3)[0][0]
    artifact = gracile.export(result, "onnxruntime", tmp_path / "m", example=x[:4])
    assert set(artifact.metadata["left_wider"]) == {"inner.weight", "outer.weight"}


def test_a_configuration_of_nncf_end_to_end():
    algorithm = {
        "algorithm": "binarization",
        "ignored_scopes": ["Tiny/Conv2d[stem]"],
        "params": {
            "activations_quant_start_epoch": 0,
            "weights_quant_start_epoch": 1,
            "lr_poly_drop_start_epoch": 1,
            "lr_poly_drop_duration_epochs": 2,
            "disable_wd_start_epoch": 2,
        },
    }
    model = Tiny()
    text = json.dumps({"epochs": 3, "compression": algorithm})
    recipe, _ = convert(text, name="c.json", model_names=model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    s = session(model, methods=recipe["methods"], lr=recipe["train"]["lr"], optimizer=optimizer)
    train(s, 0, 3)
    assert optimizer.param_groups[0]["weight_decay"] == 0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (1 - 1 / 2))
    result = s.finish()
    assert {e.at for e in result.plan.of_kind("bits")} == {
        "inner.weight", "outer.weight", "inner", "outer",
    }  # fmt: skip
    assert isinstance(result.model.get_submodule("_quantizers.inner___input"), Binarizer)
