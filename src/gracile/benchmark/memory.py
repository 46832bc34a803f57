"""The most memory that running an artifact takes, seen in a process of its own.

``python -m gracile.benchmark.memory`` is that process: an artifact and settings as JSON on its
standard input, bytes as JSON on its standard output.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gracile.benchmark.artifact import Artifact
from gracile.benchmark.runtimes.base import load, runtime_class
from gracile.errors import UserError

STATUS = Path("/proc/self/status")
RUNS = 3
LIMIT_S = 300.0


@dataclass(frozen=True)
class Memory:
    """Memory of a process that loads an artifact and runs it.

    Attributes:
        peak_bytes: the most that was resident: interpreter, libraries, runtime, network, tensors.
        added_bytes: what of it came with loading and running: the runtime's libraries, the network,
            its tensors. Between networks in one runtime it differs by the networks.
    """

    peak_bytes: int
    added_bytes: int


def peak_memory(
    artifact: Artifact,
    *,
    threads: int = 1,
    hint: str = "f32",
    batch: int = 1,
    device: str = "CPU",
) -> Memory:
    """Load and run an artifact in a new process, and read its peak from the operating system.

    Args:
        artifact: a whole file; weights that need a module of this process cannot be measured.

    Raises:
        UserError: not on Linux, an artifact that is no whole file, or the process failed.
    """
    if not STATUS.exists():
        raise UserError("peak memory is read from /proc, which only Linux has; leave it out.")
    if artifact.module is not None or artifact.path.suffix == ".safetensors":
        raise UserError(
            f"{artifact.path} is run by a module of this process, so its memory cannot be told "
            "apart; measure an artifact that is a whole file."
        )
    task = {
        "artifact": artifact.to_dict(),
        "settings": {"threads": threads, "hint": hint, "batch": batch, "device": device},
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "gracile.benchmark.memory"],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{artifact.path}: not run within {LIMIT_S:.0f} s; no peak.") from None
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise UserError(f"{artifact.path}: running it in a process of its own failed: {why}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def in_this_process(task: dict[str, Any]) -> Memory:
    """What the child does: load, run a few times, read the peak."""
    artifact = Artifact.from_dict(task["artifact"])
    runtime_class(artifact.runtime)  # its Python modules are no part of what the network adds
    before = resident("VmRSS")
    _forget_peak()
    loaded = load(artifact, **task["settings"])
    loaded.time(RUNS)
    peak = resident("VmHWM")
    return Memory(peak_bytes=peak, added_bytes=max(0, peak - before))


def resident(key: str) -> int:
    """Bytes that the operating system states for this process: VmRSS is now, VmHWM the most."""
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise UserError(f"{STATUS} says no {key}.")


def _forget_peak() -> None:
    """Begin a new peak: importing may have needed more than is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # a sandbox without it: the peak then includes what importing took


if __name__ == "__main__":
    found = in_this_process(json.load(sys.stdin))
    print(json.dumps(vars(found)))
