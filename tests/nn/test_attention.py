"""Attention computes what nn.MultiheadAttention computes, from the same parameters."""

import pytest
import torch
from torch import nn

from gracile.nn.attention import Attention

CAUSAL = torch.ones(5, 5).triu(1).bool()
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def pair(**options):
    torch.manual_seed(0)
    source = nn.MultiheadAttention(8, 2, **options)
    with torch.no_grad():
        for p in source.parameters():
            p.normal_()
    return source, Attention(source)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"kdim": 5, "vdim": 7},
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": CAUSAL, "need_weights": False, "is_causal": True},
        {"attn_mask": torch.randn(4, 5, 5)},
        {"key_padding_mask": PADDING, "attn_mask": CAUSAL},
        {"key_padding_mask": PADDING, "need_weights": False},
    ],
)
def test_same_results(options, call):
    source, attention = pair(**options)
    lead = (2, 5) if options.get("batch_first") else (5, 2)
    q = torch.randn(*lead, 8)
    k = torch.randn(*lead, options.get("kdim", 8))
    v = torch.randn(*lead, options.get("vdim", 8))
    expected, weights = source(q, k, v, **call)
    got, own = attention(q, k, v, **call)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (own is None) == (weights is None)
    if weights is not None:
        torch.testing.assert_close(own, weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_first", [False, True])
def test_without_a_batch(batch_first):
    source, attention = pair(batch_first=batch_first)
    x = torch.randn(5, 8)
    for a, b in zip(source(x, x, x), attention(x, x, x), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_parameters_are_the_same_under_the_same_names():
    source, attention = pair(add_bias_kv=True)
    assert list(attention.state_dict()) == list(source.state_dict())
    own = dict(attention.named_parameters())
    assert all(own[name] is p for name, p in source.named_parameters())


def test_dropout_only_in_train_mode():
    _, attention = pair(dropout=0.5, batch_first=True)
    x = torch.randn(2, 5, 8)
    for need in (True, False):
        attention.eval()
        assert torch.equal(attention(x, x, x, None, need)[0], attention(x, x, x, None, need)[0])
        attention.train()
        assert not torch.equal(attention(x, x, x, None, need)[0], attention(x, x, x, None, need)[0])


def test_fewer_widths_for_keys_than_for_values():
    _, attention = pair()
    attention.qk_width = 1
    with torch.no_grad():
        attention.in_proj_weight = nn.Parameter(attention.in_proj_weight[:12])
        attention.in_proj_bias = nn.Parameter(attention.in_proj_bias[:12])
    x = torch.randn(5, 1, 8)
    assert attention(x, x, x)[0].shape == (5, 1, 8)
    assert attention.extra_repr() == "heads=2, qk_width=1, v_width=4"


@pytest.mark.parametrize("options", [{}, {"batch_first": True, "bias": False, "dropout": 0.5}])
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"need_weights": False},
        {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
        {"key_padding_mask": PADDING, "average_attn_weights": False},
    ],
)
def test_of_one_tensor_with_itself_in_one_product(options, call, monkeypatch):
    source, attention = pair(**options)
    spelled = Attention(attention, spelled=True)
    for module in (source, attention, spelled):
        module.eval()
    x = torch.randn(2, 5, 8) if options.get("batch_first") else torch.randn(5, 2, 8)
    expected = source(x, x, x, **call)
    products = []
    linear = nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda x, w, b: (products.append(w), linear(x, w, b))[1]
    )
    for module in (attention, spelled):
        got = module(x, x, x, **call)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    wanted = [source.in_proj_weight, source.out_proj.weight] * 2
    assert all(w is p for w, p in zip(products, wanted, strict=True))
