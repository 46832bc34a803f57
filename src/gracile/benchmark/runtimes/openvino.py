"""OpenVINO: runs IR (`.xml` with `.bin`); threads, streams and float precision always stated."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from gracile.benchmark.artifact import Artifact, unit_in
from gracile.benchmark.processor import computes_bf16, computes_f16
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

KEPT = 4  # compiled models of different input shapes that are kept
NO_STEP = ("Const", "Input", "Output")
NO_KERNEL = ("undef", "unknown")  # kernels of what was fused away, and of inputs and outputs
LABELS = {"u8": "int8", "i8": "int8", "u1": "binary"}  # others are called what they are


@register("runtime", "openvino", source="https://docs.openvino.ai")
class OpenVino(Loaded):
    """OpenVINO with static shapes: one compiled model for each shape of inputs."""

    name = "openvino"

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
        self._device = device
        core = _core()
        if device.split(".")[0] not in {d.split(".")[0] for d in core.available_devices}:
            known = ", ".join(core.available_devices)
            raise UserError(f"OpenVINO here has no device '{device}'; it has {known}.")
        missing = {"bf16": not computes_bf16(), "f16": not computes_f16()}.get(hint, False)
        if device == "CPU" and missing:
            warnings.warn(
                f"this processor has no units for {hint}: OpenVINO computes in f32 all the same.",
                stacklevel=2,
            )
        self._model = self._read()
        self._compiled: OrderedDict[Any, Any] = OrderedDict()

    @property
    def version(self) -> str:
        """The runtime's version."""
        import openvino

        return str(openvino.__version__).partition("-")[0]

    def run(self, inputs: Inputs) -> list[Array]:
        """The outputs for one batch of any size."""
        values = self._checked(inputs)
        request = self._compile("plain", [v.shape for v in values])
        results = request.infer(values)
        return [np.array(results[o]) for o in request.model_outputs]

    def run_units(
        self, inputs: Inputs, feed: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """The tensor of every unit, in execution order; see `Loaded`."""
        values: Any = dict(enumerate(self._checked(inputs)))
        shapes = [v.shape for v in values.values()]
        ids = [u.id for u in self.artifact.units]
        if feed is None:
            request = self._compile("units", shapes)
        else:
            request = self._compile("cut", shapes)
            fed = {_fed(id): x for id, x in feed.items()}
            known = {n for i in request.model_inputs for n in i.get_names()}
            values |= {name: x for name, x in fed.items() if name in known}
        results = request.infer(values)
        return {id: np.array(results[id]) for id in ids}

    def program(self) -> tuple[Any, Any]:
        """What it executes: the model at the batch size of `load`, and its execution graph."""
        shapes = self._shapes(self.batch)
        model = self._model.clone()
        model.reshape({k: list(s) for k, s in enumerate(shapes)})
        compiled = self._compile("plain", shapes).get_compiled_model()
        return model, compiled.get_runtime_model()

    def kernels(self) -> list[Kernel]:
        """Layers of the execution graph that OpenVINO reports."""
        ids = {u.id for u in self.artifact.units}
        out = []
        for op in self.program()[1].get_ordered_ops():
            facts = op.get_rt_info()
            kind, primitive, precision, layers = (
                facts[k].astype(str)
                for k in ("layerType", "primitiveType", "runtimePrecision", "originalLayersNames")
            )
            if kind in NO_STEP:
                continue
            names = [op.get_friendly_name(), *layers.split(",")]
            unit = next((u for n in names if (u := unit_in(n, ids))), "")
            label = LABELS.get(str(precision), str(precision))
            out.append(Kernel(unit, f"{kind} {primitive}", label))
        return out

    def counters(self, batch: int | None = None) -> Counters:
        """The layers of the execution graph that have a kernel, and their times; see `Loaded`."""
        shapes = self._shapes(batch or self.batch)
        request = self._compile("counted", shapes, PERF_COUNT=True)
        step = _fed_step(request)
        step()
        fused = _fused(request.get_compiled_model().get_runtime_model())
        ids = {u.id for u in self.artifact.units}
        layers = tuple(
            CountedLayer(p.node_name, f"{p.node_type} {p.exec_type}", _units(names, ids), names)
            for p in _counted(request)
            for names in [fused.get(p.node_name, ())]
        )

        def times(n: int) -> Array:
            out = np.empty((n, len(layers)))
            for row in out:
                step()
                row[:] = [p.real_time.total_seconds() * 1e3 for p in _counted(request)]
            return out

        return Counters(layers, times)

    def streams(self, n: int, batch: int | None = None) -> list[Callable[[], Any]]:
        """OpenVINO's own streams: one compiled model, a request for each; see `Loaded`."""
        config: dict[str, Any] = {"NUM_STREAMS": n}
        if self._device.startswith("CPU"):
            config["INFERENCE_NUM_THREADS"] = n * self.threads
        shapes = self._shapes(batch or self.batch)
        compiled = self._compile(f"streams {n}", shapes, **config).get_compiled_model()
        return [_fed_step(compiled.create_infer_request()) for _ in range(n)]

    def _step(self, batch: int) -> Callable[[], Any]:
        return _fed_step(self._compile("plain", self._shapes(batch)))

    def _read(self) -> Any:
        try:
            return _core().read_model(str(self.artifact.path))
        except RuntimeError as e:
            raise UserError(f"{self.artifact.path}: OpenVINO cannot read it: {e}") from e

    def _shapes(self, batch: int) -> list[Sequence[int]]:
        shapes: list[Sequence[int]] = []
        for k, port in enumerate(self._model.inputs):
            known = self.artifact.inputs[k][1] if k < len(self.artifact.inputs) else ()
            dims = [d.get_length() if d.is_static else 0 for d in port.partial_shape]
            rest = [d or (known[j] if j < len(known) else 1) for j, d in enumerate(dims)][1:]
            shapes.append((batch, *rest))
        return shapes

    def _checked(self, inputs: Inputs) -> list[Array]:
        values = arrays(inputs)
        if len(values) != len(self._model.inputs):
            raise UserError(f"the model has {len(self._model.inputs)} inputs, got {len(values)}.")
        return values

    def _compile(self, form: str, shapes: Sequence[Sequence[int]], **more: Any) -> Any:
        """An inference request for these shapes.

        Args:
            form: what it is kept by; "units" and "cut" are other models, `more` is compiled in.
        """
        key = (form, tuple(tuple(s) for s in shapes))
        if key in self._compiled:
            self._compiled.move_to_end(key)
            return self._compiled[key]
        model = self._model.clone()
        ids = [u.id for u in self.artifact.units]
        try:
            model.reshape({k: list(s) for k, s in enumerate(shapes)})
            if form == "units":
                _show(model, ids)
            elif form == "cut":
                model = _cut(model, ids)
            compiled = _core().compile_model(model, self._device, {**self._config(), **more})
        except RuntimeError as e:
            raise UserError(
                f"{self.artifact.path}: OpenVINO cannot compile it for inputs {key[1]}: {e}"
            ) from e
        self._compiled[key] = compiled.create_infer_request()
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return self._compiled[key]

    def _config(self) -> dict[str, Any]:
        return _config(self._device, self.threads, self.hint)


def step_of(model: Any, *, threads: int, hint: str, device: str = "CPU") -> Callable[[], Any]:
    """One inference of an ``openvino.Model`` on fixed inputs, for timing."""
    compiled = _core().compile_model(model, device, _config(device, threads, hint))
    return _fed_step(compiled.create_infer_request())


def _fed_step(request: Any) -> Callable[[], Any]:
    import openvino as ov

    for k, port in enumerate(request.model_inputs):
        value = timing_input(tuple(port.shape), port.element_type.to_dtype())
        request.set_input_tensor(k, ov.Tensor(value))
    return lambda: request.infer()


def _config(device: str, threads: int, hint: str) -> dict[str, Any]:
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": 1}
    if device.startswith("CPU"):
        config["INFERENCE_NUM_THREADS"] = threads
    return config


def _counted(request: Any) -> list[Any]:
    """What has a kernel; one that took less than the counter's step of 1 us is said not to run."""
    return [p for p in request.profiling_info if not p.exec_type.startswith(NO_KERNEL)]


def _fused(model: Any) -> dict[str, tuple[str, ...]]:
    """Layer of an execution graph -> the operators it was made of."""
    return {
        op.get_friendly_name(): tuple(filter(None, names.split(",")))
        for op in model.get_ordered_ops()
        for names in [op.get_rt_info()["originalLayersNames"].astype(str)]
    }


def _units(names: Sequence[str], ids: set[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(u for name in names if (u := unit_in(name, ids))))


@lru_cache(maxsize=1)
def _core() -> Any:
    try:
        import openvino
    except ImportError:
        raise MissingExtra("OpenVINO", "openvino") from None
    return openvino.Core()


def _fed(id: str) -> str:
    return f"{id}.fed"


def _ports(model: Any) -> dict[str, Any]:
    return {
        name: port
        for op in model.get_ordered_ops()
        if op.get_type_name() != "Result"
        for port in op.outputs()
        for name in port.get_names()
    }


def _show(model: Any, ids: list[str]) -> None:
    """Add the units' tensors to the outputs."""
    there = {name for port in model.outputs for name in port.get_names()}
    ports = _ports(model)
    gone = [id for id in ids if id not in ports]
    if gone:
        raise UserError(f"the model has no tensor '{gone[0]}', which it names as a unit.")
    model.add_outputs([ports[id] for id in ids if id not in there])


def _cut(model: Any, ids: list[str]) -> Any:
    """The model cut behind every unit: what reads a unit reads an input of its own instead.

    The input of a quantized unit passes the same quantization, so that its readers still compute
    in integers; a value on the grid is not changed by it.
    """
    import openvino as ov
    from openvino import opset13

    _show(model, ids)
    ports = _ports(model)
    added = []
    for id in ids:
        port = ports[id]
        readers = [i for i in port.get_target_inputs() if i.get_node().get_type_name() != "Result"]
        if not readers:
            continue
        fed = opset13.parameter(port.get_partial_shape(), port.get_element_type())
        fed.output(0).set_names({_fed(id)})
        added.append(fed)
        node, source = port.get_node(), fed.output(0)
        if node.get_type_name() == "FakeQuantize":
            # Its input range may have swallowed a factor; what is fed lies in the output range.
            low, high = (node.input_value(k) for k in (3, 4))
            levels = node.get_attributes()["levels"]
            source = opset13.fake_quantize(fed, low, high, low, high, levels).output(0)
        for reader in readers:
            reader.replace_source_output(source)
    return ov.Model(model.get_results(), [*model.get_parameters(), *added], "cut")
