"""Recurrent layers step by step in plain operators: what torch's become where their parts count.

The idea of cells whose parts can be reached is Distiller's (`DistillerLSTM`); here nothing has a
parameter of its own, so names, checkpoints and optimizers stay.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gracile.errors import UserError

Note = Callable[[str, int | None, Tensor], Tensor]
State = tuple[Tensor, ...]
OF_A_CELL = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
LAYERS = (nn.LSTM, nn.GRU, nn.RNN)
CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)


def as_it_is(role: str, step: int | None, x: Tensor) -> Tensor:
    """x; what a tracer puts in its place notes which part of which step it is."""
    return x


class Recurrent(nn.Module):
    """Computes what an LSTM, a GRU or a plain recurrent layer of torch does, one step at a time.

    The same parameters under the same names, the same arguments, the same results. The products
    with the inputs of all steps are one; each step has one product with the state. A first step
    from a state of zeros has none, its bias is added.

    Args:
        source: the layer whose place it takes; its parameters are shared.
        steps: how many it computes; None for as many as there are in the input, which a tracer
            cannot follow.

    Attributes:
        note: called with the role, the step (None: all of them) and the value of every part of a
            step, returns that value.

    >>> Recurrent(nn.LSTM(3, 4))(torch.zeros(5, 1, 3))[0].shape
    torch.Size([5, 1, 4])
    """

    note: Note = staticmethod(as_it_is)

    def __init__(self, source: Any, steps: int | None = None):
        super().__init__()
        self.steps, self.kind = steps, _kind(source)
        self.layers, self.both = source.num_layers, source.bidirectional
        self.batch_first, self.dropout = source.batch_first, source.dropout
        for name, parameter in source._parameters.items():
            self.register_parameter(name, parameter)
        self.training = source.training

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """(steps, batch, channels), (batch, steps, channels) if batch_first, or without a batch."""
        time = input.dim() - 2
        turned = time == 1 and not self.batch_first
        x = input.transpose(0, 1) if turned else input  # (batch, steps, channels)
        steps = x.shape[time] if self.steps is None else self.steps
        given = None if hx is None else tuple(hx) if self.kind == "lstm" else (hx,)
        last: list[State] = []
        for layer in range(self.layers):
            ways = []
            for way in ("", "_reverse") if self.both else ("",):
                place = f"l{layer}{way}"
                state = None
                if given is not None:
                    state = tuple(self._of_layer(s, len(last)) for s in given)
                outputs, state = self._run(place, x, state, steps, time)
                ways.append(outputs)
                last.append(state)
            each = (
                ways[0]
                if len(ways) == 1
                else [self._joined(layer, t, w) for t, w in enumerate(zip(*ways, strict=True))]
            )
            # Side by side, then in steps: OpenVINO 2026.4 moves a quantizer that directly follows a
            # concatenation of steps before it, and fails at the product with what that makes.
            x = self.note(f"l{layer}.side_by_side", None, torch.cat(each, -1))
            x = x.unflatten(-1, (steps, -1))
            x = self.note(f"l{layer}.output", None, x)
            if self.dropout and layer + 1 < self.layers:
                x = F.dropout(x, self.dropout, self.training)
        ends = [
            self.note(f"last{k}", None, torch.cat([s[k].unsqueeze(0) for s in last]))
            for k in range(len(last[0]))
        ]
        x = x.transpose(0, 1) if turned else x
        return x, tuple(ends) if self.kind == "lstm" else ends[0]

    def _joined(self, layer: int, t: int, ways: Sequence[Tensor]) -> Tensor:
        return self.note(f"l{layer}.both_ways", t, torch.cat(list(ways), -1))

    def _of_layer(self, state: Tensor, number: int) -> Tensor:
        count = self.layers * (2 if self.both else 1)
        return (state if count == 1 else state.chunk(count, 0)[number]).squeeze(0)

    def _run(
        self, place: str, x: Tensor, state: State | None, steps: int, time: int
    ) -> tuple[list[Tensor], State]:
        """The outputs of one layer in one direction, in order of time, and its last state."""

        def weight(name: str) -> Any:
            return getattr(self, f"{name}_{place}", None)

        fed = F.linear(x, weight("weight_ih"), weight("bias_ih"))
        fed = self.note(f"{place}.fed", None, fed)
        parts = fed.chunk(steps, time)
        outputs: list[Any] = [None] * steps
        rest = [weight(n) for n in ("weight_hh", "bias_hh", "weight_hr")]
        order = range(steps) if not place.endswith("_reverse") else reversed(range(steps))
        for t in order:
            gates = parts[t].squeeze(time)
            state = step(self.kind, gates, state, rest, partial(self._note, place, t))
            outputs[t] = state[0]
        assert state is not None
        return outputs, state

    def _note(self, place: str, t: int, role: str, x: Tensor) -> Tensor:
        return self.note(f"{place}.{role}", t, x)


class Cell(nn.Module):
    """Computes what a cell of torch does: one step."""

    note: Note = staticmethod(as_it_is)

    def __init__(self, source: Any):
        super().__init__()
        self.kind = _kind(source)
        for name, parameter in source._parameters.items():
            self.register_parameter(name, parameter)
        self.training = source.training

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """(batch, channels) or (channels), and the state: (h, c) of an LSTM's, h of another."""
        state = None if hx is None else tuple(hx) if self.kind == "lstm" else (hx,)
        ih, bias, *rest = (getattr(self, name) for name in OF_A_CELL)
        fed = self.note("fed", None, F.linear(input, ih, bias))
        state = step(self.kind, fed, state, [*rest, None], lambda role, v: self.note(role, None, v))
        return state if self.kind == "lstm" else state[0]


class Length(nn.Module):
    """Passes on a series of the length that its reader was unrolled for; refuses any other.

    Args:
        steps: that length.
        dim: along which it lies.
        of: who reads it, for the message.
    """

    def __init__(self, steps: int, dim: int, of: str):
        super().__init__()
        self.steps, self.dim, self.of = steps, dim, of

    def forward(self, x: Tensor) -> Tensor:
        """x.

        Raises:
            UserError: another length.
        """
        if x.shape[self.dim] != self.steps:
            raise UserError(
                f"'{self.of}' was taken apart into {self.steps} steps, because it is quantized, "
                f"and is given {x.shape[self.dim]}. Give it {self.steps} (cut, or pad), quantize "
                "with an example of another length, or keep it whole with decompose: false."
            )
        return x

    def extra_repr(self) -> str:
        """The length."""
        return f"steps={self.steps}, dim={self.dim}"


def step(
    kind: str,
    fed: Tensor,
    state: State | None,
    weights: Sequence[Tensor | None],
    note: Callable[[str, Tensor], Tensor],
) -> State:
    """One step of a recurrent layer.

    Args:
        kind: "lstm", "gru", "tanh" or "relu".
        fed: the product with the input and its bias, (..., gates * units).
        state: (h, c) of an LSTM, (h,) of others; None for zeros.
        weights: of the state: weight_hh, bias_hh and weight_hr, None where there is none.
        note: see `Recurrent`, the step left out.

    Returns:
        The new state.
    """
    weight, bias, projection = weights
    back: Tensor | None = bias
    if state is not None:
        assert weight is not None
        before = note(
            "state", state[0].clone()
        )  # what is fed back may be rounded, what is shown not
        back = note("fed_back", F.linear(before, weight, bias))
    if kind == "lstm":
        h, c = _lstm(fed, back, None if state is None else state[1], note)
        if projection is not None:
            h = note("projected", F.linear(h, projection))
        return h, c
    if kind == "gru":
        return (_gru(fed, back, None if state is None else state[0], note),)
    total = fed if back is None else note("gates", fed + back)
    return (note("hidden", total.tanh() if kind == "tanh" else total.relu()),)


def _lstm(
    fed: Tensor, back: Tensor | None, c: Tensor | None, note: Callable[[str, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Hochreiter and Schmidhuber 1997 with forget gates, in torch's order of gates: i, f, g, o."""
    gates = (fed if back is None else note("gates", fed + back)).chunk(4, -1)
    opened = note("input_gate", gates[0].sigmoid())
    new = note("new", opened * note("candidate", gates[2].tanh()))
    if c is not None:
        new = note("cell", note("kept", c * note("forget_gate", gates[1].sigmoid())) + new)
    out = note("output_gate", gates[3].sigmoid())
    return note("hidden", out * note("shown", new.tanh())), new


def _gru(
    fed: Tensor, back: Tensor | None, h: Tensor | None, note: Callable[[str, Tensor], Tensor]
) -> Tensor:
    """Cho et al. 2014 as torch has it: the reset gate multiplies the product with the state."""
    x = fed.chunk(3, -1)
    b: Any = [None] * 3 if back is None else back.chunk(3, -1)
    sums = [x[k] if b[k] is None else note(f"{r}_sum", x[k] + b[k]) for k, r in enumerate("rz")]
    reset, update = (note(f"{r}_gate", s.sigmoid()) for r, s in zip("rz", sums, strict=True))
    new = x[2] if b[2] is None else note("n_sum", x[2] + note("let_in", reset * b[2]))
    new = note("candidate", new.tanh())
    if h is None:
        return note("hidden", new - note("kept", update * new))
    return note("hidden", new + note("kept", update * note("change", h - new)))


def _kind(source: Any) -> str:
    """ "lstm", "gru", or the function of a plain one."""
    name = type(source).__name__.lower().removesuffix("cell")
    return name if name in ("lstm", "gru") else str(source.nonlinearity)
