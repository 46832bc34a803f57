"""Scaled dot-product attention: heads and widths by themselves, the scale as it was."""

import pytest
import torch
from cut_case import Calls, cut, free_of, groups_of, indices, weight
from torch import nn
from torch.nn import functional as F

from gracile.graph.capture import capture
from gracile.graph.oprule import rule_of_op

X = torch.randn(2, 5, 8)


def heads(x, n):
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def attention(q_heads=2, kv_heads=2, attend=F.scaled_dot_product_attention, **parts):
    """Queries, keys and values of width 3, then a layer that reads the heads."""

    def forward(s, x):
        q, k, v = heads(s.q(x), q_heads), heads(s.k(x), kv_heads), heads(s.v(x), kv_heads)
        return s.o(attend(s, q, k, v).transpose(1, 2).flatten(2))

    q, kv = 3 * q_heads, 3 * kv_heads
    return Calls(
        forward, q=nn.Linear(8, q), k=nn.Linear(8, kv), v=nn.Linear(8, kv), o=nn.Linear(q, 4),
        **parts,
    )  # fmt: skip


def plain(s, q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def test_heads_and_both_widths_are_three_groups():
    groups = groups_of(attention(attend=plain), X)
    assert indices(groups["q.weight:outer"], 1)["k.weight", 0] == (3, 4, 5)
    assert indices(groups["q.weight:outer"], 1)["o.weight", 1] == (3, 4, 5)
    width = indices(groups["q.weight:inner"], 2)
    assert width["q.weight", 0] == width["k.weight", 0] == (2, 5)
    assert ("v.weight", 0) not in width
    assert indices(groups["v.weight:inner"], 0)["o.weight", 1] == (0, 3)


def test_a_cut_of_everything_equals_zeros():
    model = cut(attention(attend=plain), X)
    assert model.q.out_features == 2
    assert model.o.in_features == 2


def test_the_scale_does_not_follow_the_width():
    model = cut(attention(attend=plain), X, gone={"q.weight:inner": [0, 2]})
    found = [m for m in model.modules() if type(m).__name__ == "ScaledDotProduct"]
    assert [(m.width, m.scale) for m in found] == [(1, 3**-0.5)]


def test_a_scale_that_is_given_needs_no_map():
    model = attention(attend=lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3))
    model = cut(model, X, gone={"q.weight:inner": [0]})
    assert not [m for m in model.modules() if type(m).__name__ == "ScaledDotProduct"]


def test_a_scale_that_is_computed_protects_the_width():
    def attend(s, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=q.size(-1) ** -1.0)

    groups = groups_of(attention(attend=attend), X)
    assert "is computed" in groups["q.weight:inner"].protected
    assert groups["q.weight:outer"].protected is None


def test_a_key_head_goes_with_its_query_heads():
    model = attention(
        4, 2, lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    )
    groups = [g for g in groups_of(model, X).values() if g.protected is None]
    shared = [g for g in groups if ("k.weight", 0) in indices(g, 0) and g.kind == "outer"]
    assert [len(g.units) for g in shared] == [2]
    assert indices(shared[0], 1)["q.weight", 0] == (6, 7, 8, 9, 10, 11)
    assert indices(shared[0], 1)["k.weight", 0] == (3, 4, 5)
    cut(model, X)


def test_one_key_head_serves_all_query_heads():
    model = attention(
        4, 1, lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    )
    free = free_of(model, X)
    assert free["q.weight:outer"] == 4
    assert cut(model, X, gone={"q.weight:outer": [1, 2]}).q.out_features == 6


def test_a_bias_of_each_head_is_cut_with_it():
    model = attention(
        attend=lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=s.bias),
        bias=weight(2, 5, 5),
    )
    groups = groups_of(model, X)
    assert indices(groups["q.weight:outer"], 1)["bias", 0] == (1,)
    model = cut(model, X, gone={"q.weight:outer": [1]})
    assert model.bias.shape == (1, 5, 5)


@pytest.mark.parametrize("mask", [torch.ones(5, 5).tril().bool(), torch.zeros(1, 1, 5, 5)])
def test_a_mask_for_all_heads_ties_nothing(mask):
    model = attention(attend=lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, s.mask))
    model.register_buffer("mask", mask)
    assert free_of(model, X)["q.weight:outer"] == 2
    cut(model, X)


def test_macs_are_scores_and_their_product_with_the_values():
    graph = capture(attention(attend=plain), X)
    node = graph.of_op("scaled_dot_product_attention")[0]
    shapes = [graph[i].shape for i in node.inputs]
    assert rule_of_op(node.op).macs(node, shapes, {}) == 2 * 2 * (5 * 5 * 3 + 5 * 5 * 3)
