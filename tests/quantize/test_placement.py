"""Where quantizers go, on graphs written out by hand."""

import pytest

from gracile.errors import BindError, UserError
from gracile.graph.graph import Graph, Node
from gracile.quantize import profile as profile_file
from gracile.quantize.placement import Placement, place
from gracile.quantize.profile import Grid, Profile, load_profile

PROFILE = Profile(
    name="test",
    activations=Grid(signed=False, symmetric=False),
    weights=Grid(signed=True, symmetric=True, axis=0, narrow=True),
    quantize_inputs=True,
    quantize_outputs=False,
    ops_integer=("conv", "linear", "add", "avg_pool", "adaptive_avg_pool", "mean", "mul"),
    ops_same_scale=(
        "max_pool", "flatten", "reshape", "permute", "getitem", "pad", "cat", "chunk",
    ),
)  # fmt: skip


def graph(*lines, how="fx", **more):
    """Each line is "id: op input input ..."; conv and linear read `<id>.weight`."""
    nodes = {}
    for line in lines:
        id, rest = line.split(":")
        op, *inputs = rest.split()
        params = {}
        if op in ("conv", "linear", "conv_transpose", "batch_norm"):
            params = {"weight": f"{id}.weight"}
        shape = None if op in ("output", "chunk") else (2, 4, 8, 8)
        nodes[id] = Node(id, op, tuple(inputs), id if params else None, params, {}, shape)
    for id, attrs in more.items():
        nodes[id].attrs.update(attrs)
    return Graph(nodes, how, None if how == "fx" else "the forward branches on data.")


def place_all(g, profile=PROFILE, **options):
    weights = [n.params["weight"] for n in g.of_op("conv", "linear", "conv_transpose")]
    return place(g, profile, weights=weights, **options)


def where(p):
    return [a.id for a in p.activations]


def spec(p, id):
    return next(a for a in p.activations if a.id == id)


RESIDUAL = graph(
    "x: input",
    "conv1: conv x",
    "bn1: batch_norm conv1",
    "relu1: relu bn1",
    "conv2: conv relu1",
    "bn2: batch_norm conv2",
    "add: add bn2 relu1",
    "relu2: relu add",
    "pool: adaptive_avg_pool relu2",
    "flatten: flatten pool",
    "fc: linear flatten",
    "output: output fc",
)


def test_a_residual_block_gets_one_quantizer_per_fused_pattern():
    p = place_all(RESIDUAL)
    assert where(p) == ["x", "relu1", "bn2", "relu2", "pool", "flatten"]
    assert p.skipped == ()
    assert [w.address for w in p.weights] == ["conv1.weight", "conv2.weight", "fc.weight"]
    assert {(w.bits, w.signed, w.symmetric, w.axis, w.narrow) for w in p.weights} == {
        (8, True, True, 0, True)
    }


def test_where_sums_are_added_before_rounding_one_operand_has_no_quantizer():
    summing = PROFILE.model_copy(update={"sums_in_accumulator": True})
    assert where(place_all(RESIDUAL, summing)) == ["x", "relu1", "relu2", "pool", "flatten"]
    both = graph(
        "x: input", "a: conv x", "b: conv x", "add: add a b", "c: conv add", "output: output c"
    )
    assert where(place_all(both, summing)) == ["x", "b", "add"]  # one convolution takes the other's
    assert where(place_all(both)) == ["x", "a", "b", "add"]


@pytest.mark.parametrize(
    "lines",
    [
        (
            "a: conv x",
            "r: relu a",
            "add: add r x",
            "c: conv add",
            "output: output c",
        ),  # rounded at relu
        (
            "a: conv x",
            "add: add a x",
            "c: conv add",
            "d: conv a",
            "output: output c d",
        ),  # read twice
        ("f: flatten x", "a: linear f", "add: add a f", "c: linear add", "output: output c"),
    ],
)
def test_any_other_operand_of_an_addition_keeps_its_quantizer(lines):
    g = graph("x: input", *lines)
    summing = PROFILE.model_copy(update={"sums_in_accumulator": True})
    assert where(place_all(g, summing)) == where(place_all(g))


def test_values_that_cannot_be_negative_get_zero_point_zero():
    p = place_all(RESIDUAL)
    assert [a.nonnegative for a in p.activations] == [False, True, False, True, True, True]
    assert all(not a.signed for a in p.activations)  # the profile's unsigned grid
    assert [a.symmetric for a in p.activations] == [False, True, False, True, True, True]
    assert [a.role for a in p.activations] == ["input"] + 5 * ["output"]


def test_operators_that_move_values_share_their_inputs_scale():
    p = place_all(RESIDUAL)
    assert spec(p, "flatten").shares_scale_with == "pool"
    assert not spec(p, "flatten").observed
    assert spec(p, "pool").shares_scale_with is None
    assert spec(p, "pool").observed


def test_the_output_is_quantized_if_the_profile_says_so():
    p = place_all(RESIDUAL, PROFILE.model_copy(update={"quantize_outputs": True}))
    assert where(p)[-1] == "fc"
    moved = graph("x: input", "fc: linear x", "out: reshape fc", "output: output out")
    assert where(place_all(moved)) == ["x"]


def test_concatenated_tensors_share_one_scale():
    g = graph(
        "x: input",
        "a: conv x",
        "ra: relu a",
        "b: conv x",
        "cat: cat ra b",
        "c: conv cat",
        "output: output c",
    )
    p = place_all(g)
    assert where(p) == ["x", "ra", "b", "cat"]
    assert [spec(p, id).shares_scale_with for id in ("ra", "b", "cat")] == [None, "ra", "ra"]
    assert [spec(p, id).observed for id in ("ra", "b", "cat")] == [True, True, False]
    assert not any(spec(p, id).nonnegative for id in ("ra", "b", "cat"))  # b may be negative


def test_a_tuple_of_chunks_passes_the_scale_on():
    g = graph(
        "x: input",
        "a: conv x",
        "ra: relu a",
        "parts: chunk ra",
        "one: getitem parts",
        "two: getitem parts",
        "b: conv two",
        "cat: cat one b",
        "c: conv cat",
        "output: output c",
    )
    p = place_all(g)
    assert where(p) == ["x", "ra", "one", "two", "b", "cat"]
    assert {a.shares_scale_with for a in p.activations} == {None, "ra"}
    assert spec(p, "one").shares_scale_with == "ra"


def test_dropout_and_identity_are_looked_through():
    g = graph(
        "x: input",
        "a: conv x",
        "i: identity a",
        "r: relu i",
        "d: dropout r",
        "b: linear d",
        "output: output b",
    )
    assert where(place_all(g)) == ["x", "r"]


def test_a_value_read_twice_ends_its_pattern():
    g = graph(
        "x: input",
        "a: conv x",
        "r: relu a",
        "b: conv r",
        "add: add b a",
        "c: conv add",
        "output: output c",
    )
    p = place_all(g)
    assert where(p) == ["x", "a", "r", "b", "add"]
    assert p.skipped == (("r", "profile 'test' has no integer kernel for 'relu'", "unsupported"),)


def test_float_operators_are_listed_and_their_integer_readers_still_fed():
    g = graph(
        "x: input",
        "a: conv x",
        "g: gelu a",
        "m: max_pool g",
        "b: conv m",
        "s: softmax b",
        "output: output s",
    )
    p = place_all(g)
    assert where(p) == ["x", "a", "g", "m", "b"]
    assert [s.name for s in p.skipped] == ["g", "s"]


def test_a_layer_that_is_not_selected_stays_in_float_with_its_batch_norm():
    p = place(RESIDUAL, PROFILE, weights=["conv2.weight", "fc.weight"])
    assert where(p) == ["relu1", "bn2", "relu2", "pool", "flatten"]  # conv2 still reads integers
    assert p.skipped == (("conv1", "its weight 'conv1.weight' is not selected", "not_asked"),)


def test_a_constant_operand_keeps_the_operator_in_float():
    g = graph("x: input", "a: conv x", "m: mul a", "b: conv m", "output: output b")
    assert ("m", "one operand is a constant", "unsupported") in place_all(g).skipped


def test_padding_with_a_number_other_than_zero_is_not_a_mere_move():
    lines = ("x: input", "a: conv x", "r: relu a", "p: pad r", "b: conv p", "output: output b")
    zero, one = graph(*lines, p={"value": 0}), graph(*lines, p={"value": 1.0})
    assert spec(place_all(zero), "p").shares_scale_with == "r"
    assert spec(place_all(one), "p").shares_scale_with is None
    assert spec(place_all(one), "p").observed
    assert spec(place_all(one), "p").nonnegative
    assert not spec(place_all(graph(*lines, p={"value": -1.0})), "p").nonnegative


def test_quantizers_already_in_the_graph_are_looked_through():
    g = graph(
        "x: input",
        "x.quantize: quantize x",
        "a: conv x.quantize",
        "a.quantize: quantize a",
        "r: relu a.quantize",
        "b: conv r",
        "output: output b",
    )
    assert where(place_all(g)) == ["x", "r"]


@pytest.mark.parametrize(
    ("signed", "symmetric", "expected"),
    [
        (False, False, {"bn2": (False, False), "relu1": (False, True)}),  # u8 with, without offset
        (True, False, {"bn2": (True, False), "relu1": (True, False)}),  # s8 everywhere
        (True, True, {"bn2": (True, True), "relu1": (False, True)}),  # s8 and u8, no offsets
    ],
)
def test_signs_follow_profile_and_value(signed, symmetric, expected):
    profile = PROFILE.model_copy(update={"activations": Grid(signed=signed, symmetric=symmetric)})
    p = place_all(RESIDUAL, profile)
    for id, (is_signed, is_symmetric) in expected.items():
        assert (spec(p, id).signed, spec(p, id).symmetric) == (is_signed, is_symmetric)


def test_options_override_the_profile():
    p = place_all(
        RESIDUAL, bits=6, weight_bits=4, symmetric=True, weight_symmetric=False, per_channel=False
    )
    assert {(w.bits, w.symmetric, w.axis, w.narrow) for w in p.weights} == {(4, False, None, False)}
    assert {a.bits for a in p.activations} == {6}
    assert spec(p, "bn2").signed
    assert all(a.symmetric for a in p.activations)


def test_transposed_convolutions_have_their_output_channels_on_axis_1():
    profile = PROFILE.model_copy(update={"ops_integer": ("conv_transpose",)})
    lines = ("x: input", "a: conv_transpose x", "output: output a")
    assert place_all(graph(*lines), profile).weights[0].axis == 1
    assert place_all(graph(*lines, a={"groups": 2}), profile).weights[0].axis is None


def test_placement_survives_json():
    p = place_all(RESIDUAL)
    assert Placement.from_dict(p.to_dict()) == p


# --- weights only, and refusals


def test_weights_alone_need_no_rewritable_graph():
    g = graph("x: input", "a: conv x", "output: output a", how="export")
    p = place_all(g, activations=False)
    assert ([w.address for w in p.weights], p.activations) == (["a.weight"], ())


def test_a_graph_that_cannot_be_rewritten_is_refused_with_the_reason():
    g = graph("x: input", "a: conv x", "output: output a", how="export")
    with pytest.raises(BindError, match=r"captured by 'export': the forward branches on data"):
        place_all(g)


def test_weights_that_no_integer_operator_reads_are_refused():
    with pytest.raises(BindError, match=r"'bn1.weight' belongs to 'bn1'"):
        place(RESIDUAL, PROFILE, weights=["bn1.weight"])
    p = place(RESIDUAL, PROFILE, weights=["bn1.weight", "conv1.weight"])
    assert p.skipped[0].name == "bn1.weight"


def test_profiles_are_read_from_yaml(monkeypatch, tmp_path):
    monkeypatch.setattr(profile_file.resources, "files", lambda package: tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "activations: {signed: true}\nweights: {signed: true, axis: 0}\nops_integer: [conv]\n"
    )
    profile = load_profile("mine")
    assert (profile.name, profile.activations.signed, profile.ops_integer) == (
        "mine",
        True,
        ("conv",),
    )
    (tmp_path / "bad.yaml").write_text("activations: {bits: 64}\nweights: {}\nops_integer: []\n")
    with pytest.raises(UserError, match=r"profile 'bad': activations\.bits"):
        load_profile("bad")
    with pytest.raises(UserError, match=r"no quantization profile 'mnie'\. Nearest: 'mine'"):
        load_profile("mnie")


CAT = graph(
    "x: input", "a: conv x", "ra: relu a", "b: conv x", "cat: cat ra b", "c: conv cat",
    "s: sigmoid c", "output: output s",
)  # fmt: skip


def test_ncnn_has_quantizers_on_what_layers_read_and_nothing_else():
    p = place_all(RESIDUAL, load_profile("ncnn"))
    assert where(p) == ["x", "relu1", "flatten"]
    assert {(a.signed, a.symmetric) for a in p.activations} == {(True, True)}
    p = place_all(CAT, load_profile("ncnn"))
    assert where(p) == ["x", "cat"]


@pytest.mark.parametrize("name", ["xnnpack", "litert"])
def test_a_concatenation_has_one_scale_where_it_is_a_copy(name):
    p = place_all(CAT, load_profile(name))
    assert where(p) == ["x", "ra", "b", "cat", "c"]
    assert {a.shares_scale_with for a in p.activations if a.id in ("b", "cat")} == {"ra"}
    assert all(a.signed and not a.symmetric for a in p.activations)  # zero points everywhere
    assert where(place_all(RESIDUAL, load_profile(name)))[-1] == "fc"  # results are integers


@pytest.mark.parametrize("name", ["portable", "onnxruntime", "openvino"])
def test_the_profiles_that_come_along_fit_the_schema_and_the_residual_block(name):
    p = place_all(RESIDUAL, load_profile(name))
    summed = {"bn2"} if name == "openvino" else set()
    assert {"x", "relu1", "bn2", "relu2", "pool", "flatten"} - summed == set(where(p))
    assert p.skipped == ()
