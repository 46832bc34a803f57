"""Recurrent cells: a hidden unit has a row in each gate's block and a column in the recurrence."""

import torch
from torch import nn

from patterns.base import pattern, tokens

SERIES = (2, 5, 6)  # (batch, steps, features)


# 4 gates x (6 inputs + 2 biases), what the recurrence loses from 16 x 4 to 12 x 3, and 3 readers.
@pattern(SERIES, free={"cell.weight_ih_l0": (4, 4 * (6 + 2) + (16 * 4 - 12 * 3) + 3)})
class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.b = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.cell(x)[0])


@pattern(
    SERIES,
    free={
        "a.weight": (5, 6 + 1 + 3 * 4),
        "cell.weight_ih_l0": (4, 3 * (5 + 2) + (12 * 4 - 9 * 3) + 3),
    },
)
class GRULastStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.cell, self.b = nn.Linear(6, 5), nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        y, _ = self.cell(torch.tanh(self.a(x)))
        return self.b(y[:, -1])


@pattern(SERIES, free={"cell.weight_ih_l0": (4, 6 + 2 + (4 * 4 - 3 * 3) + 3)})
class RNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.b = nn.RNN(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.cell(x)[0])


# One hidden size for both layers and both ways: one unit is one index of all four recurrences.
@pattern(SERIES, free={"cell.weight_ih_l0": (4, None)})
class TwoLayersBothWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.b = nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.cell(x)[0])


@pattern(SERIES, free={"cell.weight_ih_l0": (4, None)})
class LastHidden(nn.Module):  # the final hidden state instead of the outputs
    def __init__(self):
        super().__init__()
        self.cell, self.b = nn.GRU(6, 4, num_layers=2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        _, hidden = self.cell(x)
        return self.b(hidden[-1])


@pattern(
    (2, 6),
    free={
        "a.weight": (5, 6 + 1 + 3 * 4),
        "cell.weight_ih": (4, 3 * (5 + 2) + (12 * 4 - 9 * 3) + 3),
    },
)
class CellByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.cell, self.b = nn.Linear(6, 5), nn.GRUCell(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.cell(torch.relu(self.a(x)))
        return self.b(self.cell(self.a(x), h))


@pattern(tokens(2, 5, of=9), free={"embed.weight": (6, 9 + 16), "cell.weight_ih_l0": (4, None)})
class LanguageModel(nn.Module):  # what an embedding makes, an LSTM reads
    def __init__(self):
        super().__init__()
        self.embed, self.cell = nn.Embedding(9, 6), nn.LSTM(6, 4, num_layers=2, batch_first=True)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(4, 9)

    def forward(self, x):
        y, _ = self.cell(self.drop(self.embed(x)))
        return self.head(y)


@pattern(
    (2, 6),
    free={
        "lstm.weight_ih": (5, 4 * (6 + 2) + (20 * 5 - 16 * 4) + 4),
        "rnn.weight_ih": (4, 5 + 2 + (4 * 4 - 3 * 3) + 3),
    },
)
class CellsInTurn(nn.Module):  # an LSTM cell feeds a plain one
    def __init__(self):
        super().__init__()
        self.lstm, self.rnn, self.b = nn.LSTMCell(6, 5), nn.RNNCell(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        h, c = self.lstm(x)
        h, _ = self.lstm(x, (h, c))
        return self.b(self.rnn(h))
