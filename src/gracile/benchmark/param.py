"""ncnn's two files as data: layers in text (`.param`), their numbers in order (`.bin`).

The text is a magic number, two counts and a line for each layer. ncnn reads as many lines as it was
told and no further, so what gracile knows about a file stands behind them, a line for each fact.
Format: https://github.com/Tencent/ncnn/wiki/param-and-model-file-structure
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

MAGIC = "7767517"
WITH_INTEGERS = ("Convolution", "ConvolutionDepthWise", "InnerProduct")
INT8_TERM = 8  # key of their parameter that says whether their weights are integers
ARRAY = -23300  # keys of lists: this less the key, and the list begins with its length
FLOAT_TAG, INT8_TAG = 0, 0x000D4B38
Value = int | float | tuple[int | float, ...]


@dataclass(frozen=True)
class Layer:
    """One line of a network.

    Attributes:
        type: ncnn's name of the operator.
        name: any text without spaces.
        inputs, outputs: names of tensors ("blobs"); each is read by one layer at most.
        params: key -> value, see ncnn's table of operators.
        data: what it adds to the `.bin`; empty when the text alone was read.
    """

    type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: Mapping[int, Value] = field(default_factory=dict)
    data: bytes = field(default=b"", repr=False)

    @property
    def in_integers(self) -> bool:
        """Whether it multiplies integers."""
        return self.type in WITH_INTEGERS and bool(self.params.get(INT8_TERM, 0))


def write(layers: Sequence[Layer], facts: Mapping[str, str] | None = None) -> str:
    """The text of a network, with facts behind it.

    >>> print(write([Layer("Input", "x", (), ("x",), {0: 4}), Layer("ReLU", "r", ("x",), ("y",))]))
    7767517
    2 2
    Input x 0 1 x 0=4
    ReLU r 1 1 x y
    <BLANKLINE>
    """
    blobs = sum(len(x.outputs) for x in layers)
    lines = [MAGIC, f"{len(layers)} {blobs}"]
    for x in layers:
        counts = (str(len(x.inputs)), str(len(x.outputs)))
        params = (_entry(k, v) for k, v in x.params.items())
        lines.append(" ".join((x.type, x.name, *counts, *x.inputs, *x.outputs, *params)))
    lines += [f"{key} {json.dumps(value)}" for key, value in (facts or {}).items()]
    return "\n".join(lines) + "\n"


def read(text: str) -> tuple[list[Layer], dict[str, str]]:
    """The layers and the facts behind them; the inverse of `write` but for the data.

    Raises:
        ValueError: it is no such text.
    """
    lines = text.splitlines()
    if len(lines) < 2 or lines[0].strip() != MAGIC:
        raise ValueError(f"it does not begin with {MAGIC}")
    count = int(lines[1].split()[0])
    if len(lines) < 2 + count:
        raise ValueError(f"{count} layers are announced, {len(lines) - 2} are there")
    facts = {}
    for line in lines[2 + count :]:
        key, _, value = line.partition(" ")
        if key.strip():
            facts[key] = str(json.loads(value))
    return [_layer(line) for line in lines[2 : 2 + count]], facts


def numbers(values: Any) -> bytes:
    """Floats as a `.bin` holds them where no tag is asked for."""
    return np.ascontiguousarray(values, np.float32).tobytes()


def tagged(values: np.ndarray[Any, Any]) -> bytes:
    """A layer's weights as a `.bin` holds them: how they are stored, then integers or floats."""
    if values.dtype != np.int8:
        return struct.pack("<I", FLOAT_TAG) + numbers(values)
    data = np.ascontiguousarray(values).tobytes()
    return struct.pack("<I", INT8_TAG) + data + bytes(-len(data) % 4)


def readable(names: Sequence[str], layers: Sequence[Layer]) -> list[Layer]:
    """Layers in which what reads a named tensor reads an input of its own, ``<name>.fed``."""
    given = set(names)
    fed = {b for x in layers for b in x.inputs if b in given}
    first = [Layer("Input", f"{b}.fed", (), (f"{b}.fed",)) for b in sorted(fed)]
    return [
        *first,
        *(
            replace(x, inputs=tuple(f"{b}.fed" if b in fed else b for b in x.inputs))
            for x in layers
        ),
    ]


def _entry(key: int, value: Value) -> str:
    if isinstance(value, tuple):
        return f"{ARRAY - key}={','.join((str(len(value)), *map(_number, value)))}"
    return f"{key}={_number(value)}"


def _number(value: int | float) -> str:
    return f"{value:.9e}" if isinstance(value, float) else str(int(value))


def _layer(line: str) -> Layer:
    kind, name, n_in, n_out, *rest = line.split()
    into, out = int(n_in), int(n_in) + int(n_out)
    if len(rest) < out:
        raise ValueError(f"the line of '{name}' is too short")
    return Layer(kind, name, tuple(rest[:into]), tuple(rest[into:out]), _params(rest[out:]))


def _params(entries: Sequence[str]) -> dict[int, Value]:
    params: dict[int, Value] = {}
    for entry in entries:
        key, _, text = entry.partition("=")
        numbers: list[Any] = [_parsed(t) for t in text.split(",")]
        if int(key) <= ARRAY:
            params[ARRAY - int(key)] = tuple(numbers[1:])
        elif len(numbers) > 1:  # lists are also written without their length
            params[int(key)] = tuple(numbers)
        else:
            params[int(key)] = numbers[0]
    return params


def _parsed(text: str) -> int | float | str:
    if text.startswith('"'):
        return text
    return float(text) if any(c in text for c in ".eE") else int(text)
