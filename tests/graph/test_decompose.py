"""Layers taken apart: the same function, parameters and ids that people can read."""

import copy

import pytest
import torch
from torch import nn

from gracile.core.plan import Architecture, Decompose, Plan
from gracile.errors import UserError
from gracile.graph import surgery
from gracile.graph.additions import structural
from gracile.graph.capture import capture
from gracile.graph.dependency import channel_groups
from gracile.graph.surgery import remove_edits
from gracile.models.word_lstm import word_lstm

TOKENS = torch.randint(0, 20, (2, 4), generator=torch.Generator().manual_seed(0))
APART = [Decompose(by="q", at="rnn", steps=4)]


def words(**options):
    torch.manual_seed(0)
    options = {"num_classes": 20, "embedding": 6, "hidden": 6, "dropout": 0.3, **options}
    return word_lstm(**options).eval()


class Reader(nn.Module):
    """Attention across two series, with masks, a cell, and states that are handed on."""

    def __init__(self, **options):
        super().__init__()
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.own = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.2)
        self.rnn = nn.GRU(8, 5, 2, bidirectional=True, batch_first=True)
        self.more = nn.LSTM(10, 4)
        self.cell = nn.LSTMCell(4, 3)

    def forward(self, x, memory, padding, mask):
        x, weights = self.cross(x, memory, memory, key_padding_mask=padding)
        x = x + self.own(x, x, x, attn_mask=mask, need_weights=False)[0]
        out, h = self.rnn(x)
        out, (_, c) = self.more(out)
        h2, c2 = self.cell(c[0])
        h2, _ = self.cell(h2 @ torch.ones(3, 4, dtype=h2.dtype), (h2, c2))
        return out, h, h2, weights


def inputs():
    torch.manual_seed(1)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    return torch.randn(2, 4, 8), torch.randn(2, 6, 8), padding, torch.ones(4, 4).triu(1).bool()


def test_same_function_and_parameters():
    model = words()
    names = dict(model.named_parameters())
    expected = model(TOKENS)
    apart, report = surgery.verified_apply(model, APART, examples=[TOKENS])
    assert report.proof is not None
    assert report.proof.checks == ("eval", "train")
    torch.testing.assert_close(apart(TOKENS), expected)
    assert all(p is names[n] for n, p in apart.named_parameters())
    assert apart.state_dict().keys() == model.state_dict().keys()


def test_ids_say_layer_step_and_part():
    graph = capture(surgery.apply(words(), APART, example=TOKENS), TOKENS)
    assert not graph.of_op("lstm")
    back = graph["rnn.l1.2.fed_back"]
    assert back.op == "linear"
    assert back.params == {"weight": "rnn.weight_hh_l1", "bias": "rnn.bias_hh_l1"}
    assert graph["rnn.l0.fed"].params["weight"] == "rnn.weight_ih_l0"
    assert graph["rnn.l0.3.cell"].op == "add"
    assert "rnn.l0.0.fed_back" not in graph.nodes  # from a state of zeros


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_masks_states_cells_and_two_series(options):
    model, x = Reader(**options).eval(), inputs()
    edits = [
        Decompose(at="cross"), Decompose(at="own"), Decompose(at="rnn", steps=4),
        Decompose(at="more", steps=2), Decompose(at="cell"),
    ]  # fmt: skip
    expected = model(*x)
    apart, _ = surgery.verified_apply(model, edits, examples=[x])
    torch.testing.assert_close(apart(*x), expected)
    graph = capture(apart, x)
    assert not graph.of_op("multihead_attention", "gru", "lstm", "lstm_cell")
    assert graph["own.linear"].params["weight"] == "own.in_proj_weight"


def test_dropout_follows_the_mode():
    apart = surgery.apply(words(), APART, example=TOKENS)
    assert torch.equal(apart(TOKENS), apart(TOKENS))
    apart.train()
    assert not torch.equal(apart(TOKENS), apart(TOKENS))


def test_another_length_is_refused():
    apart = surgery.apply(words(), APART, example=TOKENS)
    with pytest.raises(UserError, match="'rnn' was taken apart into 4 steps"):
        apart(TOKENS[:, :3])


def test_a_plan_is_replayed_and_may_leave_it_out(tmp_path):
    plan = Plan(architecture=Architecture(name="w")).extended(APART)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert structural(again) == plan.edits
    model = words()
    expected = model(TOKENS)
    apart = surgery.apply(copy.deepcopy(model), structural(again), example=TOKENS)
    torch.testing.assert_close(apart(TOKENS), expected)
    assert list(apart.state_dict()) == list(model.state_dict())


def test_units_are_cut_before_and_after():
    whole, apart = words(layers=1, tied=False), words(layers=1, tied=False)
    apart = surgery.apply(apart, APART, example=TOKENS)

    def cut(model):
        graph = capture(model, TOKENS)
        group = next(
            g for g in channel_groups(model, graph) for u in g.units
            if g.protected is None and any(p.at == "rnn.weight_hh_l0" and p.dim == 1 for p in u)
        )  # fmt: skip
        edits = remove_edits([group], {group.id: {1, 4}}, "m")
        return surgery.verified_apply(model, edits, examples=[TOKENS])[0]

    first = surgery.apply(cut(whole), APART, example=TOKENS)
    second = cut(apart)
    assert first.get_parameter("rnn.weight_hh_l0").shape == (16, 4)
    torch.testing.assert_close(second(TOKENS), first(TOKENS))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Decompose(at="decoder"), "'decoder' is no recurrent or attention layer"),
        (Decompose(at="rnn", steps=9), "into 9 steps, and the example has 4; give an example of 9"),
    ],
)
def test_what_cannot_be(edit, message):
    with pytest.raises(UserError, match=message):
        surgery.apply(words(), [edit], example=TOKENS)


def test_a_packed_sequence_is_refused():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)

        def forward(self, x):
            lengths = torch.full((2,), 4)
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return self.rnn(packed)[1]

    with pytest.raises(UserError, match="no layer can be taken apart"):
        surgery.apply(Packed(), APART, example=torch.randn(2, 4, 3))
