"""torch's transformer layers are spelled out, so that everything in them can be cut."""

import pytest
import torch
from cut_case import Calls, CallsTwo, free_of, groups_of, some_of_each
from torch import nn

from gracile.graph.capture import capture
from gracile.graph.surgery import remove_edits, verified_apply
from gracile.graph.trace import spelled_out

X = torch.randn(2, 5, 6)
LAYER = {"dim_feedforward": 10, "dropout": 0.1, "batch_first": True}


def encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 2, **LAYER, **options)
    return Calls(
        lambda s, x: s.o(s.t(s.e(x))), e=nn.Linear(6, 8), o=nn.Linear(8, 3),
        t=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
    )  # fmt: skip


def proven(model, *inputs):
    groups = groups_of(model, *inputs)
    gone = some_of_each(groups)
    model, report = verified_apply(
        model, remove_edits(list(groups.values()), gone, "t"), examples=[inputs]
    )
    assert report.proof.checks == ("eval", "train")
    model.train()(*inputs).square().mean().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    return model


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}])
def test_the_layers_of_an_encoder(options):
    model = encoder(**options)
    assert capture(model, X).how == "fx"
    free = free_of(model, X)
    for k in range(2):
        assert free[f"t.layers.{k}.self_attn.in_proj_weight:outer"] == 2
        assert free[f"t.layers.{k}.linear1.weight"] == 10
    assert free["e.weight"] == 8
    assert proven(model, X).t.layers.get_submodule("1").linear1.out_features == 5


def test_an_encoder_with_a_mask():
    model = encoder()
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    model.register_buffer("mask", mask)
    model.function = lambda s, x: s.o(s.t(s.e(x), s.mask))
    assert free_of(model, X)["t.layers.0.self_attn.in_proj_weight:outer"] == 2
    proven(model, X)


def test_a_decoder_layer():
    model = CallsTwo(
        lambda s, x, y: s.o(s.t(s.e(x), s.m(y))), e=nn.Linear(6, 8), m=nn.Linear(6, 8),
        t=nn.TransformerDecoderLayer(8, 2, **LAYER), o=nn.Linear(8, 3),
    )  # fmt: skip
    inputs = X, torch.randn(2, 3, 6)
    free = free_of(model, *inputs)
    assert free["e.weight"] == 8
    assert "m.weight" in groups_of(model, *inputs)["e.weight"].producers  # one packed projection
    assert free["t.multihead_attn.in_proj_weight:outer"] == 2
    proven(model, *inputs)


def test_encoder_and_decoder_together():
    with pytest.warns(UserWarning, match="enable_nested_tensor"):
        transformer = nn.Transformer(8, 2, 1, 1, norm_first=True, **LAYER)
    model = Calls(
        lambda s, x: s.o(s.t(s.e(x), s.e(x))), e=nn.Linear(6, 8), o=nn.Linear(8, 3), t=transformer
    )
    assert free_of(model, X)["t.decoder.layers.0.linear1.weight"] == 10
    proven(model, X)


def test_the_fused_path_is_as_it_was_afterwards():
    home = nn.modules.transformer

    def state():
        return torch.backends.mha.get_fastpath_enabled(), home._get_seq_len

    before = state()
    with spelled_out():
        assert not state()[0]
        assert state() != before
    assert state() == before
