"""Write a model as ONNX: integer weights and biases, a Q/DQ pair on every quantized tensor.

The network is written with its marks (`direct`, or torch's exporter); the passes below turn the
marks into named tensors and QuantizeLinear/DequantizeLinear, in the form that ONNX Runtime and
OpenVINO fuse completely: a pair behind every operator, also behind those that only move values,
weights and biases as integers, none of them shared. Layers that quantize what they read as they run
are written in the form of which ONNX Runtime makes one DynamicQuantizeMatMul.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gracile.benchmark.artifact import UNIT_MARK, Artifact, artifact_path, content_sha, facts
from gracile.core.plan import Plan
from gracile.core.state import write_atomic_with
from gracile.errors import MissingExtra, UserError
from gracile.export.direct import to_proto
from gracile.export.integers import WeightGrid
from gracile.export.plain import NotPlain
from gracile.export.prepare import (
    BIAS,
    DYNAMIC,
    UNIT,
    WEIGHT,
    ActivationGrid,
    Prepared,
    described,
    prepare,
    with_wider,
)
from gracile.graph.capture import as_inputs
from gracile.registry import register

OPSET = 21
# Operators that hand integers on unchanged: their output is on their input's grid.
AGNOSTIC = (
    "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad", "Gather",
)  # fmt: skip
LAYER_OPS = ("Conv", "ConvTranspose", "Gemm")
HIDDEN = "_"
BIAS_LIMIT = 2**30  # leaves a bit of head-room for the sum it is added to
FINE_BITS = 7  # of a grid on whose steps a bias may be rounded; 7 of weights with half their range


@register("exporter", "onnxruntime", source="ONNX opset 21; torch.onnx")
def export_onnx(
    model: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    example: Tensor | tuple[Tensor, ...],
    path: str | Path,
    metadata: Mapping[str, Any],
) -> Artifact:
    """Write `path` (`.onnx`, or a folder); batch is free, units and facts are stored in the file.

    Raises:
        UserError: the model cannot be captured, or torch's exporter refuses it.
        MissingExtra: onnx or onnxscript is not installed.
    """
    import onnx

    prepared, proto = to_onnx(model, plan, tensors, example)
    path = artifact_path(path, "onnxruntime")
    bits = dict.fromkeys(prepared.of_one_bit, "ONNX Runtime has no kernel of one bit")
    metadata = with_wider(described(metadata, prepared), bits)
    stored = facts(prepared.precision, prepared.inputs, prepared.units, metadata)
    onnx.helper.set_model_props(proto, stored)
    onnx.checker.check_model(proto, full_check=True)
    write_atomic_with(path, lambda tmp: onnx.save(proto, tmp))
    return Artifact(
        path=path,
        runtime="onnxruntime",
        sha=content_sha(path),
        precision=prepared.precision,
        inputs=prepared.inputs,
        units=prepared.units,
        metadata=metadata,
    )


def to_onnx(
    model: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    example: Tensor | tuple[Tensor, ...],
) -> tuple[Prepared, Any]:
    """The prepared model and its finished ``onnx.ModelProto``, not yet written."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingExtra("exporting to ONNX", "onnx") from None
    prepared = prepare(model, plan, tensors, example)
    proto = _trace(prepared, example)
    edit = _Editor(proto.graph)
    _pools(edit)
    _orders(edit)
    _unit_marks(edit, prepared)
    _weight_marks(edit, prepared)
    _spread(edit)
    _bias_marks(edit)
    _dynamic_marks(edit)
    _guard_floats(edit)
    edit.finish(u.id for u in prepared.units)
    del proto.metadata_props[:]
    for opset in list(proto.opset_import):
        if opset.domain == "gracile":
            proto.opset_import.remove(opset)
    proto.producer_name = "gracile"
    return prepared, proto


def _trace(prepared: Prepared, example: Tensor | tuple[Tensor, ...]) -> Any:
    batch = as_inputs(example)
    two = tuple(torch.cat([x[:1], x[:1]]).cpu() for x in batch)  # 1 would become a constant
    try:
        return to_proto(prepared, two, OPSET)
    except NotPlain:
        pass  # torch's exporter knows more operators
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                prepared.module,
                two,
                dynamo=True,
                opset_version=OPSET,
                input_names=[name for name, _ in prepared.inputs],
                dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in two),
                verbose=False,
            )
    except Exception as e:  # its many error types are not public
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"torch.onnx cannot export the model with a free batch size: {first} Replace the "
            "operator it names, or fixed batch sizes in reshapes."
        ) from e
    if program is None:
        raise UserError("torch.onnx returned no program for this model.")
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports missing torchvision operators and its own deprecations; users cannot
    act on either."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [(log, log.level) for log in loggers]
    try:
        for log in loggers:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in before:
            log.setLevel(level)


class _Editor:
    """An ONNX graph with look-up by tensor name; nodes are inserted by rebuilding the list."""

    def __init__(self, graph: Any):
        self.graph = graph
        self.nodes: list[Any] = list(graph.node)
        self.tensors = {t.name: t for t in graph.initializer}
        self.inputs = {i.name for i in graph.input}
        self.named: set[str] = set()  # names that must not change any more
        self.coarse: set[str] = set()  # scales of grids with fewer than FINE_BITS
        self._hide_names()

    def _hide_names(self) -> None:
        """Names by the exporter get a prefix, so that they never meet the id of a unit."""
        made = {o for n in self.nodes for o in n.output if o}
        for node in self.nodes:
            for names in (node.input, node.output):
                for k, name in enumerate(names):
                    if name in made:
                        names[k] = HIDDEN + name
        for item in (*self.graph.value_info, *self.graph.output):
            if item.name in made:
                item.name = HIDDEN + item.name

    def producer(self, name: str) -> Any | None:
        return next((n for n in self.nodes if name in n.output), None)

    def readers(self, name: str) -> list[Any]:
        return [n for n in self.nodes if name in n.input]

    def is_output(self, name: str) -> bool:
        return any(o.name == name for o in self.graph.output)

    def constant(self, name: str) -> np.ndarray | None:
        """Value of an initializer or Constant node."""
        from onnx import numpy_helper

        if name in self.tensors:
            return numpy_helper.to_array(self.tensors[name])
        node = self.producer(name)
        if node is not None and node.op_type == "Constant" and node.attribute[0].name == "value":
            return numpy_helper.to_array(node.attribute[0].t)
        return None

    def add_tensor(self, name: str, value: np.ndarray) -> str:
        from onnx import numpy_helper

        free, k = name, 0
        while free in self.tensors:
            k += 1
            free = f"{name}_{k}"
        self.tensors[free] = numpy_helper.from_array(np.asarray(value, order="C"), free)
        return free

    def add_integers(self, name: str, value: np.ndarray, bits: int, signed: bool) -> str:
        """An initializer of 4 bits each where they are enough, else of 8."""
        from onnx import TensorProto, helper

        free = self.add_tensor(name, value.astype(np.int8 if signed else np.uint8))
        if bits <= 4:
            kind = TensorProto.INT4 if signed else TensorProto.UINT4
            levels = value.reshape(-1).tolist()
            self.tensors[free] = helper.make_tensor(free, kind, value.shape, levels)
        return free

    def insert(self, before: Any, *nodes: Any) -> None:
        at = next(k for k, n in enumerate(self.nodes) if n is before)
        self.nodes[at:at] = nodes

    def remove(self, node: Any) -> None:
        self.nodes = [n for n in self.nodes if n is not node]

    def redirect(self, old: str, new: str, *, but: Any = None) -> None:
        """Let every reader of `old` (and the graph's output) read `new`."""
        for node in self.nodes:
            if node is not but:
                for k, name in enumerate(node.input):
                    if name == old:
                        node.input[k] = new
        for output in self.graph.output:
            if output.name == old:
                output.name = new

    def rename(self, old: str, new: str) -> None:
        """Give a tensor another name where it is made and where it is read."""
        node = self.producer(old)
        if node is not None:
            node.output[list(node.output).index(old)] = new
        self.redirect(old, new)

    def rename_tensor(self, old: str, new: str) -> None:
        """Give an initializer another name; its readers follow."""
        tensor = self.tensors.pop(old)
        tensor.name = new
        self.tensors[new] = tensor
        self.redirect(old, new)

    def finish(self, units: Iterable[str]) -> None:
        """Write the nodes back, without what nobody reads; outputs that are no unit get a name."""
        for k, output in enumerate(self.graph.output):
            if output.name.startswith(HIDDEN):
                self.rename(output.name, f"output_{k}" if k else "output")
        live = {o.name for o in self.graph.output}
        kept: list[Any] = []
        for node in reversed(self.nodes):
            if any(o in live for o in node.output):
                kept.append(node)
                live.update(i for i in node.input if i)
        works_for = _units_of(kept, set(units))
        del self.graph.node[:]
        for k, node in enumerate(reversed(kept)):
            # Runtimes keep parts of a node's name: how a kernel is traced back to its unit.
            node.name = f"{works_for.get(node.output[0], '')}{UNIT_MARK}{node.op_type}{k}"
            del node.metadata_props[:]
            self.graph.node.append(node)
        del self.graph.initializer[:]
        for name, tensor in self.tensors.items():
            if name in live:
                del tensor.metadata_props[:]
                self.graph.initializer.append(tensor)
        del self.graph.value_info[:]  # names have changed; the checker infers them again
        for item in (*self.graph.input, *self.graph.output):
            del item.metadata_props[:]


def _units_of(backwards: list[Any], units: set[str]) -> dict[str, str]:
    """Tensor -> the unit it belongs to: the first one downstream."""
    found: dict[str, str] = {}
    for node in backwards:
        for name in node.output:
            if name in units:
                found[name] = name
        unit = next((found[o] for o in node.output if o in found), None)
        if unit is not None:
            found.update(dict.fromkeys(node.output, unit))
            found.update({i: unit for i in node.input if i not in units})
    return found


def _marks(edit: _Editor, prefix: str) -> list[tuple[Any, str]]:
    found = []
    for node in edit.nodes:
        if node.op_type == "Mark" and node.domain == "gracile":
            name = node.attribute[0].s.decode()
            if name.startswith(prefix):
                found.append((node, name.removeprefix(prefix)))
    return found


def _pools(edit: _Editor) -> None:
    """Global means as pooling: ReduceMean has no integer kernel, GlobalAveragePool has."""
    ranks = _ranks(edit)
    for node in list(edit.nodes):
        if node.op_type != "ReduceMean" or len(node.input) < 2:
            continue
        axes, keep = edit.constant(node.input[1]), _attribute(node, "keepdims", 1)
        rank = ranks.get(node.input[0])
        if axes is None or rank is None or rank < 3:
            continue
        if sorted(int(a) % rank for a in axes.reshape(-1)) != list(range(2, rank)):
            continue
        _global_pool(edit, node, rank, bool(keep))


def _orders(edit: _Editor) -> None:
    """Reorderings (a channel shuffle after a cut) with their axis counted from the end.

    OpenVINO 2026.4 moves a Gather of all channels into the weights that read it, with the inverse
    of the order (`ReverseInputChannelsFusion`); it leaves those with a negative axis alone.
    """
    ranks = _ranks(edit)
    for node in edit.nodes:
        rank, axis = ranks.get(node.input[0]) if node.input else None, _attribute(node, "axis", 0)
        if node.op_type == "Gather" and rank is not None and 0 <= axis < rank:
            _set_attribute(node, "axis", axis - rank)


def _ranks(edit: _Editor) -> dict[str, int]:
    return {
        v.name: len(v.type.tensor_type.shape.dim)
        for v in (*edit.graph.value_info, *edit.graph.input)
        if v.type.tensor_type.HasField("shape")
    }


def _global_pool(edit: _Editor, node: Any, rank: int, keep: bool) -> None:
    from onnx import helper

    out = node.output[0]
    pooled = out if keep else f"{out}.pool"
    new = [helper.make_node("GlobalAveragePool", [node.input[0]], [pooled])]
    if not keep:
        axes = edit.add_tensor(f"{out}.axes", np.arange(2, rank, dtype=np.int64))
        new.append(helper.make_node("Squeeze", [pooled, axes], [out]))
    edit.insert(node, *new)
    edit.remove(node)


def _unit_marks(edit: _Editor, prepared: Prepared) -> None:
    """Name the tensors of units; a quantized one gets its Q/DQ pair."""
    from onnx import helper

    for mark, id in _marks(edit, UNIT):
        if id in edit.tensors:  # a parameter that an operator in integers reads: a layer scale
            edit.rename_tensor(id, f"{id}.value")
        x, y = mark.input[0], mark.output[0]
        grid = prepared.activations.get(id) or prepared.activations.get(_bare(id, prepared))
        if grid is not None:
            edit.insert(mark, *_pair(edit, x, id, grid))
            edit.redirect(y, id)
        elif x in edit.inputs or x in edit.tensors or x in edit.named or edit.is_output(x):
            edit.insert(mark, helper.make_node("Identity", [x], [id]))
            edit.redirect(y, id)
        else:
            edit.redirect(y, id)
            edit.rename(x, id)
        edit.named.add(id)
        edit.remove(mark)


def _bare(id: str, prepared: Prepared) -> str:
    bare = id.removesuffix(".quantize")
    return bare if bare not in prepared.graph.nodes or prepared.graph[bare].op == "input" else id


def _pair(edit: _Editor, x: str, out: str, grid: ActivationGrid) -> list[Any]:
    """Nodes that put tensor `x` on a grid, as tensor `out`."""
    from onnx import helper

    width = 8 if grid.bits <= 8 else 16
    dtype = np.dtype(f"{'' if grid.signed else 'u'}int{width}")
    nodes = []
    info = np.iinfo(dtype)
    if (grid.qmin, grid.qmax) != (info.min, info.max):
        step, zero = np.float32(grid.scale), grid.zero_point
        low = edit.add_tensor(f"{out}.low", np.asarray((grid.qmin - zero) * step, np.float32))
        high = edit.add_tensor(f"{out}.high", np.asarray((grid.qmax - zero) * step, np.float32))
        nodes.append(helper.make_node("Clip", [x, low, high], [f"{out}.clipped"]))
        x = f"{out}.clipped"
    scale = edit.add_tensor(f"{out}.scale", np.asarray(grid.scale, np.float32))
    zero_point = edit.add_tensor(f"{out}.zero_point", np.asarray(grid.zero_point, dtype))
    if grid.bits < FINE_BITS:
        edit.coarse.add(scale)
    nodes.append(helper.make_node("QuantizeLinear", [x, scale, zero_point], [f"{out}.q"]))
    nodes.append(helper.make_node("DequantizeLinear", [f"{out}.q", scale, zero_point], [out]))
    return nodes


def _weight_marks(edit: _Editor, prepared: Prepared) -> None:
    """Integer weights; a transposition in front of a MatMul is done here, once."""
    from onnx import helper

    for mark, address in _marks(edit, WEIGHT):
        grid, name = prepared.weights[address], mark.output[0]
        if grid.group is not None:
            _grouped_weight(edit, mark, address, grid)
            continue
        q = grid.q.numpy().astype(np.int8 if grid.signed else np.uint8)
        axis, last = grid.axis, mark
        for table in [r for r in edit.readers(name) if r.op_type == "Gather"]:
            if table.input[0] == name:
                _integer_table(edit, table, address, grid, q)
        readers = edit.readers(name)
        if not readers:
            edit.remove(mark)
            continue
        if len(readers) == 1 and readers[0].op_type == "Transpose" and q.ndim == 2:
            last, q = readers[0], q.T
            axis = None if axis is None else 1 - axis
            edit.remove(mark)
        zero = grid.zero_point.numpy().astype(q.dtype)
        stored = edit.add_tensor(address, q)
        out = f"{stored}.dequantized"
        scale = edit.add_tensor(f"{stored}.scale", grid.scale.numpy().astype(np.float32))
        names = [stored, scale, edit.add_tensor(f"{stored}.zero_point", zero)]
        if grid.bits < FINE_BITS:
            edit.coarse.add(scale)
        extra: dict[str, Any] = {} if axis is None else {"axis": axis}
        edit.insert(last, helper.make_node("DequantizeLinear", names, [out], **extra))
        edit.redirect(last.output[0], out)
        edit.remove(last)


def _grouped_weight(edit: _Editor, mark: Any, address: str, grid: WeightGrid) -> None:
    """Integers with a scale for each group of inputs, of 4 bits where they fit.

    Outputs first, whatever reads it: with inputs first ONNX Runtime makes a MatMulNBits of it,
    which rounds what the layer reads to 8 bits.
    """
    from onnx import helper

    rows = grid.q.flatten(1).numpy()
    stored = edit.add_integers(address, rows, grid.bits, grid.signed)
    names = [stored, edit.add_tensor(f"{stored}.scale", grid.scale.numpy().astype(np.float32))]
    if bool(grid.zero_point.any()):
        zero = grid.zero_point.numpy()
        names.append(edit.add_integers(f"{stored}.zero_point", zero, grid.bits, grid.signed))
    out, size = f"{stored}.dequantized", grid.group
    new = [helper.make_node("DequantizeLinear", names, [out], axis=1, block_size=size)]
    if grid.q.ndim > 2:
        shape = edit.add_tensor(f"{stored}.shape", np.asarray(grid.q.shape, np.int64))
        new.append(helper.make_node("Reshape", [out, shape], [f"{stored}.reshaped"]))
        out = f"{stored}.reshaped"
    edit.insert(mark, *new)
    edit.redirect(mark.output[0], out)
    edit.remove(mark)


def _integer_table(edit: _Editor, node: Any, address: str, grid: WeightGrid, q: np.ndarray) -> None:
    """Look integers up, and multiply them by the scale of their row, or of all rows."""
    from onnx import TensorProto, helper

    out, rows, which = node.output[0], f"{node.output[0]}.rows", node.input[1]
    node.input[0], node.output[0] = edit.add_tensor(address, q), rows
    stored = node.input[0]
    scale, zero = grid.scale.numpy().astype(np.float32), grid.zero_point.numpy().astype(q.dtype)
    if grid.axis is None:
        names = [edit.add_tensor(f"{stored}.scale", scale)]
        names += [edit.add_tensor(f"{stored}.zero_point", zero)]
        new = [helper.make_node("DequantizeLinear", [rows, *names], [out])]
    else:
        levels = f"{out}.levels"
        scales = edit.add_tensor(f"{stored}.scale", scale.reshape(-1, 1))
        new = [
            helper.make_node("Cast", [rows], [levels], to=TensorProto.FLOAT),
            helper.make_node("Gather", [scales, which], [f"{out}.scale"], axis=-2),
        ]
        if zero.any():  # the same of all rows, see `integers.weight_grids`
            middle = edit.add_tensor(f"{stored}.zero_point", zero.reshape(-1)[0].astype(np.float32))
            new.append(helper.make_node("Sub", [levels, middle], [f"{out}.centred"]))
            levels = f"{out}.centred"
        new.append(helper.make_node("Mul", [levels, f"{out}.scale"], [out]))
    at = next(k for k, n in enumerate(edit.nodes) if n is node) + 1
    edit.nodes[at:at] = new


def _spread(edit: _Editor) -> None:
    """A Q/DQ pair with its input's grid behind every operator that only moves values."""
    from onnx import helper

    for node in list(edit.nodes):
        if node.op_type not in AGNOSTIC or not _keeps_grid(edit, node):
            continue
        source, out = edit.producer(node.input[0]), node.output[0]
        if source is None or source.op_type != "DequantizeLinear" or source.attribute:
            continue
        readers = edit.readers(out)
        if not edit.is_output(out) and all(r.op_type == "QuantizeLinear" for r in readers):
            continue
        grid, raw = list(source.input[1:]), f"{out}.raw"
        node.output[0] = raw
        at = next(k for k, n in enumerate(edit.nodes) if n is node) + 1
        edit.nodes[at:at] = [
            helper.make_node("QuantizeLinear", [raw, *grid], [f"{out}.q"]),
            helper.make_node("DequantizeLinear", [f"{out}.q", *grid], [out]),
        ]


def _keeps_grid(edit: _Editor, node: Any) -> bool:
    if node.op_type != "Pad":
        return True
    if _attribute(node, "mode", b"constant") != b"constant":
        return True
    if len(node.input) < 3 or not node.input[2]:
        return True
    value = edit.constant(node.input[2])
    return value is not None and not value.any()  # 0 is on every grid


def _bias_marks(edit: _Editor) -> None:
    """Integer biases, 32 bits with scale s_input * s_weight, one for every reader."""
    from onnx import helper

    made: dict[tuple[str, bytes], list[str]] = {}  # steps of one layer have one bias
    for mark, address in _marks(edit, BIAS):
        value = edit.constant(mark.input[0])
        if value is None:
            raise UserError(f"'{address}' has a bias that is computed in the forward.")
        name = _bias_name(address)
        for node in edit.readers(mark.output[0]):
            k = list(node.input).index(mark.output[0])
            found = _integer_bias(edit, node, value) if node.op_type in LAYER_OPS else None
            if found is None:
                node.input[k] = edit.add_tensor(name, value)
                continue
            q, scale = found
            same = address, scale.tobytes()
            if same not in made:
                stored = edit.add_tensor(name, q)
                zero = edit.add_tensor(f"{stored}.zero_point", np.zeros(scale.shape, np.int32))
                made[same] = [stored, edit.add_tensor(f"{stored}.scale", scale), zero]
            names = made[same]
            extra: dict[str, Any] = {} if scale.ndim == 0 else {"axis": 0}
            out = f"{node.output[0]}.bias.dequantized"
            edit.insert(node, helper.make_node("DequantizeLinear", names, [out], **extra))
            node.input[k] = out
        edit.remove(mark)


def _bias_name(address: str) -> str:
    """What a bias is called that belongs to the weight at an address."""
    path, _, name = address.rpartition(".")
    return f"{path}.{name.replace('weight', 'bias')}".lstrip(".")


def _integer_bias(
    edit: _Editor, node: Any, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Bias as int32 with its scale; None if its layer does not compute in integers."""
    x, w = edit.producer(node.input[0]), edit.producer(node.input[1])
    if x is None or w is None or {x.op_type, w.op_type} != {"DequantizeLinear"}:
        return None
    if {x.input[1], w.input[1]} & edit.coarse:
        return None  # s_input * s_weight is too coarse a step for a bias
    step, scales = edit.constant(x.input[1]), edit.constant(w.input[1])
    if step is None or scales is None or scales.shape not in ((), bias.shape):
        return None
    scales = _raise_dead(edit, w, scales, np.abs(bias) / (step * np.float64(BIAS_LIMIT)))
    scale = (step.astype(np.float32) * scales.astype(np.float32)).astype(np.float32)
    level = bias.astype(np.float64) / scale.astype(np.float64)
    if np.abs(level).max(initial=0.0) >= 2 * BIAS_LIMIT:
        return None  # a tiny scale that cannot hold the bias: this layer stays in float
    return np.rint(level).astype(np.int32), scale


def _raise_dead(edit: _Editor, w: Any, scales: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Filters of zeros (pruned ones) have any scale: give them one that can hold the bias."""
    q, zero = edit.constant(w.input[0]), edit.constant(w.input[2])
    axis = _attribute(w, "axis", None)
    if q is None or zero is None or axis is None or scales.shape != least.shape:
        return scales
    filters = np.moveaxis(q.astype(np.int32), axis, 0).reshape(len(scales), -1)
    dead = (filters == zero.astype(np.int32).reshape(-1, 1)).all(1)
    raised = np.where(dead, np.maximum(scales, least), scales).astype(np.float32)
    if (raised != scales).any():
        w.input[1] = edit.add_tensor(w.input[1], raised)
    return raised


def _dynamic_marks(edit: _Editor) -> None:
    """DynamicQuantizeLinear and MatMulInteger, then scales and bias in float."""
    from onnx import helper

    for mark, id in _marks(edit, DYNAMIC):
        x, marked = mark.input[0], mark.output[0]
        levels, scale, zero = (f"{id}.{part}" for part in ("levels", "scale", "zero_point"))
        edit.insert(mark, helper.make_node("DynamicQuantizeLinear", [x], [levels, scale, zero]))
        for node in edit.readers(marked):
            weight = _matrix(edit, node) if node.input[0] == marked else None
            if weight is not None:
                _integer_product(edit, node, id, weight)
        if edit.readers(marked):  # a weight that stays float
            names = [levels, scale, zero]
            edit.insert(mark, helper.make_node("DequantizeLinear", names, [f"{id}.rounded"]))
            edit.redirect(marked, f"{id}.rounded")
        edit.remove(mark)


def _matrix(edit: _Editor, node: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, str] | None:
    """Integers (inputs, outputs), scale, zero point and name of the weight a product reads.

    None if it is no product, or its weight is float.
    """
    if node.op_type not in ("Gemm", "MatMul"):
        return None
    made = edit.producer(node.input[1])
    turned = False
    if made is not None and made.op_type == "Transpose":
        turned = True
        made = edit.producer(made.input[0])
    if made is None or made.op_type != "DequantizeLinear":
        return None
    q, scale, zero = (edit.constant(name) for name in made.input)
    if q is None or scale is None or zero is None or q.ndim != 2:
        return None
    if turned != bool(_attribute(node, "transB", 0)):
        q = q.T
    return q, scale.reshape(-1), zero.reshape(-1), made.input[0]


def _integer_product(
    edit: _Editor, node: Any, id: str, weight: tuple[np.ndarray, np.ndarray, np.ndarray, str]
) -> None:
    """Replace a product with a dequantized weight: (levels - zero) @ (q - zero) * scales + bias."""
    from onnx import TensorProto, helper

    q, scales, zeros, name = weight
    out, bias = node.output[0], node.input[2] if len(node.input) > 2 else ""
    reads = [f"{id}.levels", edit.add_tensor(f"{name}.integers", q), f"{id}.zero_point"]
    if zeros.any():
        zero = np.broadcast_to(zeros, q.shape[1:]) if zeros.size > 1 else zeros[0]
        reads.append(edit.add_tensor(f"{name}.zero", np.asarray(zero)))
    own = edit.add_tensor(f"{name}.steps", scales if scales.size > 1 else scales[0])
    sums, floats, step = (f"{id}.{part}" for part in ("sums", "floats", "step"))
    product = f"{id}.product" if bias else out
    new = [
        helper.make_node("MatMulInteger", reads, [sums]),
        helper.make_node("Cast", [sums], [floats], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{id}.scale", own], [step]),
        helper.make_node("Mul", [floats, step], [product]),
    ]
    if bias:
        new.append(helper.make_node("Add", [product, bias], [out]))
    edit.insert(node, *new)
    edit.remove(node)


def _guard_floats(edit: _Editor) -> None:
    """Keep ONNX Runtime from quantizing weights and biases that are meant to stay in float.

    It does so on its own (`WeightBiasQuantization`) where a layer reads a DequantizeLinear and its
    result goes into a QuantizeLinear, and it rounds biases to steps as coarse as a grid of few bits
    makes them. A sum of one term in between, which it does not remove, makes the layer no such
    pattern.
    """
    from onnx import helper

    for node in list(edit.nodes):
        if node.op_type != "QuantizeLinear":
            continue
        at = edit.producer(node.input[0])
        while at is not None and at.op_type in ("Relu", "Clip"):
            at = edit.producer(at.input[0])
        if at is None or at.op_type not in (*LAYER_OPS, "MatMul"):
            continue
        x, w = edit.producer(at.input[0]), edit.producer(at.input[1])
        bias = at.input[2] if len(at.input) > 2 else ""
        float_bias = bool(bias) and edit.producer(bias) is None
        if x is None or x.op_type != "DequantizeLinear" or not (w is None or float_bias):
            continue
        edit.insert(node, helper.make_node("Sum", [node.input[0]], [f"{node.input[0]}.float"]))
        node.input[0] = f"{node.input[0]}.float"


def _attribute(node: Any, name: str, default: Any) -> Any:
    from onnx import helper

    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def _set_attribute(node: Any, name: str, value: Any) -> None:
    from onnx import helper

    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
