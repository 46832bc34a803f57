"""Runs the command line with a bomb in it: the n-th call of a named function kills the process.

SIGKILL cannot be caught: nothing is tidied up, as in a power cut. Runs are forked from one warm
process, because importing torch and the runtimes takes longer than the run.
"""

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "gracile.cli.main",
        "gracile.train.run",
        "gracile.report.html",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "openvino",
        "sklearn.datasets",
        "torch._dynamo",
        "torch._functorch.aot_autograd",
        "torch.onnx._internal.exporter._core",
    ]
)
LIMIT = 300  # seconds a run may take


@dataclass(frozen=True)
class Bomb:
    """Where a run dies: `module:function` or `module:Class.method`, as its caller finds it.

    Attributes:
        at: the function; it dies before the call does anything.
        call: which call, counted from 1.
        after: count only once this function has returned.
    """

    at: str
    call: int = 1
    after: str | None = None


class Process:
    """A run of `gracile ARGV` in a folder; what it prints is kept in files beside it."""

    def __init__(self, folder: Path, name: str, argv: list[str], bomb: Bomb | None = None):
        self.log = folder / f"{name}.log"
        self._process = CONTEXT.Process(target=_run, args=(folder, name, argv, bomb))
        self._process.start()

    def wait(self) -> int:
        """The exit status; negative: the signal that ended it."""
        self._process.join(LIMIT)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"the run took more than {LIMIT} s:\n{self.errors}")
        return self._process.exitcode

    def ended_within(self, seconds: float) -> bool:
        """Whether it ends by itself in so much time."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def kill(self) -> None:
        """SIGKILL from outside."""
        self._process.kill()
        self._process.join()

    @property
    def output(self) -> str:
        """What it wrote to stdout."""
        return self.log.with_suffix(".out").read_text()

    @property
    def errors(self) -> str:
        """What it wrote to stderr."""
        return self.log.read_text()


def _run(folder: Path, name: str, argv: list[str], bomb: Bomb | None) -> None:
    for stream, suffix in ((1, ".out"), (2, ".log")):
        os.dup2(os.open(folder / f"{name}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(folder)
    import torch

    from gracile.cli.main import main

    torch.set_num_threads(1)
    sys.argv = ["gracile", *argv]
    if bomb is not None:
        arm(bomb)
    sys.exit(main(argv))


def arm(bomb: Bomb) -> None:
    """Put the bomb into this process."""
    armed, calls = [bomb.after is None], [0]

    def explode(real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls[0] += armed[0]
        if calls[0] == bomb.call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    def light(real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        armed[0] = True
        return result

    _wrap(bomb.at, explode)
    if bomb.after is not None:
        _wrap(bomb.after, light)


def _wrap(name: str, around: Callable[..., Any]) -> None:
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *way, last = path.split(".")
    for part in way:
        owner = getattr(owner, part)
    real = getattr(owner, last)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(real, *args, **kwargs)

    setattr(owner, last, wrapped)
