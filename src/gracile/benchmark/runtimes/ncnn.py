"""ncnn: runs `.param` with `.bin`, on the CPU, one image at a time."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from gracile.benchmark.artifact import KEY, Artifact, unit_in
from gracile.benchmark.param import Layer, read, readable, write
from gracile.benchmark.runtimes.base import Array, Inputs, Kernel, Loaded, arrays, timing_input
from gracile.errors import MissingExtra, UserError
from gracile.registry import register

NO_STEP = ("Input", "Split", "MemoryData", "Noop")
TO_INTEGERS = "Quantize"


@register("runtime", "ncnn", source="https://github.com/Tencent/ncnn")
class Ncnn(Loaded):
    """ncnn. It knows no batch: samples run one after the other.

    Floats are stored and computed in 32 bits; with the hints "bf16" and "f16"
    they are stored in 16 where ncnn has such layers for the processor (float16: on Arm).
    """

    name = "ncnn"

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
        if device != "CPU":
            raise UserError(f"ncnn is run on the CPU here; there is no device '{device}'.")
        try:
            self._layers, facts = read(artifact.path.read_text())
            self._net = self._open(self._layers)
        except (OSError, ValueError) as e:
            raise UserError(f"{artifact.path}: ncnn cannot load it: {e}") from None
        self._scales = {k: float(v) for k, v in _json(facts, "scales", {}).items()}
        self._inputs = [x.outputs[0] for x in self._layers if x.type == "Input"]
        self._outputs: list[str] = _json(facts, "outputs", list(self._net.output_names()))
        self._cut: Any = None  # the network whose units are fed

    @property
    def version(self) -> str:
        """The runtime's version."""
        return str(_import().__version__)

    def run(self, inputs: Inputs) -> list[Array]:
        """The outputs for one batch of any size."""
        found = self._each(self._net, self._named(inputs), self._outputs)
        return [found[name] for name in self._outputs]

    def run_units(
        self, inputs: Inputs, feed: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """The tensor of every unit, in execution order; see `Loaded`."""
        ids = [u.id for u in self.artifact.units]
        named = self._named(inputs)
        net = self._net
        if feed is not None:
            if self._cut is None:
                self._cut = self._open(readable(ids, self._layers))
            net = self._cut
            known = set(net.input_names())
            named |= {f"{id}.fed": self._stored(id, x) for id, x in feed.items()
                      if f"{id}.fed" in known}  # fmt: skip
        found = self._each(net, named, ids)
        return {id: found[id] * np.float32(self._scales.get(id, 1.0)) for id in ids}

    def kernels(self) -> list[Kernel]:
        """The layers that ncnn runs; integers are followed from layer to layer."""
        ids = {u.id for u in self.artifact.units}
        integer = dict.fromkeys(self._scales, True)
        out = []
        for loaded, x in zip(self._net.layers(), self._layers, strict=True):
            reads = any(integer.get(b, False) for b in x.inputs)
            if x.type == "Split":
                integer.update(dict.fromkeys(x.outputs, reads))
            if x.type in NO_STEP:
                continue
            kept = {"bf16": loaded.support_bf16_storage, "f16": loaded.support_fp16_storage}
            whole = x.in_integers or x.type == TO_INTEGERS
            label = "int8" if whole else self.hint if kept.get(self.hint) else "f32"
            out.append(Kernel(unit_in(x.name, ids), str(loaded.type), label))
        return out

    def _step(self, batch: int) -> Callable[[], Any]:
        mats = {}
        for x in self._layers:
            if x.type == "Input":
                whole = dict(self.artifact.inputs).get(x.outputs[0])
                if whole is None:
                    raise UserError(f"{self.artifact.path} does not say what its inputs are.")
                kind = np.int32 if x.outputs[0] in self._integers else np.float32
                mats[x.outputs[0]] = _mat(timing_input(whole[1:], kind))

        def step() -> None:
            for _ in range(batch):
                with self._extractor(self._net) as run:
                    for name, mat in mats.items():
                        run.input(name, mat)
                    for name in self._outputs:
                        run.extract(name)

        return step

    @property
    def _integers(self) -> set[str]:
        return {x.inputs[0] for x in self._layers if x.type == "Embed"}

    def _named(self, inputs: Inputs) -> dict[str, Array]:
        values = arrays(inputs)
        if len(values) != len(self._inputs):
            raise UserError(f"the model has {len(self._inputs)} inputs, got {len(values)}.")
        return dict(zip(self._inputs, values, strict=True))

    def _stored(self, id: str, values: Array) -> Array:
        """What a unit's tensor is inside: integers where it is on a grid."""
        scale = self._scales.get(id)
        if scale is None:
            return values
        return np.clip(np.rint(values / scale), -128, 127).astype(np.int8)

    def _each(
        self, net: Any, named: Mapping[str, Array], wanted: Sequence[str]
    ) -> dict[str, Array]:
        """The wanted tensors of every sample, stacked."""
        rows: dict[str, list[Array]] = {name: [] for name in wanted}
        for k in range(len(next(iter(named.values())))):
            with self._extractor(net) as run:
                run.set_light_mode(False)  # tensors that were read stay
                for name, values in named.items():
                    run.input(name, _mat(values[k]))
                for name in wanted:
                    failed, mat = run.extract(name)
                    if failed:
                        raise UserError(f"{self.artifact.path}: ncnn cannot compute '{name}'.")
                    rows[name].append(np.array(mat, np.float32))
                    del mat
        return {name: np.stack(values) for name, values in rows.items()}

    @contextmanager
    def _extractor(self, net: Any) -> Iterator[Any]:
        run = net.create_extractor()
        try:
            yield run
        finally:
            run.clear()  # its tensors lie in the network's memory, which must live longer

    def _open(self, layers: Sequence[Layer]) -> Any:
        net = _import().Net()
        options = net.opt
        options.num_threads = self.threads
        options.use_vulkan_compute = False
        for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"):
            setattr(options, name, self.hint == "f16")
        options.use_bf16_storage = options.use_bf16_packed = self.hint == "bf16"
        weights = self.artifact.path.with_suffix(".bin")
        with _said() as words:
            failed = net.load_param_mem(write(layers)) or net.load_model(str(weights))
        if failed:
            raise ValueError("; ".join(words) or "the weights do not fit the text")
        return net


def _import() -> Any:
    try:
        import ncnn
    except ImportError:
        raise MissingExtra("ncnn", "ncnn") from None
    return ncnn


def _mat(values: Array) -> Any:
    """A tensor of ncnn with memory of its own: one made of an array only borrows it."""
    kind = np.float32 if np.issubdtype(values.dtype, np.floating) else np.int32
    values = values if values.dtype == np.int8 else values.astype(kind)
    return _import().Mat(np.ascontiguousarray(values)).clone()


def _json(facts: Mapping[str, str], name: str, default: Any) -> Any:
    text = facts.get(f"{KEY}.{name}")
    return default if text is None else json.loads(text)


@contextmanager
def _said() -> Iterator[list[str]]:
    """What ncnn writes to the standard error of the process, as lines."""
    words: list[str] = []
    saved = os.dup(2)
    with TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield words
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            words += file.read().decode(errors="replace").splitlines()
