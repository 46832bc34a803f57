"""Recurrent layers: the same unit of every gate, layer and direction goes."""

import pytest
import torch
from cut_case import Calls, CallsTwo, around, cut, free_of, groups_of, indices
from torch import nn

from gracile.graph.capture import capture
from gracile.graph.oprule import rule_of_op

X = torch.randn(2, 5, 6)


def series(layer, read=lambda out, last: out, width=4):
    """A linear layer of 5, the recurrent layer, and a layer that reads what `read` picks."""

    def call(s, x):
        out, last = s.r(s.a(x))
        return s.b(read(out, last))

    return Calls(call, a=nn.Linear(6, 5), r=layer, b=nn.Linear(width, 3))


def test_units_of_an_lstm_by_hand():
    groups = groups_of(series(nn.LSTM(5, 4, batch_first=True)), X)
    unit = indices(groups["r.weight_ih_l0"], 1)
    assert unit["r.weight_ih_l0", 0] == unit["r.weight_hh_l0", 0] == (1, 5, 9, 13)
    assert unit["r.bias_ih_l0", 0] == unit["r.bias_hh_l0", 0] == (1, 5, 9, 13)
    assert unit["r.weight_hh_l0", 1] == unit["b.weight", 1] == (1,)
    assert indices(groups["a.weight"], 2)["r.weight_ih_l0", 1] == (2,)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"num_layers": 2, "dropout": 0.1}, {"bidirectional": True}]
)
def test_a_cut_of_everything_equals_zeros(kind, options):
    both = 2 if options.get("bidirectional") else 1
    model = series(kind(5, 4, batch_first=True, **options), width=4 * both)
    assert free_of(model, X) == {"a.weight": 5, "r.weight_ih_l0": 4}
    model = cut(model, X)
    assert (model.r.input_size, model.r.hidden_size) == (3, 2)
    assert model.b.in_features == 2 * both


def test_two_layers_both_ways_by_hand():
    model = series(nn.GRU(5, 4, 2, bidirectional=True, batch_first=True), width=8)
    unit = indices(groups_of(model, X)["r.weight_ih_l0"], 3)
    assert unit["r.weight_ih_l1_reverse", 0] == (3, 7, 11)
    assert unit["r.weight_ih_l1_reverse", 1] == unit["b.weight", 1] == (3, 7)
    cut(model, X)


@pytest.mark.parametrize(
    ("layer", "read"),
    [
        (nn.GRU(5, 4, 2, batch_first=True), lambda out, last: last[-1]),
        (nn.LSTM(5, 4, batch_first=True), lambda out, last: last[0][0] * last[1][-1]),
        (nn.RNN(5, 4), lambda out, last: out[:, -1]),
    ],
)
def test_last_states(layer, read):
    model = series(layer, read)
    assert free_of(model, X)["r.weight_ih_l0"] == 4
    cut(model, X)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_projection_is_cut_and_its_hidden_units_stay():
    model = series(nn.LSTM(5, 4, 2, proj_size=3, batch_first=True), width=3)
    groups = groups_of(model, X)
    assert "more hidden units than projected" in groups["r.weight_ih_l0"].protected
    unit = indices(groups["r.weight_hr_l0"], 2)
    assert unit["r.weight_hr_l1", 0] == unit["r.weight_hh_l0", 1] == unit["b.weight", 1] == (2,)
    assert cut(model, X).r.proj_size == 2


def test_initial_states_from_the_input_stay():
    model = CallsTwo(
        lambda s, x, h: s.b(s.r(x, h)[0]), r=nn.GRU(6, 4, batch_first=True), b=nn.Linear(4, 3)
    )
    assert "r.weight_ih_l0" not in free_of(model, X, torch.randn(1, 2, 4))


def test_initial_states_from_a_layer_are_tied():
    def call(s, x, z):
        h = torch.tanh(s.i(z)).unsqueeze(0)
        return s.b(s.r(x, (h, s.c(z).unsqueeze(0)))[0])

    model = CallsTwo(
        call, i=nn.Linear(3, 4), c=nn.Linear(3, 4), r=nn.LSTM(6, 4, batch_first=True),
        b=nn.Linear(4, 3),
    )  # fmt: skip
    inputs = X, torch.randn(2, 3)
    unit = indices(groups_of(model, *inputs)["i.weight"], 2)
    assert unit["c.weight", 0] == (2,)
    assert unit["r.weight_hh_l0", 0] == (2, 6, 10, 14)
    cut(model, *inputs)


def test_an_encoder_hands_its_states_to_a_decoder():
    model = Calls(
        lambda s, x: s.b(s.d(x, s.e(x)[1])[0]), e=nn.LSTM(6, 4, batch_first=True),
        d=nn.LSTM(6, 4, batch_first=True), b=nn.Linear(4, 3),
    )  # fmt: skip
    assert indices(groups_of(model, X)["e.weight_ih_l0"], 0)["d.weight_hh_l0", 1] == (0,)
    cut(model, X)


def test_zeros_of_a_written_size_follow():
    def call(s, x):
        return s.b(s.r(x, x.new_zeros(1, x.size(0), 4))[0])

    model = Calls(call, r=nn.GRU(6, 4, batch_first=True), b=nn.Linear(4, 3))
    model = cut(model, X, gone={"r.weight_ih_l0": [0, 3]})
    assert model(torch.randn(7, 5, 6)).shape == (7, 5, 3)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_cells_in_a_loop(kind, gates):
    def call(s, x):
        first = state = s.r(s.a(x[:, 0]))
        for t in (1, 2):
            state = s.r(s.a(x[:, t]), state)
        return s.b(state[0] + first[1] if gates == 4 else state)

    model = Calls(call, a=nn.Linear(6, 5), r=kind(5, 4), b=nn.Linear(4, 3))
    unit = indices(groups_of(model, X)["r.weight_ih"], 1)
    assert unit["r.weight_hh", 0] == tuple(range(1, 4 * gates, 4))
    model = cut(model, X)
    assert (model.r.input_size, model.r.hidden_size) == (3, 2)


def test_what_is_read_along_time_is_not_channels():
    model = around(lambda s, x: s.r(x)[0].transpose(1, 2) @ x, r=nn.GRU(4, 4, batch_first=True))
    assert free_of(model, X)["a.weight"] == 4


def test_macs_are_every_weight_a_step():
    node = capture(series(nn.LSTM(5, 4, batch_first=True)), X)["r"]
    params = {"weight_ih_l0": (16, 6), "weight_hh_l0": (16, 4), "bias_ih_l0": (16,)}
    assert rule_of_op("lstm").macs(node, [(2, 5, 6)], params) == 2 * 5 * (16 * 6 + 16 * 4)
