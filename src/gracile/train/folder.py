"""The run directory: one run, written by one process at a time, continued only as it was begun.

The idea is ours: what a result depends on is kept in `state/run.json`, and a run that would end
otherwise is refused before anything is computed.
"""

import fcntl
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gracile.core.state import environment, write_atomic, write_json
from gracile.errors import ResumeError, UserError
from gracile.recipe.load import load as load_recipe
from gracile.recipe.schema import Recipe

HARDWARE = ("torch", "cpu", "machine")  # of `environment()`; threads are set as they were
LEFTOVER = re.compile(r"\..+\.\d+\..+")  # .<name>.<process>.<ending>: what a killed writer left


def begun(out: Path) -> bool:
    """Whether a run was begun in a directory."""
    return (out / "state" / "run.json").exists()


def check_folder(out: Path, identity: Mapping[str, Any], recipe: Recipe, *, resume: bool) -> None:
    """Refuse a directory that this run may not write to; nothing is changed.

    Args:
        out: may be absent.
        identity: what was asked for; every value must be the same again.
        recipe: what is run.
        resume: go on with what is there; an empty or absent directory is begun.

    Raises:
        UserError: another run or other files are there.
        ResumeError: the run there was begun with something else; names what.
    """
    if not begun(out):
        _refuse_foreign(out, resume)
    elif not resume:
        raise UserError(
            f"{out} already holds a run; continue it with --resume or choose another --out."
        )
    else:
        _refuse_other(out, read_begun(out), identity, recipe)


@contextmanager
def opened(out: Path, identity: Mapping[str, Any], recipe: Recipe) -> Iterator[None]:
    """Hold a checked run directory; half-written files of a killed process are removed.

    Torch's threads are set to those the run was begun with.

    Raises:
        UserError: it cannot be made, or another process is writing to it.
    """
    try:
        (out / "state").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be made: {e.strerror}.") from None
    with _locked(out):
        _remove_leftovers(out)
        if not begun(out):
            facts = {"identity": dict(identity), "environment": environment()}
            write_json(out / "state" / "run.json", facts)
        write_atomic(out / "recipe.yaml", recipe.to_yaml().encode())
        torch.set_num_threads(read_begun(out)["environment"]["threads"])
        yield


def read_begun(out: Path) -> dict[str, Any]:
    """What `state/run.json` says a run was begun with: `identity` and `environment`.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = out / "state" / "run.json"
    try:
        found = json.loads(path.read_text())
        if isinstance(found["identity"], dict) and isinstance(found["environment"], dict):
            return dict(found)
    except FileNotFoundError:
        raise UserError(f"{out} holds no run: it has no state/run.json.") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: damaged; the run cannot go on. Choose another --out.")


def read_finished(out: Path) -> dict[str, Any]:
    """What a finished run was begun with.

    Raises:
        UserError: it is not finished, or its file is damaged.
    """
    if not (out / "result.json").exists():
        raise UserError(f"{out}: not a finished run (result.json); go on with --resume.")
    return read_begun(out)


def _refuse_foreign(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a directory.")
    there = [p.name for p in out.iterdir()] if out.exists() else []
    if there and not (resume and there == ["state"]):  # killed before the run was written down
        raise UserError(
            f"{out} is not empty and holds no run (it has '{sorted(there)[0]}'); choose another "
            "--out."
        )


def _refuse_other(
    out: Path, begun: Mapping[str, Any], identity: Mapping[str, Any], recipe: Recipe
) -> None:
    for key, value in identity.items():
        old = begun["identity"].get(key)
        if old == value:
            continue
        if key == "recipe_sha":
            raise ResumeError(f"{out} is a run of another recipe{_difference(out, recipe)}.")
        raise ResumeError(
            f"{out} is a run with {key} {old!r}, not {value!r}; use the same arguments, or another "
            "--out."
        )
    now = environment()
    for key in HARDWARE:
        if begun["environment"].get(key) != now[key]:
            raise ResumeError(
                f"{out} was begun with {key} {begun['environment'].get(key)}, here is {now[key]}: "
                "the result would differ. Start a new run."
            )


def _difference(out: Path, recipe: Recipe) -> str:
    """The first value in which a recipe differs from the one in the run directory."""
    if not (out / "recipe.yaml").exists():
        return ""
    there = dict(_leaves(load_recipe(out / "recipe.yaml").plain()))
    here = dict(_leaves(recipe.plain()))
    for key in (*here, *there):
        if here.get(key) != there.get(key):
            return (
                f": {key} is {there.get(key, 'not set')} there and {here.get(key, 'not set')} "
                f"here; go on with {out / 'recipe.yaml'}, or choose another --out"
            )
    return ": its methods are in another order"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with open(out / "state" / "lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        except BlockingIOError:
            raise UserError(
                f"another process is writing to {out}; wait for it, end it, or choose another "
                "--out."
            ) from None
        yield


def _remove_leftovers(out: Path) -> None:
    for path in [p for p in out.rglob(".*") if LEFTOVER.fullmatch(p.name)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
