"""ExecuTorch: runs `.pte` on the CPU, by XNNPACK where it was lowered to it."""

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gracile.benchmark.artifact import KEY, Artifact, facts_behind, units_path
from gracile.benchmark.runtimes.base import Array, Inputs, Kernel, Loaded, arrays, timing_input
from gracile.errors import MissingExtra, UserError
from gracile.registry import register

_pool: list[int] = []  # threads of the process's one pool, once a program was loaded


@register("runtime", "executorch", source="https://docs.pytorch.org/executorch")
class ExecuTorch(Loaded):
    """ExecuTorch. Programs are for a batch of 1: samples run one after the other.

    All programs of a process share one pool of threads, whose size is fixed by the first of them.
    """

    name = "executorch"

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
        if hint != "f32":
            raise UserError(f"ExecuTorch computes float layers in f32; hint '{hint}' is not there.")
        if device != "CPU":
            raise UserError(f"ExecuTorch is run on the CPU here; there is no device '{device}'.")
        self._facts = facts_behind(artifact.path.read_bytes())
        _pin(threads)
        self._method = self._load(artifact.path)
        self._cut: Any = None  # the program of the units

    @property
    def version(self) -> str:
        """The runtime's version."""
        return version("executorch")

    def run(self, inputs: Inputs) -> list[Array]:
        """The outputs for one batch of any size."""
        values = self._checked(inputs)
        rows = [
            [np.array(x) for x in self._method.execute([v[k : k + 1] for v in values])]
            for k in range(len(values[0]))
        ]
        return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

    def run_units(
        self, inputs: Inputs, feed: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """The tensor of every unit, in execution order; see `Loaded`.

        They are read from the second program that was exported beside the artifact.

        Raises:
            UserError: it is not there.
        """
        values, ids = self._checked(inputs), [u.id for u in self.artifact.units]
        path = units_path(self.artifact.path)
        if not path.is_file():
            raise UserError(f"{path} shows this artifact's units, and is not there: export again.")
        self._cut = self._cut or self._load(path)
        names: list[str] = json.loads(self._facts[f"{KEY}.fed"])
        rows = [self._units_of_one(values, k, ids, names, feed) for k in range(len(values[0]))]
        return {id: np.concatenate([row[id] for row in rows]) for id in ids}

    def kernels(self) -> list[Kernel]:
        """What XNNPACK was given and what portable kernels run, as it was lowered."""
        return [Kernel(*k) for k in json.loads(self._facts.get(f"{KEY}.kernels", "[]"))]

    def _units_of_one(
        self,
        values: list[Tensor],
        k: int,
        ids: list[str],
        names: list[str],
        feed: Mapping[str, Array] | None,
    ) -> dict[str, Array]:
        one = [v[k : k + 1] for v in values]
        if feed is not None:
            fed = [torch.from_numpy(np.array(feed[id][k : k + 1])) for id in names]
            return self._executed(one, fed, ids)
        shapes = dict(json.loads(self._facts[f"{KEY}.shapes"]))
        found = {id: np.zeros(shapes[id], np.float32) for id in ids}
        for _ in ids:  # with its own results as inputs, one more unit is right each time
            before = found
            found = self._executed(one, [torch.from_numpy(found[id]) for id in names], ids)
            if all(np.array_equal(found[id], before[id]) for id in ids):
                break
        return found

    def _executed(self, one: list[Tensor], fed: list[Tensor], ids: list[str]) -> dict[str, Array]:
        try:
            results = self._cut.execute([*one, *fed])
        except RuntimeError as e:
            raise UserError(
                f"{units_path(self.artifact.path)}: ExecuTorch cannot run the program that shows "
                f"the units, so this artifact cannot be checked: {e}"
            ) from e
        return {id: np.array(x) for id, x in zip(ids, results, strict=True)}

    def _step(self, batch: int) -> Callable[[], Any]:
        if not self.artifact.inputs:
            raise UserError(f"{self.artifact.path} does not say what its inputs are.")
        inputs = [
            torch.from_numpy(timing_input((1, *shape[1:]), np.float32))
            for _, shape in self.artifact.inputs
        ]

        def step() -> None:
            for _ in range(batch):
                self._method.execute(inputs)

        return step

    def _checked(self, inputs: Inputs) -> list[Tensor]:
        values = arrays(inputs)
        known = len(self.artifact.inputs)
        if known and len(values) != known:
            raise UserError(f"the model has {known} inputs, got {len(values)}.")
        return [torch.from_numpy(v) for v in values]

    def _load(self, path: Any) -> Any:
        from executorch.runtime import Runtime, Verification

        try:
            program = Runtime.get().load_program(path, verification=Verification.Minimal)
            return program.load_method("forward")
        except Exception as e:  # it raises plain RuntimeErrors and worse
            raise UserError(f"{path}: ExecuTorch cannot load it: {e}") from e


def _pin(threads: int) -> None:
    """Size the process's pool before its first program; afterwards it can only be the same."""
    try:
        from executorch.extension.pybindings import portable_lib
    except ImportError:
        raise MissingExtra("ExecuTorch", "executorch") from None
    if not _pool:
        portable_lib._unsafe_reset_threadpool(threads)
        _pool.append(threads)
    if _pool[0] != threads:
        raise UserError(
            f"this process runs ExecuTorch with {_pool[0]} threads, which cannot be changed once a "
            f"program was loaded: measure with {threads} in a process of its own."
        )
