"""Dynamic quantization: ONNX's formula, what stands where, state, surgery, refusals."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gracile.core.plan import Bits, Plan
from gracile.errors import BindError, PlanConflict, RecipeError
from gracile.nn.quantized import ActivationQuantizer
from gracile.nn.rounding import dynamic_grid
from gracile.quantize import engine
from gracile.quantize.profile import dynamic_warning
from gracile.quantize.restore import simulate
from gracile.recipe.load import loads
from gracile.train.session import Session

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _full_range(monkeypatch):
    monkeypatch.setattr(engine, "sums_saturate", lambda: False)


class Mlp(nn.Module):
    """Linear and BatchNorm, a residual branch, a head: what one layer reads others read as well."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(16, 12), nn.BatchNorm1d(12)
        self.branch, self.head = nn.Linear(12, 12), nn.Linear(12, 5, bias=False)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.head(x + self.branch(x))


class Convs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def session(methods="q: {quantize: dynamic}", model=None, example=X, **options):
    torch.manual_seed(0)
    model = model or Mlp()
    recipe = loads(f"recipe: 1\ntrain: {{epochs: 2}}\nmethods:\n  {methods}\n", name="r.yaml")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"steps_per_epoch": 2, **options}
    return Session(model.eval(), recipe, optimizer, example=example, **options)


def grid(*values):
    scale, zero_point = dynamic_grid(torch.tensor(values))
    return scale.item(), zero_point.item()


# --- reference


def test_the_grid_by_hand():
    assert grid(-1.0, 0.3, 4.1) == (pytest.approx(0.02), 50)
    assert grid(1.0, 5.1) == (pytest.approx(0.02), 0)  # the range is widened to 0
    assert grid(-5.1, -1.0) == (pytest.approx(0.02), 255)
    assert grid(0.0, 0.0) == (1.0, 0)


def test_a_linear_layer_in_integers_by_hand():
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.27, -0.64]]))
        layer.bias.fill_(0.5)
    x = torch.tensor([[-1.0, 4.1], [0.29, 0.0]])  # scale 0.02, zero point 50
    s = session(model=nn.Sequential(layer), example=x)
    model = s.finish().model
    want = torch.tensor([[0.0, 255.0], [64.0, 50.0]]) - 50  # 0.29 / 0.02 = 14.5, half to even
    q = torch.tensor([[127.0, -64.0]])
    torch.testing.assert_close(model(x), want @ q.T * 0.02 * 0.01 + 0.5)


@given(st.integers(0, 1000), st.floats(-3, 3), st.floats(0.01, 10))
def test_the_formula_is_that_of_the_operator(seed, shift, size):
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"])
    x = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * size + shift
    q, scale, zero = ReferenceEvaluator(node).run(None, {"x": x.numpy()})
    got_scale, got_zero = dynamic_grid(x)
    np.testing.assert_allclose(got_scale.numpy(), scale, rtol=1e-6)
    assert got_zero.item() == int(zero)
    module = ActivationQuantizer(8, dynamic=True)
    module.mode = "quantize"
    levels = (module(x) / got_scale).round() + got_zero
    assert np.abs(levels.numpy() - q).max() <= 1  # its scale may be one float off
    assert (levels.numpy() != q).mean() < 0.1


def test_gradients_pass_straight_through():
    module = ActivationQuantizer(8, dynamic=True)
    module.mode = "quantize"
    x = torch.tensor([-1.0, 0.3, 4.1], requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3))


# --- what it does to a model


def test_only_the_layer_reads_rounded_values():
    torch.manual_seed(0)
    plain = Mlp().eval()
    s = session(model=copy.deepcopy(plain))
    result = s.finish()
    seen = {}
    result.model.branch.register_forward_hook(lambda m, i, o: seen.update(read=i[0]))
    result.model(X)
    x = torch.relu(plain.norm(result.model.first(_rounded(X))))
    torch.testing.assert_close(seen["read"], _rounded(x))
    both = x + result.model.branch(_rounded(x))  # the residual is not rounded
    torch.testing.assert_close(result.model(X), result.model.head(_rounded(both)))


def _rounded(x):
    q = ActivationQuantizer(8, dynamic=True)
    q.mode = "quantize"
    return q(x)


def test_needs_no_data_and_says_what_it_did():
    result = session().finish()
    bits = result.plan.of_kind("bits")
    assert [e.at for e in bits if e.role == "weight"] == [
        "first.weight", "branch.weight", "head.weight"
    ]  # fmt: skip
    assert [(e.at, e.dynamic) for e in bits if e.role == "input"] == [
        ("first", True), ("branch", True), ("head", True)
    ]  # fmt: skip
    assert not [k for k in result.tensors if ".input." in k]
    rows = {r.name: r for r in result.ledger}
    assert rows["branch"].precision == "int8 dynamic"
    assert rows["branch.weight"].precision == "int8"
    assert rows["add"].precision == "float"


def test_a_plan_from_a_file_computes_the_same(tmp_path):
    result = session().finish()
    result.plan.save(tmp_path / "plan.json")
    plain = Mlp().eval()
    plain.load_state_dict(
        {k: v for k, v in result.model.state_dict().items() if "_quantizers" not in k}
    )
    again = simulate(plain, Plan.load(tmp_path / "plan.json"), result.tensors, X)
    assert torch.equal(again(X), result.model(X))


def test_resumed_is_uninterrupted():
    def begun():
        s = session("q: {quantize: dynamic, when: {at: 0ep}}")
        s.on_epoch_begin(0)
        s.on_minibatch_begin(0, 0, 2)
        return s

    one = begun()
    two = session("q: {quantize: dynamic, when: {at: 0ep}}")
    two.load_state_dict(one.state_dict())
    two.model.eval(), one.model.eval()
    assert torch.equal(one.model(X), two.model(X))
    assert not torch.equal(two.model(X), session().model.eval()(X))


def test_channels_cut_under_it_leave_the_layers_dynamic():
    s = session("q: {quantize: dynamic, when: {at: 0ep}}")
    s.on_epoch_begin(0)
    s.on_minibatch_begin(0, 0, 2)
    group = next(g for g in s.groups if not g.protected)
    s.cut({group.id: {0, 3}}, by="q")
    assert s.model.first.weight.shape == (10, 16)
    result = s.finish()
    assert len(result.plan.of_kind("bits")) == 6
    scale = result.tensors["first.weight.weight.scale"]
    assert scale.shape == (10,)
    level = result.model.first.weight / scale[:, None]
    torch.testing.assert_close(level, level.round(), atol=1e-3, rtol=0)


def test_operators_taken_back_to_float_read_floats():
    s = session()
    method = s.methods[0]
    method.on_fire(s, 1.0)
    method.revert(s, {"branch": "it is sensitive"})
    assert sorted(method.quantizers) == ["first", "head"]
    edits = method.edits(s)
    assert [e.at for e in edits if e.role == "input"] == ["first", "head"]
    seen = {}
    s.model.branch.register_forward_hook(lambda m, i, o: seen.update(read=i[0]))
    s.model.eval()(X)
    assert not torch.equal(seen["read"], _rounded(seen["read"]))
    assert method.quantizers["head"].mode == "quantize"


def test_layers_left_out_stay_float():
    s = session('q: {quantize: dynamic, overrides: [{weights: "head.*", bits: float}]}')
    assert [e.at for e in s.finish().plan.of_kind("bits") if e.dynamic] == ["first", "branch"]


# --- refusals


def test_convolutions_stay_float_and_the_ledger_says_why():
    model, x = Convs().eval(), torch.randn(2, 3, 8, 8)
    result = session(model=model, example=x).finish()
    assert [e.at for e in result.plan.of_kind("bits")] == ["head.weight", "head"]
    row = next(r for r in result.ledger if r.name == "conv")
    assert (row.precision, row.reason) == ("float", "unsupported")
    assert "ConvInteger" in row.why
    with pytest.raises(BindError, match="ConvInteger"):
        session('q: {quantize: dynamic, weights: "type:Conv2d"}', Convs().eval(), x)


def test_openvino_alone_is_refused_and_beside_another_warned_of():
    with pytest.raises(BindError, match=r"profile 'openvino'.*float.*quantize: ptq"):
        session(profile="openvino")
    plan = session().finish().plan
    assert "not faster" in dynamic_warning(plan, "openvino")
    assert dynamic_warning(plan, "onnxruntime") is None


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("activations: false", "quantize: ptq"),
        ("bits: 4", "weight_bits"),
        ("weight_bits: 12", "8"),
        ("symmetric: true", "symmetric does not count"),
        ("edges_bits: 8", "edges_bits does not count"),
        ("overrides: [{weights: head, bits: 4}]", "weight_bits of at most 8"),
        ("when: {start: 0ep, stop: 2ep}", "acts once"),
    ],
)
def test_what_does_not_count_is_refused(option, text):
    with pytest.raises(RecipeError, match=text):
        session(f"q: {{quantize: dynamic, {option}}}")


def test_two_quantizers_of_one_weight_are_refused():
    with pytest.raises(PlanConflict, match=r"first\.weight"):
        session("a: {quantize: dynamic}\n  b: {quantize: ptq, activations: false}")


def test_an_edit_of_another_role_cannot_be_dynamic():
    with pytest.raises(ValueError, match="unsigned input"):
        Bits(at="x", role="output", bits=8, signed=False, symmetric=False, dynamic=True, key="x")
    with pytest.raises(ValueError, match="unsigned with a zero point"):
        ActivationQuantizer(8, signed=True, dynamic=True)
