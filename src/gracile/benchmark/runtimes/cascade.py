"""A network with early exits in a runtime: its stages one after the other, until an exit is sure.

The stages are artifacts of one runtime in one folder; `cascade.json` beside them says what each
reads and gives, and how sure an exit must be. The file is read and the stages run without torch.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gracile.benchmark.artifact import CASCADE, Artifact, open_artifact, stage_files
from gracile.benchmark.runtimes.base import Array, Inputs, Kernel, Loaded, arrays, load
from gracile.errors import UserError


@dataclass(frozen=True)
class Step:
    """One stage of a cascade.

    Attributes:
        reads: names of its inputs: of the network's, or of what earlier stages give.
        makes: names of what it gives, the answer first.
        threshold: an input leaves where the normalized entropy of its answer is below; None for
            the last stage.
        temperature: answers are divided by it first.
    """

    reads: tuple[str, ...]
    makes: tuple[str, ...]
    threshold: float | None
    temperature: float


class Cascade(Loaded):
    """Stages of a network in one runtime.

    `run` stops at the first exit that is sure; of a batch, only what is left goes on, filled up to
    a power of two, so that a runtime with fixed shapes sees few of them. `time`, which has no real
    inputs, runs all stages: how long it takes where no exit is sure. For real ones see
    `gracile.benchmark.inputs`.

    Attributes:
        stages: the loaded stages, in order.
        steps: what each reads, gives and decides.
    """

    name = "cascade"

    def __init__(self, artifact: Artifact, **options: Any):
        self.name = artifact.runtime  # type: ignore[misc]  # what its stages run in
        super().__init__(artifact, **options)
        self.steps = steps(artifact.path)
        self.stages = [load(open_artifact(p), **options) for p in stage_files(artifact.path)]
        made = {n for s in self.steps for n in s.makes}
        self._inputs = list(dict.fromkeys(n for s in self.steps for n in s.reads if n not in made))

    @property
    def version(self) -> str:
        """The runtime's version."""
        return self.stages[0].version

    def run(self, inputs: Inputs) -> list[Array]:
        """The answers to one batch of any size, each of the first exit that is sure."""
        return [self.answer(inputs)[0]]

    def answer(self, inputs: Inputs) -> tuple[Array, npt.NDArray[np.int64]]:
        """Answers (N, C), and the number of the exit (N,) that gave each; the end is the last."""
        known = self._named(inputs)
        n = len(next(iter(known.values())))
        left = np.arange(n)
        taken = np.full(n, len(self.steps) - 1)
        out: Array | None = None
        for k, (stage, step) in enumerate(zip(self.stages, self.steps, strict=True)):
            made = stage.run([_filled(known[name]) for name in step.reads])
            known |= {name: x[: len(left)] for name, x in zip(step.makes, made, strict=True)}
            answers = known[step.makes[0]]
            if out is None:
                out = np.zeros((n, *answers.shape[1:]), answers.dtype)
            if step.threshold is None:
                out[left] = answers
                break
            sure = entropy(answers, step.temperature) < step.threshold
            out[left[sure]], taken[left[sure]] = answers[sure], k
            if sure.all():
                break
            if sure.any():
                left = left[~sure]
                known = {name: x[~sure] for name, x in known.items()}
        assert out is not None
        return out, taken

    def run_units(
        self, inputs: Inputs, feed: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Nothing: each stage shows its own units."""
        return {}

    def kernels(self) -> list[Kernel]:
        """The steps of all stages' programs."""
        return [kernel for stage in self.stages for kernel in stage.kernels()]

    def _step(self, batch: int) -> Callable[[], Any]:
        every = [stage.step(batch) for stage in self.stages]

        def run() -> None:
            for step in every:
                step()

        return run

    def _named(self, inputs: Inputs) -> dict[str, Array]:
        values = arrays(inputs)
        if len(values) != len(self._inputs):
            raise UserError(f"the model has {len(self._inputs)} inputs, got {len(values)}.")
        return dict(zip(self._inputs, values, strict=True))


def entropy(logits: Array, temperature: float) -> Array:
    """As `gracile.nn.exits.entropy`, of arrays: (N, C) -> (N,) in [0, 1].

    >>> entropy(np.array([[0.0, 0.0], [50.0, 0.0]]), 1.0).round(3).tolist()
    [1.0, 0.0]
    """
    x = logits.astype(np.float64) / temperature
    x = x - x.max(1, keepdims=True)
    e = np.exp(x)
    total = e.sum(1)
    found: Array = (np.log(total) - (e * x).sum(1) / total) / log(logits.shape[1])
    return np.maximum(found, 0)


def steps(path: Path) -> list[Step]:
    """What the stages of a cascade read, give and decide.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return [
            Step(tuple(s["reads"]), tuple(s["makes"]), s["threshold"], float(s["temperature"]))
            for s in json.loads(path.read_text())["stages"]
        ]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: what gracile wrote into {CASCADE} is damaged: {e}.") from None


def _filled(x: Array) -> Array:
    """A batch filled up to a power of two with copies of its first row."""
    size = 1 << (len(x) - 1).bit_length()
    return x if size == len(x) else np.concatenate([x, np.repeat(x[:1], size - len(x), 0)])
