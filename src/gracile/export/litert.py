"""Write a model for LiteRT (`.tflite`), node by node, floats as f32, integers as ours.

LiteRT's own converter (litert-torch 0.10) is not used: its pins cannot be installed beside what
the rest of gracile needs, and it chooses grids and tensors' names by itself.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from gracile.benchmark.artifact import (
    KEY,
    UNIT_MARK,
    Artifact,
    artifact_path,
    content_sha,
    facts,
)
from gracile.benchmark.tflite import FLOAT32, IMAGE, INT8, INT32, Grid, add_facts, schema, write
from gracile.core.plan import Plan
from gracile.core.state import write_atomic
from gracile.errors import UserError
from gracile.export.litert_layers import EMIT
from gracile.export.litert_steps import Step, Value, in_integers, live, moved, with_activations
from gracile.export.plain import (
    Dims,
    NotPlain,
    check_in_place,
    dims_of,
    emitter,
    read_call,
    returned,
    sample_sizes,
)
from gracile.export.prepare import DYNAMIC, UNIT, ActivationGrid, Prepared, described, prepare
from gracile.graph.capture import as_inputs
from gracile.graph.instrument import SUFFIX
from gracile.registry import register

OPTIONS = {  # operators whose options are not named after them
    "CONV_2D": "Conv2D", "DEPTHWISE_CONV_2D": "DepthwiseConv2D", "MAX_POOL_2D": "Pool2D",
    "AVERAGE_POOL_2D": "Pool2D", "MEAN": "Reducer", "BATCH_MATMUL": "BatchMatMul", "PADV2": "PadV2",
    "MINIMUM": "MaximumMinimum", "MAXIMUM": "MaximumMinimum",
    "RESIZE_NEAREST_NEIGHBOR": "ResizeNearestNeighbor",
}  # fmt: skip
WITHOUT_OPTIONS = ("LOGISTIC", "TANH", "RELU", "RELU6", "RELU_N1_TO_1", "ELU")


@register("exporter", "litert", source="https://ai.google.dev/edge/litert")
def export_litert(
    model: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    example: Tensor | tuple[Tensor, ...],
    path: str | Path,
    metadata: Mapping[str, Any],
) -> Artifact:
    """Write `path` (`.tflite`, or a folder); inputs and outputs are ordered as in PyTorch.

    Raises:
        UserError: the model cannot be captured, LiteRT has no such operator, or a grid is not one
            of 8 bits.
        MissingExtra: the runtime's package, which has the format's classes, is not installed.
    """
    schema()
    prepared = prepare(model, plan, tensors, example)
    batch = as_inputs(example)
    try:
        writer = Writer(prepared, dims_of(prepared.module, [x.cpu() for x in batch]))
        writer.write_all()
    except NotPlain as e:
        raise UserError(
            f"LiteRT has no operator for {e}, or none that fits. Replace it in the forward, or "
            "export to another runtime: openvino and onnxruntime know more operators."
        ) from None
    path = artifact_path(path, "litert")
    prepared.floats.update(writer.floats)
    metadata = described(metadata, prepared)
    precision = "mixed" if writer.floats and prepared.precision == "int8" else prepared.precision
    values = facts(precision, prepared.inputs, prepared.units, metadata)
    outputs = list(dict.fromkeys(writer.outputs))
    values[f"{KEY}.outputs"] = json.dumps([outputs.index(x) for x in writer.outputs])
    file = _file(writer.inputs, writer.steps, outputs)
    add_facts(file, values)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, write(file))
    return Artifact(
        path=path,
        runtime="litert",
        sha=content_sha(path),
        precision=precision,
        inputs=prepared.inputs,
        units=prepared.units,
        metadata=metadata,
    )


class Writer:
    """The operators of a prepared model, as far as they are written.

    Attributes:
        names: fx node -> its tensor; a list where it makes several.
        dims: fx node -> dims of its output with the batch, in PyTorch's order.
        steps: the operators so far.
        inputs: what the network is given.
        outputs: what it returns, in order.
        floats: address of a weight that was asked to be quantized and stays float -> reason.
    """

    def __init__(self, prepared: Prepared, dims: Mapping[fx.Node, Dims | None]):
        self.prepared, self.module, self.dims = prepared, prepared.module, dims
        self.names: dict[fx.Node, Any] = {}
        self.steps: list[Step] = []
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.floats: dict[str, str] = {}
        self._as_floats: dict[Value, Value] = {}

    def write_all(self) -> None:
        """Write all nodes, then join what LiteRT computes as one."""
        names = iter(name for name, _ in self.prepared.inputs)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.names[node] = self._input(node, next(names))
            elif node.op == "output":
                self.outputs = [self._returned(n) for n in returned(node)]
            else:
                self.names[node] = self._write(node)
        steps = with_activations(self.steps, self.outputs)
        steps, instead = moved(steps)
        self.outputs = [instead.get(x, x) for x in self.outputs]
        self.steps = live(in_integers(steps, self.outputs, self.floats), self.outputs)

    def add(
        self,
        type: str,
        inputs: Sequence[Value],
        shape: Sequence[int],
        kind: int = FLOAT32,
        grid: Grid | None = None,
        **options: Any,
    ) -> Value:
        """One operator; its result, of `shape` in the file's order with batch 1."""
        made = Value(f"_{len(self.steps)}", tuple(shape), kind, grid)
        self.steps.append(Step(type, list(inputs), [made], options))
        return made

    def constant(self, value: Any, kind: Any = np.float32) -> Value:
        """A stored tensor."""
        data = np.ascontiguousarray(np.asarray(value, kind))
        type = {np.float32: FLOAT32, np.int32: INT32, np.int8: INT8}[kind]
        return Value("", data.shape, type, data=data)

    def float(self, node: fx.Node) -> Value:
        """The tensor of an fx node in floats."""
        x = self.raw(node)
        if x.grid is None:
            return x
        if x not in self._as_floats:
            self._as_floats[x] = self.add("DEQUANTIZE", [x], x.shape)
        return self._as_floats[x]

    def raw(self, node: fx.Node) -> Value:
        """The tensor of an fx node, integers where it is on a grid."""
        x = self.names.get(node)
        if not isinstance(x, Value):
            raise NotPlain(f"'{node}', which is not one tensor of each sample")
        return x

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a node's output without the batch, in PyTorch's order."""
        return sample_sizes(self.dims, node)

    def reshaped(self, x: Value, shape: Sequence[int]) -> Value:
        """The same numbers in other dims; the batch is free."""
        return self.add("RESHAPE", [x, self.constant((-1, *shape[1:]), np.int32)], shape)

    def transposed(self, x: Value, order: Sequence[int]) -> Value:
        """Axes in another order."""
        if list(order) == sorted(order):
            return x
        to = self.constant(order, np.int32)
        return self.add("TRANSPOSE", [x, to], [x.shape[k] for k in order])

    def plain(self, x: Value) -> Value:
        """In PyTorch's order."""
        return x if len(x.shape) != IMAGE else self.transposed(x, (0, 3, 1, 2))

    def image(self, x: Value) -> Value:
        """From PyTorch's order to the file's."""
        return x if len(x.shape) != IMAGE else self.transposed(x, (0, 2, 3, 1))

    def _input(self, node: fx.Node, name: str) -> Value:
        numbers = any(read_call(self.module, u).op == "embedding" for u in node.users)
        x = Value(name, (1, *self.shape(node)), INT32 if numbers else FLOAT32)
        self.inputs.append(x)
        return self.image(x)

    def _returned(self, node: fx.Node) -> Value:
        x = self.plain(self.float(node))
        # What is given back must be computed, and must not be a unit's tensor in another order.
        return self._copied(x) if x in self.inputs else x

    def _copied(self, x: Value) -> Value:
        return self.reshaped(x, x.shape)

    def _mark(self, name: str, node: fx.Node) -> Value:
        """The end of a unit: its tensor gets the unit's name, and its grid if it has one."""
        if name.startswith(DYNAMIC):
            raise UserError(
                f"'{name.removeprefix(DYNAMIC)}' finds its range as the network runs, which this "
                "exporter cannot write for LiteRT: use quantize: ptq, or another runtime."
            )
        source = node.all_input_nodes[0]
        if not name.startswith(UNIT):
            return self.raw(source)
        id = name.removeprefix(UNIT)
        grid = self.prepared.activations.get(id.removesuffix(SUFFIX))
        x = self.float(source)
        if grid is not None:
            x = self._on_grid(id, x, grid)
        elif x.unit or x in self.inputs or self.raw(source).grid is not None:
            x = self._copied(x)
        x.name, x.unit = id, True
        return x

    def _on_grid(self, id: str, x: Value, grid: ActivationGrid) -> Value:
        """The integers of a tensor; LiteRT's have a sign, so those without one move by 128."""
        move = 0 if grid.signed else 128
        low, high = grid.qmin - move, grid.qmax - move
        if low < -128 or high > 127:
            sign = "int" if grid.signed else "uint"
            raise UserError(
                f"LiteRT's integers have 8 bits, but '{id}' is on a grid of {sign}{grid.bits} "
                f"({grid.qmin}..{grid.qmax})."
            )
        found = Grid(float(np.float32(grid.scale)), grid.zero_point - move)
        q = self.add("QUANTIZE", [x], x.shape, INT8, found)
        for kind, end, given in (("MINIMUM", high, 127), ("MAXIMUM", low, -128)):
            if end != given:
                limit = self.constant(np.full([1] * len(x.shape), end), np.int8)
                limit.grid = found
                q = self.add(kind, [q, limit], x.shape, INT8, found)
        return q

    def _write(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return None  # whoever reads it stores it in his own form
        call = read_call(self.module, node)
        if call.op == "size":
            return None
        if call.op == "mark":
            if node.all_input_nodes[0].op == "get_attr":
                return None
            return self._mark(call.attrs["name"], node)
        emit = emitter(EMIT, call)
        check_in_place(node, call)
        return emit(self, node, call)


def _file(inputs: Sequence[Value], steps: Sequence[Step], outputs: Sequence[Value]) -> Any:
    """The whole network as the format's objects."""
    kinds = schema()
    model, graph = kinds.ModelT(), kinds.SubGraphT()
    model.version, model.description, model.buffers = 3, "gracile", [kinds.BufferT()]
    model.operatorCodes, model.subgraphs = [], [graph]
    graph.name, graph.tensors, graph.operators = "main", [], []
    _named(steps)
    at: dict[Value, int] = {}
    for x in (*inputs, *(x for s in steps for x in (*s.inputs, *s.outputs))):
        if x not in at:
            at[x] = len(graph.tensors)
            graph.tensors.append(_tensor(kinds, model, x))
    codes: dict[str, int] = {}
    for step in steps:
        if step.type not in codes:
            codes[step.type] = len(codes)
            code = kinds.OperatorCodeT()
            code.builtinCode = getattr(kinds.BuiltinOperator, step.type)
            code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), 1
            model.operatorCodes.append(code)
        op = kinds.OperatorT()
        op.opcodeIndex = codes[step.type]
        op.inputs = np.array([at[x] for x in step.inputs], np.int32)
        op.outputs = np.array([at[x] for x in step.outputs], np.int32)
        if step.type not in WITHOUT_OPTIONS:
            name = OPTIONS.get(step.type) or "".join(p.title() for p in step.type.split("_"))
            op.builtinOptionsType = getattr(kinds.BuiltinOptions, f"{name}Options")
            op.builtinOptions = getattr(kinds, f"{name}OptionsT")()
            for key, value in step.options.items():
                setattr(op.builtinOptions, key, value)
        graph.operators.append(op)
    graph.inputs = np.array([at[x] for x in inputs], np.int32)
    graph.outputs = np.array([at[x] for x in outputs], np.int32)
    return model


def _tensor(kinds: Any, model: Any, x: Value) -> Any:
    tensor = kinds.TensorT()
    tensor.name, tensor.type = x.name, x.type
    tensor.shape = np.array(x.shape, np.int32)
    if x.data is None:
        tensor.shapeSignature = np.array((-1, *x.shape[1:]), np.int32)
        tensor.hasRank = True
    else:
        tensor.buffer = len(model.buffers)
        buffer = kinds.BufferT()
        buffer.data = np.frombuffer(x.data.tobytes(), np.uint8)
        model.buffers.append(buffer)
    scales = x.scales if x.grid is None else np.array([x.grid.scale], np.float32)
    if scales is not None:
        q = kinds.QuantizationParametersT()
        q.scale = scales
        zero = 0 if x.grid is None else x.grid.zero_point
        q.zeroPoint = np.full(len(scales), zero, np.int64)
        q.quantizedDimension = x.axis
        tensor.quantization = q
    return tensor


def _named(steps: Sequence[Step]) -> None:
    """Names that say which unit an operator works for: the first one downstream."""
    works_for: dict[Value, str] = {}
    for k, step in reversed(list(enumerate(steps))):
        unit = next((x.name for x in step.outputs if x.unit), None)
        unit = unit or next((works_for[x] for x in step.outputs if x in works_for), "")
        for n, x in enumerate(step.outputs):
            x.name = x.name if x.unit else f"{unit}{UNIT_MARK}{step.type}{k}.{n}"
        for n, x in enumerate(step.inputs):
            works_for.setdefault(x, "" if x.unit else unit)
            if x.data is not None and not x.name:
                x.name = f"{unit}{UNIT_MARK}{step.type}{k}.stored{n}"
