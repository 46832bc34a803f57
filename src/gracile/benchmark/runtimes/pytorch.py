"""PyTorch itself as a runtime: the baseline everyone knows, and the reference of parity checks."""

import copy
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from gracile.benchmark.artifact import KEY, Artifact, Unit
from gracile.benchmark.csr import with_csr_layers
from gracile.benchmark.integer_engine import ENGINES, engine, in_integers, steps_of
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
from gracile.errors import UserError
from gracile.graph.capture import capture
from gracile.graph.graph import Graph, Node
from gracile.graph.instrument import SUFFIX
from gracile.registry import register

FORMS = ("compile", "sparse", *ENGINES)
SCALE_OF = "scale of "  # and a weight's address: the scale of its integers in a file


@register("runtime", "pytorch", source="https://pytorch.org, eager mode and torch.compile")
class PyTorch(Loaded):
    """PyTorch. A quantized model is simulated in floats, unless an engine is named.

    Besides "CPU" and devices of torch ("cuda:0"), `device` names a form of the network on the CPU:
    "compile" is torch.compile's program, "sparse" multiplies linear layers with many zeros as CSR
    where that is faster for the batch (see `benchmark.csr`), "x86" and "qnnpack" compute in
    integers by these engines (see `benchmark.integer_engine`). Units of a compiled or sparse
    network are shown by the eager one.

    Args:
        module: the model the artifact's weights belong to; it is copied.
    """

    name = "pytorch"

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int = 1,
        hint: str = "f32",
        batch: int | None = None,
        device: str = "CPU",
        module: nn.Module | None = None,
    ):
        super().__init__(artifact, threads=threads, hint=hint, batch=batch, device=device)
        module = module if module is not None else artifact.module
        if module is None:
            raise UserError(
                f"{artifact.path} holds weights only: give the model they belong to (module=...)."
            )
        try:
            self._device = torch.device("cpu" if device in FORMS else device.lower())
            self.module = copy.deepcopy(module).to(self._device).eval()
        except (RuntimeError, AssertionError) as e:
            raise UserError(f"PyTorch here cannot use device '{device}': {e}") from None
        self._load_weights()
        self._captured: Graph | None = None
        self._form = device if device in FORMS else None
        self._called: Callable[..., Any] = self.module
        self._lowered: fx.GraphModule | None = None
        if self._form in ENGINES:
            self._called = self._lowered = self._in_integers()
        elif self._form == "compile":
            self._called = torch.compile(self.module)
        elif self._form == "sparse":
            self._called = copy.deepcopy(self.module)
            if not with_csr_layers(self._called):
                warnings.warn(
                    f"{artifact.path}: no linear layer has so many zeros that CSR is faster for "
                    "any batch; it runs as in eager mode.",
                    stacklevel=3,
                )

    @property
    def version(self) -> str:
        """PyTorch's version."""
        return str(torch.__version__)

    @property
    def precision(self) -> str:
        """Float32, but for the integer engines, which compute what they can in integers."""
        if self._lowered is None:
            return self.artifact.precision
        layers = [k for k in self.kernels() if k.is_convolution or "inear" in k.type]
        whole = [k for k in layers if k.is_integer]
        return "f32" if not whole else "int8" if len(whole) == len(layers) else "mixed"

    def run(self, inputs: Inputs) -> list[Array]:
        """The outputs for one batch of any size."""
        with self._pinned():
            out = self._called(*self._tensors(inputs))
        return [x.float().cpu().numpy() for x in flat(out)]

    def run_units(
        self, inputs: Inputs, feed: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """The tensor of every unit, in execution order; see `Loaded`."""
        tensors = self._tensors(inputs)
        module = self._lowered or self._followed()
        with self._pinned():
            return unit_values(module, self.artifact.units, tensors, feed)

    def kernels(self) -> list[Kernel]:
        """The operators of the captured graph, of which eager mode runs each as it stands.

        A compiled network is one step: what it was fused into is in no graph that can be read.
        """
        if self._form == "compile":
            return [Kernel("", "compiled program", self.hint)]
        if self._lowered is not None:
            steps = steps_of(self._lowered, [u.id for u in self.artifact.units], self.hint)
            return [Kernel(unit, kind, precision) for _, unit, kind, precision in steps]
        return [Kernel(unit, node.op, self.hint) for node, unit in self._steps()]

    def counters(self, batch: int | None = None) -> Counters:
        """Eager mode has no counters: the time of each call of the captured graph; see `Loaded`."""
        if self._form in ("compile", "sparse"):
            return super().counters(batch)
        if self._lowered is None:
            module = self._followed()
            steps = [(node.id, unit, node.op) for node, unit in self._steps()]
        else:
            module, ends = self._lowered, [u.id for u in self.artifact.units]
            steps = [(id, unit, kind) for id, unit, kind, _ in steps_of(module, ends, self.hint)]
        clock = _Clock(module, self._wait)
        inputs = self._fixed(batch or self.batch)
        names = [id for id, _, _ in steps]
        layers = tuple(CountedLayer(id, kind, (unit,) if unit else ()) for id, unit, kind in steps)

        def times(n: int) -> Array:
            out = np.empty((n, len(names)))
            for row in out:
                with self._pinned():
                    clock.run(*inputs)
                row[:] = [clock.ms[name] for name in names]
            return out

        return Counters(layers, times)

    def streams(self, n: int, batch: int | None = None) -> list[Callable[[], Any]]:
        """The same module from several threads, which keeps nothing in eval mode."""
        return [self._step(batch or self.batch) for _ in range(n)]

    def _steps(self) -> list[tuple[Node, str]]:
        """Operators as they run, each with the unit it works for ("" behind the last one)."""
        ends = {u.id for u in self.artifact.units}
        out: list[tuple[Node, str]] = []
        waiting: list[Node] = []
        for node in self._graph():
            if node.op in ("input", "output", "param"):
                continue
            waiting.append(node)
            if node.id in ends:
                out += [(n, node.id) for n in waiting]
                waiting = []
        return out + [(n, "") for n in waiting]

    def _step(self, batch: int) -> Callable[[], Any]:
        tensors = self._fixed(batch)

        def step() -> None:
            with self._pinned():
                self._called(*tensors)
                self._wait()

        return step

    def _fixed(self, batch: int) -> list[Tensor]:
        shapes = ((batch, *shape[1:]) for _, shape in self._shapes())
        return self._tensors([timing_input(shape, np.float32) for shape in shapes])

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _shapes(self) -> Sequence[tuple[str, tuple[int, ...]]]:
        if not self.artifact.inputs:
            raise UserError(f"{self.artifact.path} does not say what its inputs are.")
        return self.artifact.inputs

    def _graph(self) -> Graph:
        if self._captured is None:
            example = tuple(
                torch.zeros((2, *s[1:]), device=self._device) for _, s in self._shapes()
            )
            self._captured = capture(self.module, example)
        return self._captured

    def _followed(self) -> fx.GraphModule:
        graph = self._graph()
        if graph.module is None:
            raise UserError(f"the model cannot be looked into: {graph.reason}")
        return graph.module

    def _in_integers(self) -> fx.GraphModule:
        known = torch.backends.quantized.supported_engines
        if self._form not in known:
            raise UserError(
                f"PyTorch here has no engine '{self._form}'; it has {', '.join(known)}."
            )
        with engine(self._form):
            return in_integers(self._followed(), self._scales)

    def _load_weights(self) -> None:
        from safetensors import safe_open
        from safetensors.torch import load_file

        with safe_open(self.artifact.path, framework="pt") as file:
            facts = file.metadata() or {}
        addresses = json.loads(facts.get(f"{KEY}.scales", "[]"))
        try:
            state = load_file(self.artifact.path)
            self._scales = {a: state.pop(SCALE_OF + a) for a in addresses}
            state |= {a: _floats(state[a], scale) for a, scale in self._scales.items()}
        except (ValueError, KeyError, RuntimeError) as e:
            raise UserError(f"{self.artifact.path}: {e}") from None
        mine = self.module.state_dict()
        wrong = [k for k in mine if k not in state or state[k].shape != mine[k].shape]
        wrong += [k for k in state if k not in mine]
        if wrong:
            raise UserError(
                f"{self.artifact.path} does not fit {type(self.module).__name__}: '{wrong[0]}' is "
                f"missing or has another shape ({len(wrong)} such tensors)."
            )
        self.module.load_state_dict(state)

    def _tensors(self, inputs: Inputs) -> list[Tensor]:
        return [torch.from_numpy(x).to(self._device) for x in arrays(inputs)]

    @contextmanager
    def _pinned(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        dtype = torch.float16 if self.hint == "f16" else torch.bfloat16
        low = torch.autocast(self._device.type, dtype, enabled=self.hint != "f32")
        kernels = nullcontext() if self._lowered is None else engine(str(self._form))
        try:
            with torch.inference_mode(), low, kernels:
                yield
        finally:
            torch.set_num_threads(before)


def unit_values(
    module: fx.GraphModule,
    units: Sequence[Unit],
    inputs: Sequence[Tensor],
    feed: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """The tensor of every unit when a captured graph runs; behind its quantizer if it has one.

    Args:
        module: a captured graph, in eval mode.
        units: whose tensors are wanted.
        inputs: one batch.
        feed: unit id -> tensor that its readers get instead.
    """
    there = {str(node.meta["id"]) for node in module.graph.nodes}
    place = {u.id: u.id + SUFFIX if u.id + SUFFIX in there else u.id for u in units}
    given = {place[unit]: x for unit, x in (feed or {}).items() if unit in place}
    found = node_values(module, set(place.values()), inputs, given)
    return {unit: found[at] for unit, at in place.items()}


@torch.no_grad()
def node_values(
    module: fx.GraphModule,
    ids: Collection[str],
    inputs: Sequence[Tensor],
    feed: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """What nodes compute when a captured graph runs, by id; ids that are not there are left out.

    Args:
        module: a captured graph, in eval mode.
        ids: whose tensors are wanted.
        inputs: one batch.
        feed: node id -> tensor that its readers get instead.
    """
    reader = _Reader(module, ids, feed or {})
    reader.run(*inputs)
    return reader.found


class _Reader(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, ids: Collection[str], feed: Mapping[str, Array]):
        super().__init__(module)
        self.ids, self.feed = ids, feed
        self.found: dict[str, Array] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; keep its result (a copy: layers may work in place) or replace it."""
        out = super().run_node(n)
        name = str(n.meta["id"])
        if name in self.ids:
            floats = out.dequantize() if out.is_quantized else out
            self.found[name] = floats.detach().float().cpu().numpy().copy()
        if name in self.feed:
            fed = torch.from_numpy(self.feed[name].copy())
            out = _on_grid_of(out, fed) if out.is_quantized else fed.to(out.device, out.dtype)
        return out


def _on_grid_of(like: Tensor, x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, like.q_scale(), like.q_zero_point(), like.dtype)


def _floats(integers: Tensor, scale: Tensor) -> Tensor:
    """What integers stand for; computed as the exporter compared it."""
    wide = scale if scale.dim() == 0 else scale.reshape(-1, *[1] * (integers.dim() - 1))
    return integers.float() * wide


class _Clock(fx.Interpreter):
    """Runs a captured graph and keeps how long each of its calls took, in ms."""

    def __init__(self, module: fx.GraphModule, wait: Callable[[], None]):
        super().__init__(module)
        self.wait, self.ms = wait, dict[str, float]()

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep its time."""
        start = perf_counter()
        out = super().run_node(n)
        self.wait()
        self.ms[str(n.meta["id"])] = (perf_counter() - start) * 1e3
        return out


def flat(output: Any) -> list[Tensor]:
    """The tensors in a model's output, in the order an exporter writes them."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, Tensor)]
