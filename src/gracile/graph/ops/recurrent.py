"""Recurrent layers: a hidden unit is a row in every gate's block and a column of the recurrence."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import numpy as np
from torch import nn

from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Flow, Labels, Several, Value
from gracile.graph.operands import Operand, operands
from gracile.graph.oprule import Kept, OpRule, Shape, oprule

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Recurrent(OpRule):
    """All layers and directions of one module have one hidden size, so their units are one.

    Channels of the input, hidden units and, if there is one, the projection's outputs are cut.
    """

    gates: ClassVar[int] = 1
    states: ClassVar[int] = 1  # how many a step hands on: 2 for an LSTM
    attributes = (
        "input_size", "hidden_size", "proj_size", "num_layers", "bidirectional", "batch_first",
        "bias",
    )  # fmt: skip

    def roles_of(self, module: Any) -> Sequence[str]:
        """The weights of every layer and direction."""
        return tuple(module._flat_weights_names)

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The same unit of every gate, layer and direction goes."""
        given = operands(node, values, flow, ("input", "hx"))
        data = given.get("input")
        if data is None or data.axes is None or data.shape is None:
            return flow.give_up(node, values, f"'{node.op}' does not read a series of vectors")
        rank, why = len(data.shape), f"the units of '{node.id}'"
        flow.only(data.value, node, (rank - 1,))
        hidden = _units(node, flow, self.gates, node.attrs["hidden_size"])
        out = self._recur(node, flow, hidden)
        fed = flow.along(data.value, node, rank - 1, node.attrs["input_size"])
        steps = [name for name in node.params if name.startswith("weight_ih_l")]
        both = 2 if node.attrs["bidirectional"] else 1
        for name in steps:
            first = name.split("_l")[1].split("_")[0] == "0"
            columns = flow.read(node.params[name], 1)
            flow.tie(fed if first else np.tile(out, both), columns, f"inputs of '{node.id}'")
        states = [out, hidden][: self.states]
        for labels, operand in _initial(given, states):
            last = len(operand.shape or ()) - 1
            flow.only(operand.value, node, (last,))
            flow.tie(labels, flow.along(operand.value, node, last, len(labels)), why)
        lead = (None,) * (rank - 1)
        last_ones = [Axes((*lead, s), "it lies in the batch") for s in states]
        final = last_ones[0] if self.states == 1 else Several(tuple(last_ones))
        return Several((Axes((*lead, np.tile(out, both)), "it lies in time"), final))

    def _recur(self, node: Node, flow: Flow, hidden: Labels) -> Labels:
        """Tie the recurrence; the labels of what a step hands on."""
        out = hidden
        if node.attrs.get("proj_size"):
            made = [n for n in node.params if n.startswith("weight_hr")]
            outs = [flow.written(node.params[n], 0) for n in made]
            for name, labels in zip(made, outs, strict=True):
                flow.tie(flow.read(node.params[name], 1), hidden, f"the units of '{node.id}'")
                flow.tie(outs[0], labels, f"the projection of '{node.id}'")
            out = outs[0]  # torch takes a projection to the hidden size for none
            flow.protect(hidden, f"'{node.id}' needs more hidden units than projected ones")
        for name, address in node.params.items():
            if name.startswith("weight_hh"):
                flow.tie(flow.read(address, 1), out, f"the units of '{node.id}'")
        return out

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Every weight once a step and sample."""
        return _every_weight(inputs, params)

    def resize(self, module: Any, kept: Kept) -> None:
        """Sizes from the weights."""
        module.input_size = module.weight_ih_l0.shape[1]
        module.hidden_size = module.weight_ih_l0.shape[0] // self.gates
        if module.proj_size:
            module.proj_size = module.weight_hr_l0.shape[0]
        module.flatten_parameters()


@oprule("lstm", source="Hochreiter and Schmidhuber 1997; projection: Sak et al. 2014, 1402.1128")
class LSTM(_Recurrent):
    """Long short-term memory, with or without a projection."""

    modules = (nn.LSTM,)
    gates, states = 4, 2


@oprule("gru", source="Cho et al. 2014, arXiv:1406.1078")
class GRU(_Recurrent):
    """Gated recurrent units."""

    modules = (nn.GRU,)
    gates = 3


@oprule("rnn", source="Elman 1990")
class RNN(_Recurrent):
    """A plain recurrent layer, tanh or ReLU."""

    modules = (nn.RNN,)


class _Cell(OpRule):
    """One step."""

    gates: ClassVar[int] = 1
    states: ClassVar[int] = 1
    roles = WEIGHTS
    attributes = ("input_size", "hidden_size", "bias")

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The same unit of every gate goes."""
        given = operands(node, values, flow, ("input", "hx"))
        data = given.get("input")
        if data is None or data.axes is None or data.shape is None:
            return flow.give_up(node, values, f"'{node.op}' does not read vectors")
        last, why = len(data.shape) - 1, f"the units of '{node.id}'"
        flow.only(data.value, node, (last,))
        hidden = _units(node, flow, self.gates, node.attrs["hidden_size"])
        flow.tie(flow.read(node.params["weight_hh"], 1), hidden, why)
        fed = flow.along(data.value, node, last, node.attrs["input_size"])
        flow.tie(fed, flow.read(node.params["weight_ih"], 1), f"the inputs of '{node.id}'")
        for labels, operand in _initial(given, [hidden] * self.states):
            flow.only(operand.value, node, (last,))
            flow.tie(labels, flow.along(operand.value, node, last, len(labels)), why)
        out = Axes(((None,) * last) + (hidden,), "it lies in the batch")
        return out if self.states == 1 else Several((out,) * self.states)

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Both weights once a sample."""
        return _every_weight(inputs, params)

    def resize(self, module: Any, kept: Kept) -> None:
        """Sizes from the weights."""
        module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


@oprule("lstm_cell", source="Hochreiter and Schmidhuber 1997")
class LSTMCell(_Cell):
    """One step of an LSTM."""

    modules = (nn.LSTMCell,)
    gates, states = 4, 2


@oprule("gru_cell", source="Cho et al. 2014, arXiv:1406.1078")
class GRUCell(_Cell):
    """One step of gated recurrent units."""

    modules = (nn.GRUCell,)
    gates = 3


@oprule("rnn_cell", source="Elman 1990")
class RNNCell(_Cell):
    """One step of a plain recurrent layer."""

    modules = (nn.RNNCell,)


def _every_weight(inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
    """Multiply-adds of all weight matrices, once for each vector of the input."""
    if not inputs or inputs[0] is None:
        return 0
    weights = sum(prod(shape) for shape in params.values() if len(shape) == 2)
    return prod(inputs[0][:-1]) * weights


def _units(node: Node, flow: Flow, gates: int, size: int) -> Labels:
    """Labels of the hidden units: all blocks of rows of all weights and biases are tied."""
    units: Labels | None = None
    for name, address in node.params.items():
        if name.startswith("weight_hr"):
            continue
        rows = flow.written(address, 0) if name.startswith("weight") else flow.axis(address, 0)
        for block in np.split(rows, gates):
            if units is None:
                units = block
            flow.tie(units, block, f"the gates of '{node.id}'")
    if units is None or len(units) != size:
        raise ValueError(f"'{node.id}' has no weight with {gates} x {size} rows")
    return units


def _initial(
    given: Mapping[str, Operand], states: Sequence[Labels]
) -> list[tuple[Labels, Operand]]:
    """Initial states that are given, each with the labels of its last dim."""
    names = ("hx.0", "hx.1") if len(states) > 1 else ("hx",)
    found = [(labels, given[n]) for n, labels in zip(names, states, strict=True) if n in given]
    if len(states) > 1 and "hx" in given and isinstance(given["hx"].value, Several):
        parts = given["hx"].value.values
        found = [
            (labels, Operand(v, (0,) * len(v.dims)))
            for labels, v in zip(states, parts, strict=True)
            if isinstance(v, Axes)
        ]
    return found
