"""A network from the user's own file: `net.py:factory`, typed on the command line.

The only place where gracile runs code by path, and only because the user named the file.
"""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from gracile.errors import UserError, nearest


def factory_of(path: str, name: str) -> Callable[..., Any]:
    """The object `name` of a Python file: a function or class that makes the network.

    The file's folder is importable while the file runs, as it is for a script.

    Raises:
        UserError: no such file, no such name in it, the file fails, or the object cannot make a
            network.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file (looked in {Path.cwd()}).")
    module = _run(file)
    if not hasattr(module, name):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise UserError(f"{path} has no '{name}'.{nearest(name, known)}")
    found = getattr(module, name)
    if isinstance(found, nn.Module):
        return _ready_made(found)
    if not callable(found):
        kind = type(found).__name__
        raise UserError(
            f"{path}:{name} must be a function or class that returns a network: {kind}."
        )
    return _in_folder(file, found)


def blame(error: BaseException, path: str) -> str:
    """Where in the user's file an exception is from, and what it says: `a.py:12: ValueError: x`."""
    file = Path(path).resolve()
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if _same(f.filename, file)]
    if isinstance(error, SyntaxError) and _same(error.filename or "", file):
        lines.append(error.lineno)
    place = f"{path}:{lines[-1]}" if lines else path
    return f"{place}: {type(error).__name__}: {error}"


def _run(file: Path) -> ModuleType:
    digest = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]
    module_name = f"gracile_user_{file.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file}: must be a Python file (.py).")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and torch.export look a class's module up
    try:
        with _importable(file.resolve().parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        sys.modules.pop(module_name, None)
        raise UserError(f"cannot import {blame(e, str(file))}") from e
    return module


def _in_folder(file: Path, make: Callable[..., Any]) -> Callable[..., Any]:
    def factory(*args: Any, **kwargs: Any) -> Any:
        with _importable(file.resolve().parent):
            return make(*args, **kwargs)

    factory.__wrapped__ = make  # type: ignore[attr-defined]  # inspect.signature sees through
    return factory


def _ready_made(model: nn.Module) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        """The network the file made itself."""
        return model

    return factory


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _same(name: str, file: Path) -> bool:
    return bool(name) and Path(name).resolve() == file
