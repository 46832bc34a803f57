"""One architecture in a process of its own, so that a crash or a hang is a row and not the end."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def outcome_of(module: str, arguments: Sequence[str], file: Path, seconds: int) -> dict[str, Any]:
    """Run a module on one thread; the JSON it writes to `file`, or `text`: how it ended instead."""
    command = [sys.executable, "-m", module, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, timeout=seconds, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return {"text": f"not done after {seconds} s"}
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"text": f"exit code {done.returncode}: {last}"}
