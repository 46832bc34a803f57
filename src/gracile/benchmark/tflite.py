"""LiteRT's file as data: a flatbuffer of tensors and operators, read and written whole.

Tensors of four dims have their channels last. Format:
https://github.com/google-ai-edge/LiteRT/blob/main/tflite/converter/schema/schema.fbs
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from gracile.errors import MissingExtra

Array = np.ndarray[Any, Any]
IDENTIFIER = b"TFL3"
FLOAT32, INT32, INT64, INT8 = 0, 2, 4, 9  # the format's numbers of types
TYPES: Mapping[int, Any] = {FLOAT32: np.float32, INT32: np.int32, INT64: np.int64, INT8: np.int8}
ALIGNED = 16  # bytes, as kernels want numbers to lie
FED = ".fed"  # what readers of a unit read instead of it
IMAGE = 4  # dims of a tensor whose channels are last


@dataclass(frozen=True)
class Grid:
    """Integers of a tensor: x ~ (q - zero_point) * scale."""

    scale: float
    zero_point: int


def schema() -> Any:
    """The classes of the format.

    Raises:
        MissingExtra: the package is not installed.
    """
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError:
        raise MissingExtra("LiteRT", "litert") from None
    return schema_py_generated


def read(content: bytes) -> Any:
    """A file as a tree of objects.

    Raises:
        ValueError: it is none, or a part of it is missing.
        MissingExtra: the package is not installed.
    """
    kinds = schema()
    if content[4:8] != IDENTIFIER:
        raise ValueError("it does not begin as a LiteRT file does")
    try:
        model = kinds.ModelT.InitFromPackedBuf(content)
        if not model.subgraphs or model.buffers is None or model.operatorCodes is None:
            raise ValueError("it has no network")
        for op in model.subgraphs[0].operators:
            model.operatorCodes[op.opcodeIndex]
    except ValueError:
        raise
    except Exception as e:  # whatever a wrong offset leads to
        raise ValueError(f"a part of it is missing or damaged ({type(e).__name__})") from None
    return model


def write(model: Any) -> bytes:
    """The file of a tree of objects."""
    import flatbuffers

    model.buffers = [_aligned()(b.data) for b in model.buffers]
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


@cache
def _aligned() -> Any:
    """A buffer whose numbers lie at a multiple of 16 bytes, which the generated one ignores."""
    kinds = schema()
    base: Any = kinds.BufferT

    class Aligned(base):  # type: ignore[misc]
        def __init__(self, data: Any):
            super().__init__()
            self.data = None if data is None else np.asarray(data, np.uint8).tobytes()

        def Pack(self, builder: Any) -> Any:
            at = None
            if self.data is not None:
                builder.StartVector(1, len(self.data), ALIGNED)
                builder.head -= len(self.data)
                builder.Bytes[builder.head : builder.head + len(self.data)] = self.data
                at = builder.EndVector()
            kinds.BufferStart(builder)
            if at is not None:
                kinds.BufferAddData(builder, at)
            return kinds.BufferEnd(builder)

    return Aligned


def facts_of(model: Any) -> dict[str, str]:
    """The texts in a file's metadata."""
    out: dict[str, str] = {}
    for entry in model.metadata or []:
        data = model.buffers[entry.buffer].data
        with suppress(UnicodeDecodeError):  # another tool's, of other things than text
            out[_text(entry.name)] = "" if data is None else bytes(bytearray(data)).decode()
    return out


def add_facts(model: Any, values: Mapping[str, str]) -> None:
    """Write texts into a file's metadata."""
    kinds = schema()
    model.metadata = list(model.metadata or [])
    for name, text in values.items():
        entry, buffer = kinds.MetadataT(), kinds.BufferT()
        entry.name, entry.buffer = name, len(model.buffers)
        buffer.data = np.frombuffer(text.encode(), np.uint8)
        model.buffers.append(buffer)
        model.metadata.append(entry)


def name_of(tensor: Any) -> str:
    """A tensor's name."""
    return _text(tensor.name)


def grid_of(tensor: Any) -> Grid | None:
    """The grid of a tensor of integers with one scale; None for others."""
    q = tensor.quantization
    if tensor.type != INT8 or q is None or q.scale is None or len(q.scale) != 1:
        return None
    return Grid(float(q.scale[0]), int(q.zeroPoint[0]))


def type_of(model: Any, op: Any) -> str:
    """An operator's name as the format has it, `CONV_2D`."""
    code = model.operatorCodes[op.opcodeIndex]
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    return _numbers()[number]


@cache
def _numbers() -> dict[int, str]:
    kinds = schema().BuiltinOperator
    return {v: k for k, v in vars(kinds).items() if isinstance(v, int)}


def inputs_of(model: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, shape) of each input."""
    graph = model.subgraphs[0]
    tensors = (graph.tensors[i] for i in graph.inputs)
    return tuple((name_of(t), tuple(int(n) for n in t.shape)) for t in tensors)


def works_for(graph: Any, ids: Collection[str]) -> list[str]:
    """The unit that each operator works for: the first one downstream; "" for none."""
    wanted: dict[int, str] = {}
    out = []
    for op in reversed(graph.operators):
        names = [name_of(graph.tensors[t]) for t in op.outputs]
        unit = next((n for n in names if n in ids), None)
        unit = unit or next((wanted[t] for t in op.outputs if t in wanted), "")
        for t in op.inputs:
            if t >= 0 and name_of(graph.tensors[t]) not in ids:
                wanted.setdefault(int(t), unit)
        out.append(unit)
    return out[::-1]


def readable(content: bytes, ids: Iterable[str], fed: bool) -> bytes:
    """The network with every unit as an output; with `fed`, cut behind each of them.

    Whoever reads the tensor of a unit then reads an input, named `<unit>.fed`.
    """
    kinds, model = schema(), read(content)
    graph = model.subgraphs[0]
    at = {name_of(t): k for k, t in enumerate(graph.tensors)}
    units = [at[id] for id in ids]
    inputs = list(graph.inputs)
    given: dict[int, int] = {}
    for k in units if fed else ():
        tensor, old = kinds.TensorT(), graph.tensors[k]
        tensor.shape, tensor.shapeSignature = old.shape, old.shapeSignature
        tensor.type, tensor.quantization = old.type, old.quantization
        tensor.hasRank, tensor.name = old.hasRank, name_of(old) + FED
        given[k] = len(graph.tensors)
        graph.tensors.append(tensor)
    for op in graph.operators:
        op.inputs = np.array([given.get(int(t), t) for t in op.inputs], np.int32)
    read_now = {int(t) for op in graph.operators for t in op.inputs}
    graph.inputs = np.array(inputs + [t for t in given.values() if t in read_now], np.int32)
    graph.outputs = np.array(list(dict.fromkeys(units)), np.int32)
    model.signatureDefs = None
    return write(model)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value or "")
