"""nn.MultiheadAttention: the stream, whole heads and both widths are cut by themselves."""

import pytest
import torch
from cut_case import Calls, CallsTwo, cut, free_of, groups_of, indices
from torch import nn

from gracile.graph.capture import capture
from gracile.graph.oprule import rule_of_op
from gracile.nn.attention import Attention

X = torch.randn(2, 5, 6)


def model_with(call=None, width=8, heads=2, **options):
    """A layer of `width` channels, self-attention beside them, and a reader."""

    def forward(s, x):
        x = s.e(x)
        return s.o(x + (call(s, x) if call else s.mha(x, x, x)[0]))

    options.setdefault("batch_first", True)
    return Calls(
        forward, e=nn.Linear(6, width), mha=nn.MultiheadAttention(width, heads, **options),
        o=nn.Linear(width, 3),
    )  # fmt: skip


def test_units_worked_out_by_hand():
    groups = groups_of(model_with(), X)
    heads = "mha.in_proj_weight:"
    stream, outer, inner, values = (
        groups[id] for id in ("e.weight", f"{heads}outer", f"{heads}inner", f"{heads}inner2")
    )
    assert [len(g.units) for g in (stream, outer, inner, values)] == [8, 2, 4, 4]
    assert indices(stream, 3)["mha.in_proj_weight", 1] == (3,)
    assert indices(stream, 3)["mha.out_proj.weight", 0] == (3,)
    assert indices(outer, 1)["mha.in_proj_weight", 0] == (
        4,
        5,
        6,
        7,
        12,
        13,
        14,
        15,
        20,
        21,
        22,
        23,
    )
    assert indices(outer, 1)["mha.heads", 0] == (1,)
    units = [indices(g, u) for g in (inner, values) for u in range(4)]
    by_rows = {unit["mha.in_proj_weight", 0]: unit for unit in units}
    assert by_rows[1, 5, 9, 13]["mha.qk_width", 0] == (1,)
    assert ("mha.out_proj.weight", 1) not in by_rows[1, 5, 9, 13]
    assert by_rows[18, 22]["mha.out_proj.weight", 1] == (2, 6)
    assert by_rows[18, 22]["mha.in_proj_bias", 0] == (18, 22)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": False},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True, "dropout": 0.3},
    ],
)
def test_a_cut_of_everything_equals_zeros(options):
    model = cut(model_with(**options), X)
    assert isinstance(model.mha, Attention)
    assert (model.mha.heads, model.e.out_features) == (1, 4)


def test_a_second_cut_of_what_was_cut():
    model = cut(model_with(heads=4), X, gone={"mha.in_proj_weight:outer": [1]})
    assert free_of(model, X)["mha.in_proj_weight:outer"] == 3
    model = cut(model, X, gone={"mha.in_proj_weight:outer": [0, 2]})
    assert model.mha.in_proj_weight.shape == (3 * 2, 8)


def test_queries_keys_and_values_of_three_widths():
    model = CallsTwo(
        lambda s, x, y: s.o(s.mha(s.e(x), s.k(y), s.v(y), need_weights=False)[0]),
        e=nn.Linear(6, 8), k=nn.Linear(4, 5), v=nn.Linear(4, 7), o=nn.Linear(8, 3),
        mha=nn.MultiheadAttention(8, 2, kdim=5, vdim=7, batch_first=True),
    )  # fmt: skip
    inputs = X, torch.randn(2, 3, 4)
    assert free_of(model, *inputs) == {
        "e.weight": 8, "k.weight": 5, "v.weight": 7, "mha.q_proj_weight:outer": 2,
        "mha.q_proj_weight:inner": 4, "mha.v_proj_weight:inner": 4, "mha.out_proj.weight": 8,
    }  # fmt: skip
    cut(model, *inputs)


@pytest.mark.parametrize(("width", "heads"), [(4, 1), (4, 4)])
def test_one_head_and_heads_of_one_channel(width, heads):
    model = model_with(width=width, heads=heads)
    assert any(id.startswith("mha.in_proj_weight") for id in free_of(model, X))
    cut(model, X)


def test_masks():
    causal = torch.ones(5, 5).triu(1).bool()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def call(s, x):
        return s.mha(x, x, x, padding, False, causal)[0]

    assert cut(model_with(call), X).mha.heads == 1


def test_averaged_weights_that_are_read_protect_the_heads():
    model = model_with(lambda s, x: s.mha(x, x, x)[1] @ x)
    groups = groups_of(model, X)
    assert "averages over the heads" in groups["mha.in_proj_weight:outer"].protected
    cut(model, X)


def test_weights_of_each_head_are_channels():
    def call(s, x):
        out, maps = s.mha(x, x, x, average_attn_weights=False)
        return out + s.mix(maps.permute(0, 2, 3, 1)).sum(2)

    model = model_with(call)
    model.mix = nn.Linear(2, 8)
    groups = groups_of(model, X)
    assert indices(groups["mha.in_proj_weight:outer"], 1)["mix.weight", 1] == (1,)
    cut(model, X)


def test_a_mask_for_each_head_protects_the_heads():
    model = model_with(lambda s, x: s.mha(x, x, x, attn_mask=s.masks)[0])
    model.register_buffer("masks", torch.zeros(4, 5, 5))
    groups = groups_of(model, X)
    assert "a mask for each head" in groups["mha.in_proj_weight:outer"].protected
    cut(model, X)


def test_one_module_called_twice():
    model = cut(model_with(lambda s, x: s.mha(s.mha(x, x, x)[0], x, x)[0]), X)
    assert model.mha.heads == 1


def test_macs_of_four_projections_and_two_products():
    graph = capture(model_with(), X)
    node = graph["mha"]
    params = {"in_proj_weight": (24, 8), "out_proj.weight": (8, 8)}
    macs = rule_of_op(node.op).macs(node, [(2, 5, 8)], params)
    assert macs == 2 * (5 * 8 * 8 * 4 + 2 * (5 * 5 * 4 + 5 * 5 * 4))
