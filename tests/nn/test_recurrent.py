"""Step by step = torch's own layers, from the same parameters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gracile.errors import UserError
from gracile.nn.recurrent import Cell, Length, Recurrent, step

LAYERS = [
    (nn.LSTM, {}),
    (nn.LSTM, {"proj_size": 2}),
    (nn.GRU, {}),
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu"}),
]
CELLS = [(nn.LSTMCell, {}), (nn.GRUCell, {}), (nn.RNNCell, {}), (nn.RNNCell, LAYERS[-1][1])]


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), LAYERS)
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 3),
    units=st.integers(3, 5),
    layers=st.integers(1, 3),
    switches=st.tuples(*[st.booleans()] * 5),
)
@settings(max_examples=15, deadline=None)
def test_a_layer_computes_what_torchs_does(kind, options, sizes, units, layers, switches):
    batch, steps, width = sizes
    bias, batch_first, both, batched, from_a_state = switches
    torch.manual_seed(0)
    source = kind(
        width, units, layers, bias=bias, batch_first=batch_first, bidirectional=both,
        dtype=torch.float64, **options,
    )  # fmt: skip
    shape = (batch, steps) if batch_first else (steps, batch)
    x = torch.randn(*(shape if batched else (steps,)), width, dtype=torch.float64)
    state = source(torch.randn_like(x))[1] if from_a_state else None
    same(Recurrent(source)(x, state), source(x, state))


@pytest.mark.parametrize(("kind", "options"), CELLS)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_cell_computes_what_torchs_does(kind, options, batched, bias):
    torch.manual_seed(0)
    source = kind(3, 4, bias=bias, dtype=torch.float64, **options)
    x = torch.randn(*((2, 3) if batched else (3,)), dtype=torch.float64)
    state = source(x)
    same(Cell(source)(x), state)
    same(Cell(source)(x, state), source(x, state))


def test_a_step_by_hand():
    """i = f = o = 1/2 where all sums are 0; g = tanh(ln 2) = 0.6; c = 2/2 + 0.3; h = tanh(c)/2."""
    fed = torch.tensor([0.0, 0.0, torch.log(torch.tensor(2.0)), 0.0])
    h, c = step("lstm", fed, (torch.zeros(1), torch.tensor([2.0])),
                [torch.zeros(4, 1), None, None], lambda role, x: x)  # fmt: skip
    torch.testing.assert_close(c, torch.tensor([1.3]))
    torch.testing.assert_close(h, torch.tensor([1.3]).tanh() / 2)


def test_dropout_lies_between_the_layers():
    source = nn.LSTM(3, 4, 2, dropout=1.0)
    ours, x = Recurrent(source), torch.randn(5, 2, 3)
    zeros = torch.zeros(5, 2, 4)
    alone = nn.LSTM(4, 4)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(alone, f"{name}_l0", getattr(source, f"{name}_l1"))
    torch.testing.assert_close(ours.train()(x)[0], alone(zeros)[0])
    torch.testing.assert_close(ours.eval()(x)[0], source.eval()(x)[0])


def test_gradients_are_the_same():
    torch.manual_seed(0)
    source, x = nn.LSTM(3, 4, 2, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    values = [m(x)[0].square().sum() for m in (source, Recurrent(source))]
    same(*(torch.autograd.grad(v, list(source.parameters())) for v in values))


def test_names_and_parameters_are_the_sources():
    source = nn.GRU(3, 4, bidirectional=True)
    ours = dict(Recurrent(source).named_parameters())
    assert [ours[name] is p for name, p in source.named_parameters()] == [True] * 8


def test_another_length_is_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"'rnn'.*into 5 steps.*given 4.*decompose: false"):
        Length(5, 1, "rnn")(torch.zeros(2, 4, 3))
