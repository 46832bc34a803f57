"""LiteRT (once TensorFlow Lite): runs `.tflite` on the CPU, by XNNPACK where it takes operators."""

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from gracile.benchmark.artifact import KEY, Artifact
from gracile.benchmark.runtimes.base import Array, Inputs, Kernel, Loaded, arrays, timing_input
from gracile.benchmark.tflite import (
    FED,
    IMAGE,
    INT8,
    Grid,
    facts_of,
    grid_of,
    name_of,
    read,
    readable,
    type_of,
    works_for,
)
from gracile.errors import MissingExtra, UserError
from gracile.registry import register

DELEGATE = "DELEGATE"


@register("runtime", "litert", source="https://ai.google.dev/edge/litert")
class LiteRT(Loaded):
    """LiteRT. Tensors follow the batch; a network that does not runs sample by sample."""

    name = "litert"

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
        _import()
        if hint != "f32":
            raise UserError(f"LiteRT computes float layers in f32; hint '{hint}' is not there.")
        if device != "CPU":
            raise UserError(f"LiteRT is run on the CPU here; there is no device '{device}'.")
        try:
            self._content = artifact.path.read_bytes()
            self._model = read(self._content)
            self._net = Network(self._content, threads)
        except (OSError, ValueError, RuntimeError) as e:
            raise UserError(f"{artifact.path}: LiteRT cannot load it: {e}") from None
        self._cut: dict[bool, Network] = {}  # whether its units are fed -> the network

    @property
    def version(self) -> str:
        """The runtime's version."""
        return version("ai-edge-litert")

    def run(self, inputs: Inputs) -> list[Array]:
        """The outputs for one batch of any size."""
        outputs = self._net.run(self._checked(inputs))
        order = facts_of(self._model).get(f"{KEY}.outputs")
        return [outputs[k] for k in (json.loads(order) if order else range(len(outputs)))]

    def run_units(
        self, inputs: Inputs, feed: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """The tensor of every unit, in execution order; see `Loaded`.

        Raises:
            UserError: the file has no tensor of a unit's name.
        """
        ids, fed = [u.id for u in self.artifact.units], feed is not None
        tensors = {name_of(t): t for t in self._model.subgraphs[0].tensors}
        missing = [id for id in ids if id not in tensors]
        if missing:
            raise UserError(f"{self.artifact.path} has no tensor '{missing[0]}', a unit of it.")
        if fed not in self._cut:
            self._cut[fed] = Network(readable(self._content, ids, fed), self.threads)
        net, values = self._cut[fed], self._checked(inputs)
        for name in net.inputs[len(values) :]:
            id = name.removesuffix(FED)
            values.append(_stored(np.asarray((feed or {})[id]), grid_of(tensors[id])))
        found = dict(zip(dict.fromkeys(ids), net.run(values), strict=True))
        return {id: _seen(found[id], grid_of(tensors[id])) for id in ids}

    def kernels(self) -> list[Kernel]:
        """The file's operators; those that XNNPACK took are named so."""
        graph = self._model.subgraphs[0]
        units = works_for(graph, {u.id for u in self.artifact.units})
        delegated = self._net.delegated()
        out = []
        for op, unit in zip(graph.operators, units, strict=True):
            whole = graph.tensors[op.outputs[0]].type == INT8
            place = "XNNPACK " if int(op.outputs[0]) in delegated else ""
            type = place + type_of(self._model, op)
            out.append(Kernel(unit, type, "int8" if whole else "f32"))
        return out

    def _step(self, batch: int) -> Callable[[], Any]:
        if not self.artifact.inputs:
            raise UserError(f"{self.artifact.path} does not say what its inputs are.")
        net = Network(self._content, self.threads)
        given = [
            timing_input((batch, *shape[1:]), kind)
            for (_, shape), kind in zip(self.artifact.inputs, net.kinds, strict=True)
        ]
        return net.step(given)

    def _checked(self, inputs: Inputs) -> list[Array]:
        values = arrays(inputs)
        known = len(self._net.inputs)
        if len(values) != known:
            raise UserError(f"the model has {known} inputs, got {len(values)}.")
        return [v.astype(k, copy=False) for v, k in zip(values, self._net.kinds, strict=True)]


class Network:
    """An interpreter that follows the batch of what it is given.

    Attributes:
        inputs: names of its inputs, in order.
        kinds: their types.
    """

    def __init__(self, content: bytes, threads: int):
        self._net = _import().Interpreter(model_content=content, num_threads=threads)
        self._net.allocate_tensors()
        given = self._net.get_input_details()
        self.inputs, self.kinds = [d["name"] for d in given], [d["dtype"] for d in given]
        self._at = [d["index"] for d in given]
        self._out = [d["index"] for d in self._net.get_output_details()]
        self._shapes = [tuple(d["shape"]) for d in given]
        self._looped = False

    def run(self, values: list[Array]) -> list[Array]:
        """The outputs of one batch."""
        n = len(values[0])
        if not self._looped:
            try:
                self._resize(values)
                self._invoke(values)
                found = [self._net.get_tensor(k) for k in self._out]
                if n == 1 or all(x.ndim and len(x) == n for x in found):
                    return found
            except (RuntimeError, ValueError):
                if n == 1:
                    raise
            self._looped = True
        rows = []
        for k in range(n):
            one = [v[k : k + 1] for v in values]
            self._resize(one)
            self._invoke(one)
            rows.append([self._net.get_tensor(k) for k in self._out])
        return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

    def step(self, values: list[Array]) -> Callable[[], Any]:
        """One inference on these inputs, again and again."""
        self.run(values)
        if not self._looped:
            return lambda: self._invoke(values)
        ones = [[v[k : k + 1] for v in values] for k in range(len(values[0]))]

        def step() -> None:
            for one in ones:
                self._invoke(one)

        return step

    def delegated(self) -> set[int]:
        """Places of the tensors that XNNPACK computes, so far as the interpreter tells.

        A delegate is an operator behind the file's own, which shows what it reads and makes:
        whatever lies between these is its.
        """
        try:
            steps = self._net._get_ops_details()
        except (AttributeError, RuntimeError):  # no public part of it
            return set()
        maker = {int(t): s for s in steps if s["op_name"] != DELEGATE for t in s["outputs"]}
        out: set[int] = set()
        for step in steps:
            if step["op_name"] != DELEGATE:
                continue
            given, left = {int(t) for t in step["inputs"]}, [int(t) for t in step["outputs"]]
            while left:
                t = left.pop()
                if t in out or t in given or t not in maker:
                    continue
                out.add(t)
                left += [int(i) for i in maker[t]["inputs"]]
        return out

    def _resize(self, values: list[Array]) -> None:
        shapes = [v.shape for v in values]
        if shapes != self._shapes:
            for k, shape in zip(self._at, shapes, strict=True):
                self._net.resize_tensor_input(k, list(shape))
            self._net.allocate_tensors()
            self._shapes = shapes

    def _invoke(self, values: list[Array]) -> None:
        for k, value in zip(self._at, values, strict=True):
            self._net.set_tensor(k, value)
        self._net.invoke()


def _import() -> Any:
    try:
        from ai_edge_litert import interpreter
    except ImportError:
        raise MissingExtra("LiteRT", "litert") from None
    return interpreter


def _seen(values: Array, grid: Grid | None) -> Array:
    """A tensor as PyTorch has it: floats, channels behind the batch."""
    if grid is not None:
        values = (values.astype(np.float32) - grid.zero_point) * np.float32(grid.scale)
    return np.moveaxis(values, -1, 1) if values.ndim == IMAGE else values


def _stored(values: Array, grid: Grid | None) -> Array:
    """A tensor as the file has it."""
    values = np.moveaxis(values, 1, -1) if values.ndim == IMAGE else values
    if grid is not None:
        values = np.rint(values / np.float64(grid.scale)) + grid.zero_point
        return np.ascontiguousarray(np.clip(values, -128, 127).astype(np.int8))
    return np.ascontiguousarray(values)
