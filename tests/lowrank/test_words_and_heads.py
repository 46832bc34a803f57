"""Embeddings and the projections of attention: exact at full rank, smaller, saved, refused."""

from types import SimpleNamespace

import pytest
import torch
from test_joint_ranks import begun
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from gracile import Recipe, Session
from gracile.errors import BindError, UserError
from gracile.lowrank.ranks.energy import energy
from gracile.lowrank.ranks.macs import macs
from gracile.lowrank.scheme import factorize
from gracile.models.word_lstm import WordLSTM
from gracile.nn.chain import Layer, build, layer_of
from gracile.nn.schemes import chain_of, full_ranks, product
from gracile.train.checkpoint import load_model, save_model

IDS = torch.arange(24).reshape(4, 6) % 30
TOKENS = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))


class Words(nn.Module):
    """An embedding that is read at several places, a head."""

    def __init__(self, padding_idx=None):
        super().__init__()
        self.words = nn.Embedding(30, 16, padding_idx=padding_idx)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.words(x)).mean(1))


class Separate(nn.Module):
    """Self-attention with a linear layer for each projection, as ViT and BERT have it."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y).mean(1)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def session(model, x, **options):
    torch.manual_seed(0)
    entry = {"lowrank": "factorize", "when": {"at": "0ep"}, "round_to": 1, **options}
    recipe = Recipe.build(methods={"r": entry}, train={"epochs": 1})
    y = torch.zeros(len(x), dtype=torch.long)
    return Session(
        model, recipe, torch.optim.SGD(model.parameters(), 0.1), example=x, steps_per_epoch=1,
        calibration=[(x, y)], loss_of=cross_entropy,
    )  # fmt: skip


def words(**options):
    torch.manual_seed(0)
    return Words(**options)


def test_an_embedding_is_a_linear_layer_of_row_numbers():
    module = nn.Embedding(30, 16).double()
    layer = layer_of(module)
    assert (layer.weight_shape, layer.params, layer.macs(())) == ((30, 16), 480, 0)
    assert full_ranks("svd", layer) == (16,)
    chain = chain_of("svd", layer, (4,))
    assert chain.shapes == ((30, 4), (16, 4))
    assert chain.params == 30 * 4 + 16 * 4
    net = build(chain, factorize("svd", module.weight, layer, (4,)))
    assert isinstance(net[0], nn.Embedding)
    found = product(chain, factorize("svd", module.weight, layer, (4,)), layer)
    torch.testing.assert_close(net(IDS), found[IDS])


def test_the_error_of_an_embedding_is_the_tail_of_its_singular_values():
    weight = torch.randn(30, 16, dtype=torch.float64)
    layer = Layer(30, 16, lookup=True)
    near = product(chain_of("svd", layer, (5,)), factorize("svd", weight, layer, (5,)), layer)
    tail = torch.linalg.svdvals(weight)[5:].square().sum()
    torch.testing.assert_close((weight - near).square().sum(), tail)
    (rank,) = energy(weight, layer, "svd", (), share=float(1 - tail / weight.square().sum()))
    assert rank == 5


@pytest.mark.parametrize("padding", [None, 0])
def test_an_embedding_at_full_rank_computes_the_same_and_keeps_its_padding(padding):
    model = words(padding_idx=padding)
    with torch.no_grad():
        expected = model(IDS)
    layer = layer_of(model.words)
    chain = chain_of("svd", layer, (16,))
    model.words = build(chain, factorize("svd", model.words.weight, layer, (16,)))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=1e-5)
    model(IDS).square().sum().backward()
    assert model.words[0].padding_idx == padding
    if padding is not None:
        assert not model.words[0].weight.grad[padding].any()


def test_a_session_factorizes_an_embedding_and_saves_it(tmp_path):
    s = begun(session(words(), IDS, weights="words", rank={"name": "params", "ratio": 0.5}))
    (edit,) = s.plan.of_kind("factorize")
    assert edit.ranks == (5,)  # 5 (30 + 16) <= 240 < 6 (30 + 16)
    s.before_backward_pass(0, 0, 1, s.model(IDS).square().mean()).backward()
    s.step()
    s.on_epoch_end(0)
    made = s.finish()
    save_model(tmp_path, made)
    back = load_model(tmp_path, IDS, factory=lambda: SimpleNamespace(model=words()))
    with torch.no_grad():
        torch.testing.assert_close(back.model(IDS), made.model(IDS), rtol=0, atol=0)


def test_an_embedding_by_measured_loss_within_a_budget_of_parameters():
    rule = {"name": "sensitivity", "of": "params", "ratio": 0.6}
    s = begun(session(words(), IDS, rank=rule))
    assert sum(p.numel() for p in s.model.parameters()) <= 0.6 * (480 + 85) + 1e-6
    assert "words" in [e.at for e in s.plan.of_kind("factorize")]


def test_what_an_embedding_cannot_be_is_said():
    layer = Layer(30, 16, lookup=True)
    with pytest.raises(UserError, match=r"multiplies nothing; choose its ranks by params"):
        macs(torch.empty(0), layer, "svd", (), ratio=0.5)
    for scheme in ("svd_data", "denil", "tucker2"):
        with pytest.raises(UserError, match=r"use svd"):
            full_ranks(scheme, layer)
    with pytest.raises(UserError, match=r"max_norm, scale_grad_by_freq or sparse"):
        layer_of(nn.Embedding(30, 16, max_norm=1.0))


def test_a_table_that_is_also_the_head_stays_whole():
    torch.manual_seed(0)
    model = WordLSTM(num_classes=30, embedding=16, hidden=16, layers=1, dropout=0.0, tied=True)
    with pytest.raises(BindError, match=r"'encoder\.weight': .* also 'decoder\.weight'; a tied"):
        session(model, IDS, weights="encoder", rank={"name": "params", "ratio": 0.5})


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_a_projection_at_full_rank_computes_the_same(name):
    torch.manual_seed(0)
    model = Separate()
    with torch.no_grad():
        expected = model(TOKENS)
        layer = layer_of(model.get_submodule(name))
        module = model.get_submodule(name)
        factors = factorize("svd", module.weight, layer, (16,))
        setattr(model, name, build(chain_of("svd", layer, (16,)), factors, module.bias))
        torch.testing.assert_close(model(TOKENS), expected, atol=1e-5, rtol=1e-5)


def test_a_session_factorizes_separate_projections_by_their_data():
    torch.manual_seed(0)
    rule = {"name": "knapsack", "ratio": 0.5}
    s = begun(session(Separate(), TOKENS, scheme="svd_data", rank=rule))
    assert {e.at for e in s.plan.of_kind("factorize")} <= {"q", "k", "v", "out"}
    assert sum(p.numel() for p in s.model.parameters() if p.dim() > 1) <= 0.5 * 4 * 256


def test_attention_as_one_module_stays_whole_and_says_how_it_could_not():
    torch.manual_seed(0)
    s = begun(session(Whole(), TOKENS, rank={"name": "fixed", "share": 0.2}))
    assert [e.at for e in s.plan.of_kind("factorize")] == ["head"]
    whys = {a: why for a, _, _, reason, why, _ in s.notes if reason == "unsupported"}
    assert "write them as linear layers" in whys["attention.in_proj_weight"]
    with pytest.raises(BindError, match=r"'attention\.out_proj\.weight': .* linear layers"):
        session(Whole(), TOKENS, weights="attention.out_proj")
