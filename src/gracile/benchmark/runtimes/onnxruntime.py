"""ONNX Runtime: runs `.onnx`, on the CPU unless another execution provider is named."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from gracile.benchmark.artifact import Artifact, unit_in
from gracile.benchmark.runtimes.base import (
    Array,
    CountedLayer,
    Counters,
    Inputs,
    Kernel,
    Loaded,
    arrays,
    timing_input,
)
from gracile.errors import MissingExtra, UserError
from gracile.registry import register

MOVES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad",
         "Identity", "Concat", "Split", "Gather")  # fmt: skip
ADDED = re.compile(r"(_nchwc|_token_\d+|\.q)+$")  # what the optimizer adds to names
TYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8, "tensor(bool)": np.bool_,
}  # fmt: skip
TIMED = "_kernel_time"  # behind a node's name in a profile
WARMUP = 3  # inferences of a profiled session that are not counted


@register("runtime", "onnxruntime", source="https://onnxruntime.ai")
class OnnxRuntime(Loaded):
    """ONNX Runtime with all graph optimizations."""

    name = "onnxruntime"

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int = 1,
        hint: str = "f32",
        batch: int | None = None,
        device: str = "CPU",
    ):
        super().__init__(artifact, threads=threads, hint=hint, batch=batch, device=device)
        ort = _import()
        if hint != "f32":
            raise UserError(
                f"ONNX Runtime computes float layers in f32; hint '{hint}' is not there."
            )
        self._provider = f"{device}ExecutionProvider"
        known = [p.removesuffix("ExecutionProvider") for p in ort.get_available_providers()]
        if device not in known:
            raise UserError(
                f"ONNX Runtime here has no device '{device}'; it has {', '.join(known)}."
            )
        self._session = self._open(str(artifact.path))
        self._inputs = [i.name for i in self._session.get_inputs()]
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._inside: Any = None  # session that shows units
        self._cut: Any = None  # session whose units are fed

    @property
    def version(self) -> str:
        """The runtime's version."""
        return str(_import().__version__)

    def run(self, inputs: Inputs) -> list[Array]:
        """The outputs for one batch of any size."""
        return list(self._session.run(None, self._named(inputs)))

    def run_units(
        self, inputs: Inputs, feed: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """The tensor of every unit, in execution order; see `Loaded`."""
        ids = [u.id for u in self.artifact.units]
        named = self._named(inputs)
        if feed is None:
            self._inside = self._inside or self._open(_with_units(self.artifact.path, ids))
            session = self._inside
        else:
            if self._cut is None:
                self._cut = self._open(_cut_at_units(self.artifact.path, ids))
            session = self._cut
            known = {i.name for i in session.get_inputs()}
            named |= {_fed(id): x for id, x in feed.items() if _fed(id) in known}
        values = session.run(ids, named)
        return dict(zip(ids, values, strict=True))

    def kernels(self) -> list[Kernel]:
        """Nodes of the optimized graph that ONNX Runtime writes out."""
        return _kernels(self._optimized().graph, [u.id for u in self.artifact.units])

    def counters(self, batch: int | None = None) -> Counters:
        """The nodes that its profiler times, in steps of 1 us; see `Loaded`."""
        ids, size = {u.id for u in self.artifact.units}, batch or self.batch
        model = self._optimized()  # once: names that the optimizer makes up differ each time
        known = {n.name: (n.op_type, _units_of(n, ids)) for n in model.graph.node}
        program = model.SerializeToString()
        names = [name for name, _ in self._profiled(program, size, 1)[0]]
        layers = tuple(CountedLayer(n, *known.get(n, ("", ()))) for n in names)

        def times(n: int) -> Array:
            runs = self._profiled(program, size, n)
            if any([name for name, _ in run] != names for run in runs):
                raise UserError(
                    f"{self.artifact.path}: its operators are not the same in every inference, "
                    "so they have no times of their own; leave --layers out."
                )
            return np.array([[ms for _, ms in run] for run in runs])

        return Counters(layers, times)

    def _profiled(self, program: bytes, batch: int, n: int) -> list[list[tuple[str, float]]]:
        """(name, ms) of every node in each of `n` inferences of a session of their own."""
        with TemporaryDirectory() as folder:
            session = self._open(program, as_it_is=True, profile=str(Path(folder) / "profile"))
            step = _fed_step(session, batch)
            for _ in range(WARMUP + n):
                step()
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        runs: list[list[tuple[str, float]]] = [[]]
        for event in events:
            if event["name"] == "model_run":  # written when a run has ended
                runs.append([])
            elif event["cat"] == "Node" and event["name"].endswith(TIMED):
                runs[-1].append((event["name"].removesuffix(TIMED), event["dur"] / 1e3))
        return runs[WARMUP : WARMUP + n]

    def program(self) -> tuple[Any, dict[str, tuple[Any, tuple[int, ...]]]]:
        """What it executes: the optimized graph, and (dtype, shape) of each of its tensors.

        Shapes are those of the batch size given to `load`; they are seen in one inference.
        """
        import onnx

        model = self._optimized()
        there = {o.name for o in model.graph.output}
        names = [n for node in model.graph.node for n in node.output if n]
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        shown.graph.output.extend(
            onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in there
        )
        session = self._open(shown.SerializeToString(), as_it_is=True)
        feeds = {i.name: timing_input(_sizes(i, self.batch), TYPES[i.type])
                 for i in session.get_inputs()}  # fmt: skip
        values = dict(zip(names, session.run(names, feeds), strict=True)) | feeds
        return model.graph, {n: (v.dtype, v.shape) for n, v in values.items()}

    def _optimized(self) -> Any:
        import onnx

        with TemporaryDirectory() as folder:
            path = str(Path(folder) / "optimized.onnx")
            self._open(str(self.artifact.path), optimized=path)
            return onnx.load(path)

    def _step(self, batch: int) -> Callable[[], Any]:
        return _fed_step(self._session, batch)

    def _named(self, inputs: Inputs) -> dict[str, Array]:
        values = arrays(inputs)
        if len(values) != len(self._inputs):
            raise UserError(f"the model has {len(self._inputs)} inputs, got {len(values)}.")
        return dict(zip(self._inputs, values, strict=True))

    def _open(
        self,
        model: str | bytes,
        optimized: str | None = None,
        *,
        as_it_is: bool = False,
        profile: str | None = None,
    ) -> Any:
        options = _options(self.threads, as_it_is)
        if optimized is not None:
            options.optimized_model_filepath = optimized
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
        try:
            if _weights_only(self.artifact.path):
                # Nothing computes in integers: restore the weights once, not at every inference.
                options.add_session_config_entry("session.disable_quant_qdq", "1")
            return _import().InferenceSession(model, options, providers=[self._provider])
        except Exception as e:  # neither package has a public base of its errors
            raise UserError(f"{self.artifact.path}: ONNX Runtime cannot load it: {e}") from e


def step_of(model: Any, *, threads: int, device: str = "CPU") -> Callable[[], Any]:
    """One inference of an ``onnx.ModelProto``, node by node as it is, for timing."""
    session = _import().InferenceSession(
        model.SerializeToString(),
        _options(threads, as_it_is=True),
        providers=[f"{device}ExecutionProvider"],
    )
    return _fed_step(session, None)


def _fed_step(session: Any, batch: int | None) -> Callable[[], Any]:
    binding = session.io_binding()
    for i in session.get_inputs():
        binding.bind_cpu_input(i.name, timing_input(_sizes(i, batch), TYPES[i.type]))
    for o in session.get_outputs():
        binding.bind_output(o.name)
    return lambda: session.run_with_iobinding(binding)


def _options(threads: int, as_it_is: bool) -> Any:
    ort = _import()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_DISABLE_ALL if as_it_is else levels.ORT_ENABLE_ALL
    options.log_severity_level = 3  # its warnings are about its own optimizer
    return options


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("the ONNX Runtime", "onnx") from None
    return onnxruntime


def _sizes(port: Any, batch: int | None) -> list[int]:
    sizes = [d if isinstance(d, int) else 1 for d in port.shape]
    return sizes if batch is None else [batch, *sizes[1:]]


def _weights_only(path: Path) -> bool:
    import onnx

    ops = {n.op_type for n in onnx.load(path, load_external_data=False).graph.node}
    return "DequantizeLinear" in ops and "QuantizeLinear" not in ops


def _fed(id: str) -> str:
    return f"{id}.fed"


def _with_units(path: Path, ids: list[str]) -> bytes:
    """The model with the units' tensors as outputs."""
    import onnx

    model = onnx.load(path)
    there = {o.name for o in model.graph.output}
    model.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(id) for id in ids if id not in there
    )
    data: bytes = model.SerializeToString()
    return data


def _cut_at_units(path: Path, ids: list[str]) -> bytes:
    """The model cut behind every unit: what reads a unit reads an input of its own instead.

    The input of a quantized unit passes the same Q/DQ pair, so that its readers still compute in
    integers; a value on the grid is not changed by it.
    """
    import onnx
    from onnx import helper

    model = onnx.load(path)
    graph = model.graph
    types = {
        v.name: v.type.tensor_type.elem_type
        for v in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    maker = {o: n for n in graph.node for o in n.output}
    there = {o.name for o in graph.output}
    first: list[Any] = []
    for id in ids:
        readers = [n for n in graph.node if id in n.input]
        if readers:
            kind = types.get(id, onnx.TensorProto.FLOAT)
            graph.input.append(helper.make_tensor_value_info(_fed(id), kind, None))
            source = _fed(id)
            made = maker.get(id)
            if made is not None and made.op_type == "DequantizeLinear":
                grid, q, source = made.input[1:], f"{id}.fed.q", f"{id}.fed.dq"
                first.append(helper.make_node("QuantizeLinear", [_fed(id), *grid], [q]))
                first.append(helper.make_node("DequantizeLinear", [q, *grid], [source]))
            for node in readers:
                for k, name in enumerate(node.input):
                    if name == id:
                        node.input[k] = source
        if id not in there:
            graph.output.append(helper.make_empty_tensor_value_info(id))
    nodes = [*first, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    data: bytes = model.SerializeToString()
    return data


def _kernels(graph: Any, ids: list[str]) -> list[Kernel]:
    known = set(ids)
    integer: dict[str, bool] = {
        t.name: t.data_type in (2, 3)
        for t in graph.initializer  # UINT8, INT8
    }
    weights = set(integer)
    steps: list[tuple[Any, str]] = []
    for node in graph.node:
        inputs = [i for i in node.input if i and i not in weights]
        reads = any(integer.get(i, False) for i in inputs)
        if node.op_type == "QuantizeLinear":
            precision, made = "int8", True
        elif node.op_type == "DequantizeLinear":
            precision, made = "f32", False
        elif node.op_type.startswith("QLinear"):
            precision, made = "int8", True
        elif node.op_type.startswith("DynamicQuantize") or node.op_type == "MatMulInteger":
            precision, made = "int8", node.op_type == "DynamicQuantizeLinear"
        elif node.op_type in MOVES:
            precision, made = ("int8", True) if reads else ("f32", False)
        else:
            # A QGemm with an output scale (input 7) gives integers, without one floats.
            given = len(node.input) > 7 and bool(node.input[7])
            precision = "int8" if reads else "f32"
            made = reads and (node.op_type != "QGemm" or given) and "ToFloat" not in node.op_type
        integer.update(dict.fromkeys(node.output, made))
        steps.append((node, precision))
    readers: dict[str, Any] = {}
    for node, _ in reversed(steps):
        for name in node.input:
            readers[name] = node  # the first one, in the end
    return [
        Kernel(_unit_of(node, known, readers), node.op_type, precision) for node, precision in steps
    ]


def _units_of(node: Any, ids: set[str]) -> tuple[str, ...]:
    """The units that a node computes: its name speaks of the first, its output of the last."""
    found = (unit_in(ADDED.sub("", name), ids) for name in (node.name, *node.output))
    return tuple(dict.fromkeys(u for u in found if u))


def _unit_of(node: Any, ids: set[str], readers: Mapping[str, Any]) -> str:
    """The unit that a node's name or output speaks of, or that of the next node that has one."""
    while node is not None:
        for name in (node.name, *node.output):
            if unit := unit_in(ADDED.sub("", name), ids):
                return unit
        node = next((readers[o] for o in node.output if o in readers), None)
    return ""
