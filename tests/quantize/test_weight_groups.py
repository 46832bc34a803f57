"""A scale for each few inputs: numbers by hand, cuts, files, both runtimes, refusals."""

import pytest
import sharing_case as case
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import gracile
from gracile.analyze.layers import stored_bytes
from gracile.core.plan import Bits
from gracile.errors import BindError, RecipeError
from gracile.quantize.grid import WeightGrid, params_of
from gracile.quantize.groups import GroupedGrid, in_groups, kept_groups
from gracile.quantize.observers.min_max import MinMax
from gracile.quantize.placement import WeightSpec
from gracile.train.checkpoint import load_state, save_state
from gracile.train.finished import settled

GROUPS = "m: {quantize: ptq, bits: 4, activations: false, group_size: 4"


def grid(group=2, symmetric=True, bits=4):
    spec = WeightSpec("w", bits, True, symmetric, 0, symmetric, group)
    return GroupedGrid(spec, MinMax, params_of)


def tensors_of(result, address):
    return [result.tensors[f"{address}.weight.{part}"] for part in ("scale", "zero_point")]


# ------------------------------------------------------------------ by hand


def test_each_group_has_the_scale_of_its_largest_weight():
    weight = torch.tensor([[0.7, -0.12, 7.0, 2.6], [-0.07, 0.0, 14.0, -5.0]])
    made = grid()
    scale, zero_point = made.params(weight)
    torch.testing.assert_close(scale, torch.tensor([[0.1, 1.0], [0.01, 2.0]]))
    assert scale.shape == zero_point.shape == (2, 2)
    assert made.integers(weight).tolist() == [[7, -1, 7, 3], [-7, 0, 7, -2]]  # -2.5 is half to even
    want = torch.tensor([[0.7, -0.1, 7.0, 3.0], [-0.07, 0.0, 14.0, -4.0]])
    torch.testing.assert_close(made(weight), want)


def test_asymmetric_groups_have_zero_points_of_their_own():
    weight = torch.tensor([[0.0, 1.5, -3.0, 0.0]])
    scale, zero_point = grid(symmetric=False).params(weight)
    torch.testing.assert_close(scale, torch.tensor([[0.1, 0.2]]))
    assert zero_point.tolist() == [[-8, 7]]


def test_groups_of_a_convolution_run_over_the_places_of_the_kernel():
    weight = torch.arange(1.0, 9.0).reshape(1, 2, 2, 2)
    assert in_groups(weight, 4).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    torch.testing.assert_close(grid(4).params(weight)[0], torch.tensor([[4 / 7, 8 / 7]]))


def test_one_group_for_a_whole_output_is_one_scale_per_channel():
    weight = torch.randn(5, 3, 2, 2)
    whole = WeightGrid(WeightSpec("w", 4, True, True, 0, True), MinMax, params_of)
    assert torch.equal(grid(12)(weight), whole(weight))


@given(st.integers(0, 1000))
def test_finer_groups_never_round_further(seed):
    weight = torch.randn(4, 24, generator=torch.Generator().manual_seed(seed))
    step = [grid(size).params(weight)[0].repeat_interleave(size, 1) for size in (4, 12)]
    assert bool((step[0] <= step[1]).all())
    assert bool(((grid(4)(weight) - weight).abs() <= 0.5001 * step[0]).all())


def test_gradients_pass_straight_through():
    weight = torch.randn(2, 4, requires_grad=True)
    grid()(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones(2, 4))


@pytest.mark.parametrize(
    ("keep", "left"),
    [([0, 1, 4, 5], [0, 2]), ([0, 1, 2, 3, 4, 5], [0, 1, 2]), ([0, 1, 3], None), ([0, 2], None)],
)
def test_groups_are_left_whole_or_are_others(keep, left):
    found = kept_groups(keep, of=6, groups=3, size=2)
    assert (None if found is None else found.tolist()) == left


def test_groups_of_several_channels_or_within_one():
    assert kept_groups([1, 2], of=3, groups=6, size=3).tolist() == [2, 3, 4, 5]  # 6 places each
    assert kept_groups([0, 1], of=4, groups=2, size=8).tolist() == [0]  # 4 places each


# ------------------------------------------------------------------ in a session


def test_a_plan_names_groups_and_what_it_stores_makes_the_weights():
    s, result = case.trained(GROUPS + "}")
    edits = {e.at: e for e in result.plan.of_kind("bits")}
    assert {a: e.group for a, e in edits.items()} == {
        "first.weight": None,
        "second.weight": 4,
        "head.weight": 4,
    }
    why = next(w for a, _, _, _, w, _ in s.notes if a == "first.weight")
    assert why == "its 27 inputs are no whole groups of 4; a scale for each output channel"
    for address, shape in (("second.weight", (12, 18)), ("head.weight", (4, 3))):
        assert tensors_of(result, address)[0].shape == shape
        weight = result.model.get_parameter(address).detach()
        assert torch.equal(settled(weight, [edits[address]], result.tensors), weight)
        levels = weight.reshape(*shape, 4) / tensors_of(result, address)[0].unsqueeze(-1)
        torch.testing.assert_close(levels, levels.round())
        assert levels.abs().max().round() == 7
    rows = {r.name: r.precision for r in result.ledger.rows}
    assert rows["head.weight"] == "int4"
    assert rows["head"] == "float"


def test_size_counts_the_scales():
    _, result = case.trained(GROUPS + ", weights: head}")
    rest = sum(p.numel() for n, p in result.model.named_parameters() if n != "head.weight")
    assert stored_bytes(result.model, result.plan) == 4 * rest + 48 // 2 + 12 * 4


@pytest.mark.parametrize("method", ["ptq, when: {at: 1ep}", "qat, when: {start: 1ep}"])
def test_a_run_that_is_resumed_ends_the_same(method, tmp_path):
    entry = f"m: {{quantize: {method}, bits: 4, activations: false, group_size: 4}}"
    _, whole = case.trained(entry)
    first = case.session(entry)
    case.train(first, 0, 2)
    save_state(tmp_path / "s.safetensors", first.state_dict())
    second = case.session(entry)
    second.load_state_dict(load_state(tmp_path / "s.safetensors"))
    case.train(second, 2, 3)
    resumed = second.finish()
    assert resumed.plan == whole.plan
    values, same = ({**r.model.state_dict(), **r.tensors} for r in (resumed, whole))
    assert values.keys() == same.keys()
    assert all(torch.equal(values[k], same[k]) for k in same)


# ------------------------------------------------------------------ cuts


@pytest.mark.parametrize("when", ["{at: 1ep}", "{at: end}"])
def test_cuts_before_and_after(when):
    _, result = case.trained(GROUPS + f", weights: second, when: {when}}}", case.CUT)
    scale, _ = tensors_of(result, "second.weight")
    assert result.model.get_parameter("second.weight").shape == (6, 4, 3, 3)
    assert scale.shape == (6, 9)
    weight = result.model.get_parameter("second.weight").detach()
    levels = in_groups(weight, 4) / scale.reshape(-1, 1)
    torch.testing.assert_close(levels, levels.round())


def test_whole_groups_that_are_left_keep_their_scales():
    made = grid(4)
    weight = torch.randn(3, 4, 2, 2)
    made.fix(weight)
    before = made.scale
    made.keep_inputs((0, 3), of=4)
    assert torch.equal(made.scale, before[:, [0, 3]])
    assert torch.equal(made(weight[:, [0, 3]]), grid(4)(weight)[:, [0, 3]])


def test_groups_that_are_others_have_their_scales_found_anew():
    made = grid(4)
    made.fix(torch.randn(3, 8))
    made.keep_inputs((0, 2, 4, 6), of=8)
    assert made.scale is None
    weight = torch.randn(3, 4)
    torch.testing.assert_close(made.params(weight)[0], weight.abs().amax(1, keepdim=True) / 7)


def test_a_cut_that_tears_a_group_says_the_way_out():
    cut = "cut: {prune: structure, ratio: 0.25, scope: layer, when: {at: 2ep}}"
    groups = "m: {quantize: ptq, bits: 4, activations: false, group_size: 8, when: {at: 1ep}}"
    text = r"'m': 54 inputs of 'second.weight'.*no whole groups of 8.*multiple_of"
    with pytest.raises(BindError, match=text):
        case.trained(groups, cut)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("group_size: 32", "group_size is for weights alone.*activations: false"),
        ("group_size: 1, activations: false", "must be at least 2"),
        ("group_size: 32, activations: false, per_channel: false", "exclude each other"),
        (
            "group_size: 32, activations: false, precision: {bits: [4, 8], limit: {size: 0.7}}",
            "does not count the scales",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_the_recipe(options, text):
    with pytest.raises(RecipeError, match=text):
        case.session(f"m: {{quantize: ptq, {options}}}")


def test_a_size_that_fits_no_weight_is_refused():
    with pytest.raises(
        BindError, match=r"each 5 inputs: 'first.weight': its 27 inputs.*group_size"
    ):
        case.session("m: {quantize: ptq, activations: false, group_size: 5}")


def test_groups_are_of_weights():
    with pytest.raises(ValueError, match="'group' is for a weight"):
        Bits(at="x", role="output", bits=4, signed=True, symmetric=True, group=4, key="k")


# ------------------------------------------------------------------ files


class Mixed(nn.Module):
    """A convolution with a BatchNorm, one of several groups, a product of three dims, a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.parts = nn.Conv2d(16, 16, 3, groups=2, padding=1)
        self.rows = nn.Linear(16, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(self.parts(x)).flatten(2).transpose(1, 2)
        return self.head(F.relu(self.rows(x)).mean(1))


def mixed():
    torch.manual_seed(0)
    model = Mixed()
    model.bn.weight.data.normal_()  # of both signs
    model.bn.running_mean.normal_()
    return model.eval()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_both_runtimes_compute_it(runtime, bits, symmetric, tmp_path):
    pytest.importorskip("onnx" if runtime == "onnxruntime" else runtime)
    recipe = gracile.Recipe.build(
        methods={
            "m": {
                "quantize": "ptq",
                "bits": bits,
                "activations": False,
                "group_size": 8,
                "weight_symmetric": symmetric,
            }
        },
        train={"epochs": 0},
    )
    x = torch.randn(4, 8, 6, 6)
    result = gracile.compress(mixed(), recipe, example=x)
    assert all(e.group == 8 for e in result.plan.of_kind("bits"))
    artifact = gracile.export(result, runtime, path=tmp_path, example=x)  # refuses what differs
    assert artifact.precision == "mixed"
    if runtime == "onnxruntime":
        _look_into(artifact.path, x, result, bits)


def _look_into(path, x, result, bits):
    import onnx
    import onnxruntime

    graph = onnx.load(path).graph
    kind = onnx.TensorProto.INT4 if bits == 4 else onnx.TensorProto.INT8
    stored = {t.name: t for t in graph.initializer}
    for address in ("conv.weight", "parts.weight", "rows.weight", "head.weight"):
        assert stored[address].data_type == kind
    assert list(stored["parts.weight.scale"].dims) == [16, 9]
    options = onnxruntime.SessionOptions()  # as anyone opens it, with no setting of ours
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), result.model(x), rtol=1e-4, atol=1e-6)


def test_beside_quantized_activations_such_a_layer_is_float(tmp_path):
    methods = {
        "w": {"quantize": "ptq", "bits": 4, "activations": False, "group_size": 8,
              "weights": ["rows", "head"]},
        "a": {"quantize": "ptq", "weights": ["conv", "parts"]},
    }  # fmt: skip
    x = torch.randn(4, 8, 6, 6)
    recipe = gracile.Recipe.build(methods=methods, train={"epochs": 0})
    data = [(x, torch.zeros(4, dtype=torch.long))]
    result = gracile.compress(mixed(), recipe, example=x, calibration=data)
    artifact = gracile.export(result, "onnxruntime", path=tmp_path, example=x)
    assert artifact.precision == "mixed"
