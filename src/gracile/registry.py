"""The one list of everything that has a name: kernels, methods, models, data sets, runtimes.

A name is added by a decorator in the file that implements it; nothing else is edited. Files are
found by walking the packages of a kind, and third parties are found through the entry-point group
`gracile`, so a recipe can only ever name what was registered, never an import path.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, TypeVar

from gracile.errors import UserError, nearest

T = TypeVar("T")

METHOD_ROOMS = ("prune", "regularize", "quantize", "lowrank", "distill", "early_exit", "recover")

# Where the implementations of a kind live; a package is walked, a module is imported.
HOMES: dict[str, tuple[str, ...]] = {
    "criterion": ("gracile.prune.criteria",),
    "granularity": ("gracile.prune.granularity",),
    "ramp": ("gracile.core.ramps",),
    "penalty": ("gracile.regularize.penalties",),
    "observer": ("gracile.quantize.observers",),
    "fake_quant": ("gracile.quantize.fake_quant",),
    "factorizer": ("gracile.lowrank.factorizers",),
    "rank_rule": ("gracile.lowrank.ranks",),
    "block": ("gracile.lowrank.blocks",),
    "kd_loss": ("gracile.distill.losses",),
    "feature_loss": ("gracile.distill.features",),
    "exit_head": ("gracile.nn.exits",),
    "reward": ("gracile.search.rewards",),
    "method": tuple(f"gracile.{room}.methods" for room in METHOD_ROOMS),
    "model": ("gracile.models",),
    "dataset": ("gracile.data",),
    "oprule": ("gracile.graph.ops",),
    "exporter": ("gracile.export",),
    "runtime": ("gracile.benchmark.runtimes",),
    "searcher": ("gracile.search.searchers",),
}


@dataclass(frozen=True)
class Entry:
    """A registered thing: what it is called, where it is from, and the object itself."""

    kind: str
    name: str
    obj: Any
    source: str
    module: str
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """First line of the object's docstring."""
        return (self.obj.__doc__ or "").strip().split("\n", 1)[0]


_entries: dict[tuple[str, str], Entry] = {}
_loaded: set[str] = set()


def register(kind: str, name: str, *, source: str, **meta: Any) -> Callable[[T], T]:
    """Return a decorator that files an object under `kind` and `name`.

    Args:
        kind: one of `HOMES`.
        name: the name a recipe uses.
        source: paper and equation, or project, the implementation follows.
        meta: anything the readers of this kind want to know.

    Raises:
        ValueError: the name is taken by another object, or the kind is unknown.
    """
    if kind not in HOMES:
        raise ValueError(f"unknown kind '{kind}'.{nearest(kind, HOMES)}")

    def add(obj: T) -> T:
        module = getattr(obj, "__module__", "?")
        old = _entries.get((kind, name))
        if old is not None and (old.module, _qualname(old.obj)) != (module, _qualname(obj)):
            raise ValueError(f"{kind} '{name}' of {module} is already registered by {old.module}.")
        _entries[kind, name] = Entry(kind, name, obj, source, module, meta)
        return obj

    return add


def _qualname(obj: Any) -> str | None:
    return getattr(obj, "__qualname__", None)


def get(kind: str, name: str) -> Entry:
    """Look a name up.

    Raises:
        UserError: no such name; the message lists the nearest or all known ones.
    """
    load(kind)
    try:
        return _entries[kind, name]
    except KeyError:
        raise UserError(f"unknown {kind} '{name}'.{nearest(name, names(kind))}") from None


def known(kind: str, name: str) -> Entry | None:
    """What is registered under a name by now; nothing is imported for it."""
    return _entries.get((kind, name))


def names(kind: str) -> list[str]:
    """All names of a kind, sorted."""
    load(kind)
    return sorted(n for k, n in _entries if k == kind)


def entries(kind: str) -> Iterator[Entry]:
    """All entries of a kind, sorted by name."""
    for name in names(kind):
        yield _entries[kind, name]


def load(kind: str) -> None:
    """Import every file that may register a name of this kind. Done once per kind."""
    if kind in _loaded:
        return
    _loaded.add(kind)  # before importing: a file may look its own kind up
    try:
        for home in HOMES[kind]:
            _import_tree(home)
    except BaseException:
        _loaded.discard(kind)
        raise
    if "entry points" not in _loaded:
        _loaded.add("entry points")
        for point in entry_points(group="gracile"):
            point.load()


def _import_tree(home: str) -> None:
    room = home.rsplit(".", 1)[0]
    if importlib.util.find_spec(room) is None or importlib.util.find_spec(home) is None:
        return  # a room this version does not have
    package = importlib.import_module(home)
    for info in pkgutil.iter_modules(getattr(package, "__path__", []), home + "."):
        importlib.import_module(info.name)
