"""Attention and recurrent layers in integers: taken apart, quantized, exported, told truly."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.core.plan import Architecture
from gracile.errors import PlanConflict
from gracile.export.onnx import export_onnx
from gracile.export.openvino import export_openvino
from gracile.graph.capture import capture
from gracile.models.word_lstm import word_lstm
from gracile.quantize.restore import simulate
from gracile.recipe.load import loads
from gracile.train.checkpoint import load_model, save_model
from gracile.train.session import Session

WORDS, STEPS = 20, 5
ARCH = Architecture(
    name="word_lstm",
    args={"num_classes": WORDS, "embedding": 8, "hidden": 8, "dropout": 0.1, "tied": False},
)


class Vision(nn.Module):
    """A small vision transformer of torch's own layers: 3 x 8 x 8 -> 4."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.block(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


def vision():
    torch.manual_seed(0)
    return Vision().eval()


def images(n, seed=1):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def words():
    torch.manual_seed(0)
    model = word_lstm(**ARCH.args)
    with torch.no_grad():
        model.encoder.weight.mul_(10)
    return model.eval()


def text(n, seed=1):
    return torch.randint(WORDS, (n, STEPS), generator=torch.Generator().manual_seed(seed))


class Series(nn.Module):
    """A recurrent layer of torch over a series, or its cell step by step; the mean decides."""

    def __init__(self, kind):
        super().__init__()
        self.cell = kind.endswith("Cell")
        self.layer = getattr(nn, kind)(4, 8, **({} if self.cell else {"batch_first": True}))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        if not self.cell:
            return self.head(self.layer(x)[0].mean(1))
        state, seen = None, []
        for step in x.unbind(1):
            state = self.layer(step, state)
            seen.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(seen, 1).mean(1))


def series(n, seed=1):
    return torch.randn(n, STEPS, 4, generator=torch.Generator().manual_seed(seed))


def session(model, x, method, **options):
    recipe = loads(f"recipe: 1\nseed: 1\nmethods:\n  {method}\n")
    options = {"epochs": 0, **options}
    return Session(model, recipe, example=x, calibration=[x], **options)


PTQ = "q: {quantize: ptq, decompose: DEC, when: {at: end}}"


def ptq(model, x, decompose="auto", **options):
    return session(model, x, PTQ.replace("DEC", decompose), **options).finish()


def ran(runtime, result, batch, folder):
    """What a runtime computes of a batch."""
    export = {"onnxruntime": export_onnx, "openvino": export_openvino}[runtime]
    artifact = export(result.model, result.plan, result.tensors, batch, folder / "ran", {})
    assert artifact.precision == ("mixed" if capture(result.model, batch).of_op("lstm") else "int8")
    if runtime == "onnxruntime":
        import onnxruntime

        run = onnxruntime.InferenceSession(artifact.path)
        return torch.from_numpy(run.run(None, {run.get_inputs()[0].name: batch.numpy()})[0])
    import openvino

    found = openvino.Core().compile_model(artifact.path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(found(batch.numpy())[0])


def bits(result, role):
    return {e.at for e in result.plan.of_kind("bits") if e.role == role}


def test_attention_is_taken_apart_by_itself_and_its_weight_gets_a_scale_per_channel():
    result = ptq(vision(), images(8))
    assert [e.at for e in result.plan.of_kind("decompose")] == ["block.self_attn"]
    assert {"block.self_attn.in_proj_weight", "block.self_attn.out_proj.weight"} < bits(
        result, "weight"
    )
    assert result.tensors["block.self_attn.in_proj_weight.weight.scale"].shape == (24,)
    assert "block.self_attn.linear" in bits(result, "output")


def test_recurrent_layers_are_taken_apart_when_asked():
    whole = ptq(words(), text(8))
    assert not whole.plan.of_kind("decompose")
    told = {r.name: r for r in whole.ledger}
    assert "decompose: true" in told["rnn"].why
    assert "decompose: true" in told["rnn.weight_hh_l0"].why

    apart = ptq(words(), text(8), "true")
    (edit,) = apart.plan.of_kind("decompose")
    assert (edit.at, edit.steps, edit.by) == ("rnn", STEPS, "q")
    assert {f"rnn.weight_{k}_l{n}" for k in ("ih", "hh") for n in (0, 1)} < bits(apart, "weight")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("decompose: false", []),
        ('decompose: "rnn.*"', ["rnn"]),
        ("decompose: true, weights: decoder.weight", []),
        ('decompose: true, weights: "re:rnn.weight_.*"', ["rnn"]),
    ],
)
def test_which(options, expected):
    method = f"q: {{quantize: ptq, {options}, when: {{at: end}}}}"
    plan = session(words(), text(8), method).finish().plan
    assert [e.at for e in plan.of_kind("decompose")] == expected


def test_all_steps_share_one_scale_at_each_place():
    result = ptq(words(), text(8), "true")
    states = [f"rnn.l0.{t}.state" for t in range(1, STEPS)]
    assert set(states) < bits(result, "output")
    scales = [result.tensors[f"{s}.output.scale"] for s in states]
    assert all(torch.equal(s, scales[0]) for s in scales)
    low = min(result.ranges[s].low for s in states)
    high = max(result.ranges[s].high for s in states)
    torch.testing.assert_close(float(scales[0]), (high - low) / 255, rtol=1e-5, atol=0)
    other = result.tensors["rnn.l1.1.state.output.scale"]
    assert not torch.equal(scales[0], other)


def test_the_rest_of_a_step_stays_in_float():
    result = ptq(words(), text(8), "true")
    inside = {id.rpartition(".")[2] for id in bits(result, "output") if id.startswith("rnn.")}
    assert inside == {"state", "output"}


@pytest.mark.parametrize(("make", "x"), [(vision, images), (words, text)])
def test_close_to_the_float_network(make, x):
    model, batch = make(), x(16)
    expected = copy.deepcopy(model)(x(8, seed=2))
    got = ptq(model, batch, "true").model(x(8, seed=2))
    assert F.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.999


def test_the_ledger_adds_up_and_says_what_runs_in_integers():
    result = ptq(words(), text(8), "true")
    rows = {r.name: r for r in result.ledger}
    assert rows["rnn.weight_hh_l0"].structure == "kept"
    assert rows["rnn.weight_hh_l0"].precision.startswith("int")
    step = rows["rnn.l0.2.fed_back"]
    assert step.structure == "replaced"
    assert step.precision.startswith("int")
    assert rows["rnn.l0.2.cell"].precision == "float"
    shares = result.ledger.shares()["macs"]["structure"]
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "x", "decompose"), [(vision, images, "auto"), (words, text, "true")]
)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_compute_the_same(make, x, decompose, runtime, tmp_path):
    pytest.importorskip(runtime)
    batch = x(8)
    result = ptq(make(), batch, decompose, profile=runtime)
    expected = result.model(batch).detach()
    got = ran(runtime, result, batch, tmp_path)
    # a step of rounding early in a series, or in front of attention, spreads
    torch.testing.assert_close(got, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_compute_every_kind_of_recurrence(kind, runtime, tmp_path):
    torch.manual_seed(0)
    result = ptq(Series(kind).eval(), series(16), "true", profile=runtime)
    assert [e.at for e in result.plan.of_kind("decompose")] == ["layer"]
    weights = [f"layer.weight_{k}" + ("" if kind.endswith("Cell") else "_l0") for k in ("ih", "hh")]
    assert {*weights, "head.weight"} <= bits(result, "weight")
    batch = series(8, seed=2)
    expected = result.model(batch).detach()
    got = ran(runtime, result, batch, tmp_path)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


def test_a_whole_recurrent_layer_makes_the_artifact_mixed(tmp_path):
    result = ptq(words(), text(8))
    artifact = export_onnx(result.model, result.plan, result.tensors, text(8), tmp_path / "m", {})
    assert artifact.precision == "mixed"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, "decompose: false"),
        (False, 'weights: ["encoder.weight", "decoder.weight"]'),
        (False, 'weights: ["encoder.weight", "decoder.weight"], per_channel: false'),
        (False, 'weights: ["encoder.weight", "decoder.weight"], weight_symmetric: false, '
         "per_channel: false"),
    ],
)  # fmt: skip
def test_an_embedding_is_a_table_of_integers(tied, options, runtime, tmp_path):
    pytest.importorskip(runtime)
    torch.manual_seed(0)
    model = word_lstm(num_classes=50, embedding=8, hidden=8, layers=1, tied=tied).eval()
    x = torch.randint(50, (4, STEPS))
    method = f"q: {{quantize: ptq, {options}, when: {{at: end}}}}"
    result = session(model, x, method, profile=runtime).finish()
    table = "encoder.weight" if not tied else next(iter(bits(result, "weight")))
    scale = result.tensors[f"{table}.weight.scale"]
    assert scale.numel() == (1 if "per_channel" in options else 50)
    path = export_onnx(result.model, result.plan, result.tensors, x, tmp_path / "m", {}).path
    import onnx

    stored = {t.name: t.data_type for t in onnx.load(path).graph.initializer if 400 in [
        int(torch.tensor(t.dims).prod())]}  # fmt: skip
    assert len(stored) == 2
    assert set(stored.values()) <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    got = ran(runtime, result, x, tmp_path)
    torch.testing.assert_close(got, result.model(x).detach(), rtol=0, atol=2e-3)


def test_saved_and_loaded(tmp_path):
    result = ptq(words(), text(8), "true", architecture=ARCH)
    save_model(tmp_path, result)
    found = load_model(tmp_path, text(8))
    torch.testing.assert_close(found.model(text(4)), result.model(text(4)))


def test_plain_weights_and_the_plan_make_it_again():
    from gracile.graph import surgery
    from gracile.graph.additions import structural

    result = ptq(vision(), images(8))
    plain = surgery.apply(vision(), structural(result.plan), example=images(8))
    plain.load_state_dict({n: result.model.state_dict()[n] for n in plain.state_dict()})
    again = simulate(plain, result.plan, result.tensors, images(8)).eval()
    torch.testing.assert_close(again(images(4)), result.model(images(4)))


QAT = "q: {quantize: qat, decompose: true, when: {start: 1ep}}"


def trained(epochs, state=None, store=None):
    """A word LSTM in training; (losses, session) after so many epochs from an optional state."""
    model = words().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    s = session(model, text(8), QAT, optimizer=optimizer, steps_per_epoch=4, epochs=4)
    first = 0
    if state is not None:
        s.load_state_dict(copy.deepcopy(state))
        first = 2
    losses = []
    for epoch in range(first, epochs):
        s.on_epoch_begin(epoch)
        for b in range(4):
            s.on_minibatch_begin(epoch, b, 4)
            torch.manual_seed(100 * epoch + b)
            x = text(8, seed=3)
            out = s.model(x[:, :])
            loss = F.cross_entropy(out[:, :-1].flatten(0, 1), x[:, 1:].flatten())
            loss = s.before_backward_pass(epoch, b, 4, loss)
            optimizer.zero_grad()
            loss.backward()
            s.before_parameter_optimization(epoch, b, 4)
            optimizer.step()
            s.on_minibatch_end(epoch, b, 4)
            losses.append(float(loss.detach()))
        s.on_epoch_end(epoch)
    return losses, s


def test_qat_trains_a_layer_that_is_apart_and_goes_on_where_it_stopped():
    losses, s = trained(4)
    assert losses[-1] < losses[0] - 0.1
    _, half = trained(2)
    assert half.plan.of_kind("decompose")
    rest, resumed = trained(4, state=half.state_dict())
    assert rest == losses[8:]
    whole, again = s.finish(), resumed.finish()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_units_that_were_cut_before_stay_cut():
    recipe = """
  few: {prune: structure, ratio: 0.4, when: {at: end}}
  q: {quantize: ptq, decompose: true, when: {at: end}}"""
    result = session(words(), text(8), recipe.strip()).finish()
    assert result.model.get_parameter("rnn.weight_hh_l0").shape[1] < 8
    assert result.plan.edits[-1].kind == "bits"
    assert result.plan.of_kind("decompose")
    assert result.model(text(3)).shape == (3, STEPS, WORDS)


def test_two_entries_conflict_inside_a_layer():
    both = PTQ.replace("DEC", "true")
    with pytest.raises(PlanConflict):
        session(words(), text(8), both + "\n  " + both.replace("q:", "p:", 1))


def scale(result, at):
    return result.tensors[f"{at}.output.scale"]


def test_gates_and_cell_states_are_quantized_one_by_one_where_the_profile_says_so(tmp_path):
    x = text(6)
    r = session(
        words(),
        x,
        "q: {quantize: ptq, decompose: true, profile: integer, when: {at: end}, "
        "overrides: [{activations: 'rnn.l0.*.cell', bits: 16}]}",
    ).finish()
    bits = {e.at: e.bits for e in r.plan.of_kind("bits") if e.role == "output"}
    first = ("input_gate", "candidate", "output_gate", "shown", "hidden")
    assert all(f"rnn.l0.0.{part}" in bits for part in first)
    later = (*first, "gates", "fed_back", "forget_gate", "kept", "new", "cell")
    for part in later:
        assert bits[f"rnn.l0.3.{part}"] == (16 if part == "cell" else 8)
        assert torch.equal(scale(r, f"rnn.l0.3.{part}"), scale(r, f"rnn.l0.2.{part}"))
    assert not torch.equal(scale(r, "rnn.l0.3.cell"), scale(r, "rnn.l0.3.hidden"))
    for runtime in ("onnxruntime", "openvino"):
        got = ran(runtime, r, x, tmp_path)
        torch.testing.assert_close(got, r.model.eval()(x), rtol=0, atol=0.05)
