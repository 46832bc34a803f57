"""The operators of a LiteRT network as far as it is written, and what joins them into integers.

A network is written in floats, with a QUANTIZE where a tensor is put on its grid and a DEQUANTIZE
where it is read. `integers` then moves what only moves values before the DEQUANTIZE, and joins
DEQUANTIZE, an operator and QUANTIZE into one operator of integers, where LiteRT has it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gracile.benchmark.tflite import FLOAT32, INT8, INT32, Grid
from gracile.export.integers import WeightGrid

Array = np.ndarray[Any, Any]
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
SUMS = ("ADD", "SUB", "MUL")
FREE = ("MEAN",)  # any grid for what it reads and for its result
ONE_GRID = ("AVERAGE_POOL_2D",)  # the same for both
MOVES = (
    "RESHAPE", "TRANSPOSE", "STRIDED_SLICE", "PAD", "PADV2", "MAX_POOL_2D", "CONCATENATION",
    "GATHER",
)  # fmt: skip
ACTIVATIONS = {"RELU": 1, "RELU_N1_TO_1": 2, "RELU6": 3}  # how an operator names them
LOWEST = -128
BIAS_MAX = 2**30  # leaves room for the sum of products


@dataclass(eq=False)
class Value:
    """A tensor of the file, with batch 1.

    Attributes:
        shape: in the file's order: channels last where there are four dims.
        type: the format's number.
        grid: of activations in integers.
        data: a stored tensor's numbers.
        scales: of a stored tensor in integers, one for each index of `axis`.
        unit: whether it is the tensor of a unit; its name is the unit's then.
    """

    name: str
    shape: tuple[int, ...]
    type: int = FLOAT32
    grid: Grid | None = None
    data: Array | None = None
    scales: Array | None = None
    axis: int = 0
    unit: bool = False


@dataclass(frozen=True)
class Weight:
    """What a layer needs to become one of integers.

    Attributes:
        address: of the weight.
        grid: its integers, in PyTorch's order.
        arranged: PyTorch's order -> the file's.
        axis: of outputs, in the file's order.
        bias: in floats.
    """

    address: str
    grid: WeightGrid
    arranged: Callable[[Tensor], Tensor]
    axis: int
    bias: Array


@dataclass(eq=False)
class Step:
    """One operator; what it reads first are tensors of activations."""

    type: str
    inputs: list[Value]
    outputs: list[Value]
    options: dict[str, Any] = field(default_factory=dict)
    weight: Weight | None = None


def with_activations(steps: Sequence[Step], outputs: Sequence[Value]) -> list[Step]:
    """Activations become part of the operator before them."""
    readers, maker, out = _readers(steps, outputs), _makers(steps), []
    for step in steps:
        code = ACTIVATIONS.get(step.type)
        x = step.inputs[0] if step.inputs else None
        before = maker.get(x) if x is not None else None
        if (
            code is None
            or before is None
            or x is None
            or before.type not in (*WEIGHTED, *SUMS)
            or before.options.get("fusedActivationFunction")
            or readers[x] != 1
            or x.unit
        ):
            out.append(step)
            continue
        before.options["fusedActivationFunction"] = code
        before.outputs = step.outputs
        maker[step.outputs[0]] = before
    return out


def moved(steps: Sequence[Step]) -> tuple[list[Step], dict[Value, Value]]:
    """What only moves values does so with integers; what is on its grid already is not rounded.

    Returns:
        The steps, and which tensors are now which others.
    """
    integer: dict[Value, Value] = {}
    instead: dict[Value, Value] = {}
    out: list[Step] = []
    for step in steps:
        step.inputs = [instead.get(x, x) for x in step.inputs]
        whole = [integer.get(x) for x in _data(step)]
        grids = {x.grid for x in whole if x is not None}
        if step.type == "DEQUANTIZE":
            integer[step.outputs[0]] = step.inputs[0]
        elif step.type == "QUANTIZE" and whole[0] is not None:
            target, x = step.outputs[0], whole[0]
            if x.grid == target.grid and not x.unit:
                x.name, x.unit = target.name, target.unit
                instead[target] = x
                continue
        elif step.type in MOVES and None not in whole and len(grids) == 1:
            made = step.outputs[0]
            (grid,) = grids
            as_integers = Value(made.name, made.shape, INT8, grid, unit=made.unit)
            made.name, made.unit = f"{made.name}.floats", False
            rest = [_as_level(x, step, grid) for x in step.inputs[len(whole) :]]
            step.inputs = [*(x for x in whole if x is not None), *rest]
            step.outputs = [as_integers]
            out += [step, Step("DEQUANTIZE", [as_integers], [made])]
            integer[made] = as_integers
            continue
        out.append(step)
    return out, instead


def _as_level(x: Value, step: Step, grid: Grid | None) -> Value:
    """The number that a padding of integers fills in."""
    if step.type != "PADV2" or x.type != FLOAT32 or x.data is None or grid is None:
        return x
    level = round(float(x.data.flat[0]) / grid.scale) + grid.zero_point
    data = np.full(x.shape, np.clip(level, -128, 127), np.int8)
    return Value(f"{x.name}.level", x.shape, INT8, grid, data)


def in_integers(
    steps: Sequence[Step], outputs: Sequence[Value], floats: dict[str, str]
) -> list[Step]:
    """Operators between DEQUANTIZE and QUANTIZE compute in integers where LiteRT does.

    Args:
        floats: address of a weight that stays in floats -> why; is added to.
    """
    readers, maker = _readers(steps, outputs), _makers(steps)
    integer = {s.outputs[0]: s.inputs[0] for s in steps if s.type == "DEQUANTIZE"}
    gone: set[int] = set()
    for q in steps:
        x = q.inputs[0] if q.inputs else None
        step = maker.get(x) if q.type == "QUANTIZE" and x is not None else None
        if step is None or x is None or readers[x] != 1 or x.unit:
            continue
        whole = [integer.get(v) for v in _data(step)]
        target = q.outputs[0]
        if None in whole or target.grid is None or not _fits(step, whole, target.grid):
            continue
        given = [v for v in whole if v is not None]
        if step.weight is not None:
            made = _weights(step.weight, given[0], target.grid)
            if isinstance(made, str):
                floats[step.weight.address] = made
                continue
            step.inputs = [given[0], *made]
            step.weight = None
        else:
            step.inputs[: len(given)] = given
        step.outputs = [target]
        gone.add(id(q))
    for step in steps:
        if step.weight is not None:
            on_grid = _data(step)[0] in integer
            floats.setdefault(
                step.weight.address,
                "what its layer computes is not quantized behind it, or behind an operator that "
                "LiteRT cannot join with it"
                if on_grid
                else "what its layer reads is not quantized, and LiteRT has no such kernel",
            )
    return [s for s in steps if id(s) not in gone]


def live(steps: Sequence[Step], outputs: Sequence[Value]) -> list[Step]:
    """Without what nobody reads."""
    wanted, kept = set(outputs), []
    for step in reversed(steps):
        if wanted & {*step.outputs} or any(x.unit for x in step.outputs):
            kept.append(step)
            wanted.update(step.inputs)
    return kept[::-1]


def _data(step: Step) -> list[Value]:
    """The tensors that an operator computes with, without sizes and weights."""
    if step.type in (*SUMS, "CONCATENATION"):
        return step.inputs
    return step.inputs[:1]


def _fits(step: Step, given: Sequence[Value | None], target: Grid) -> bool:
    if step.type in WEIGHTED:
        return step.weight is not None
    if step.type in ONE_GRID:
        return all(x is not None and x.grid == target for x in given)
    return step.type in (*SUMS, *FREE)


def _weights(weight: Weight, x: Value, target: Grid) -> list[Value] | str:
    """Stored weight and bias of a layer of integers, or why it cannot be one."""
    grid = weight.grid
    if grid.group is not None:
        return "LiteRT's integer weights have one scale for each output"
    q = grid.q - grid.zero_point.reshape(-1, *[1] * (grid.q.ndim - 1))
    if int(q.abs().max()) > 127:
        return "its integers do not fit -127..127 without a zero point"
    if x.grid is None:
        return "what its layer reads is not quantized, and LiteRT has no such kernel"
    out = q.shape[0]
    scales = grid.scale.detach().double().reshape(-1).expand(out).clone()
    empty = q.reshape(out, -1).abs().amax(1) == 0
    scales[empty] = scales.max()  # any scale is right for a channel of zeros
    steps = scales.float().double().numpy() * float(np.float32(x.grid.scale))
    bias = np.rint(weight.bias.astype(np.float64) / steps)
    if np.abs(bias).max(initial=0) > BIAS_MAX or (steps / target.scale).min() < 2**-32:
        return "its bias is too large for 32 bits in steps of its scale"
    data = weight.arranged(q.to(torch.int8)).contiguous().numpy()
    return [
        Value(weight.address, data.shape, INT8, data=data, scales=scales.float().numpy(),
              axis=weight.axis),
        Value(f"{weight.address}.bias", bias.shape, INT32, data=bias.astype(np.int32),
              scales=steps.astype(np.float32)),
    ]  # fmt: skip


def _readers(steps: Sequence[Step], outputs: Sequence[Value]) -> Mapping[Value, int]:
    counts: dict[Value, int] = {}
    for x in (*(x for s in steps for x in (*s.inputs, *s.outputs)), *outputs):
        counts[x] = counts.get(x, 0) + 1
    for x in (x for s in steps for x in s.outputs):
        counts[x] -= 1
    return counts


def _makers(steps: Sequence[Step]) -> dict[Value, Step]:
    return {x: s for s in steps for x in s.outputs}
