"""What makes a run repeatable and unbreakable: atomic files, derived seeds, the environment.

A file is written to a temporary name, fsynced and renamed, so a reader sees the old or the new
content and never a torn one, whatever instant the process dies at.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gracile.errors import UserError

T = TypeVar("T")


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step; its folder is made if needed."""
    write_atomic_with(path, lambda tmp: tmp.write_bytes(data) and None)


def write_atomic_with(path: Path, writer: Callable[[Path], Any]) -> None:
    """Let `writer` fill a temporary file beside `path`, then fsync and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer(tmp)
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, two spaces a level."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path, make: Callable[[Any], T]) -> T:
    """What `make` makes of a JSON file.

    Args:
        make: raises a ValueError (a UserError is one) for content that is not its own.

    Raises:
        UserError: no such file, no JSON, or what `make` says; begins with the path.
    """
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except ValueError as e:
        raise UserError(f"{path}: {e}") from None


def sha256(data: bytes | str) -> str:
    """Hex digest of bytes or UTF-8 text."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def derive_seed(seed: int, *path: object) -> int:
    """A 63-bit seed for one purpose, derived from the recipe's seed.

    Independent purposes ("shuffle", epoch) get independent streams, so adding a consumer of
    randomness never shifts another's.
    """
    return int(sha256(repr((seed, *path)))[:16], 16) >> 1


def environment() -> dict[str, Any]:
    """What bit-equal resumption depends on: torch, threads, processor features."""
    import torch

    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
