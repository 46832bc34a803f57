"""Recipes written in Python: the same values, the same checks, the same messages as a file.

Recipe.build(train={"epochs": 3}, methods={
    "filters": prune("gradual", weights="type:Conv2d", sparsity=0.5, when={"at": "1ep"}),
    "int8": quantize("ptq", when={"at": "end"}),
})
"""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from gracile.core.schedule import Time
from gracile.errors import RecipeError
from gracile.recipe.document import Document, Keys, unprintable
from gracile.recipe.fields import Kernel, LevelValue
from gracile.recipe.messages import dotted, show
from gracile.recipe.schema import Entry, Recipe

NAME = "<python>"


def method(verb: str, name: str, /, **options: Any) -> dict[str, Any]:
    """The entry of any method: ``method("regularize", "l1", strength=1e-4)``."""
    return {verb: name, **options}


def prune(name: str, /, **options: Any) -> dict[str, Any]:
    """The entry `{prune: name, ...}`."""
    return method("prune", name, **options)


def quantize(name: str, /, **options: Any) -> dict[str, Any]:
    """The entry `{quantize: name, ...}`."""
    return method("quantize", name, **options)


def distill(name: str, /, **options: Any) -> dict[str, Any]:
    """The entry `{distill: name, ...}`."""
    return method("distill", name, **options)


def regularize(name: str, /, **options: Any) -> dict[str, Any]:
    """The entry `{regularize: name, ...}`."""
    return method("regularize", name, **options)


def factorize(name: str, /, **options: Any) -> dict[str, Any]:
    """The entry `{factorize: name, ...}`."""
    return method("factorize", name, **options)


def recover(name: str, /, **options: Any) -> dict[str, Any]:
    """The entry `{recover: name, ...}`."""
    return method("recover", name, **options)


def build(
    *,
    seed: int = 0,
    compat: str = "none",
    goal: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    accuracy: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    methods: Mapping[str, Any] | None = None,
) -> Recipe:
    """Make a Recipe from Python values.

    Args:
        seed, compat, goal, train, accuracy, data, methods: as in a file; values may also be the
            objects the fields hold (`When`, `Time`, a level, a kernel), and tuples stand for lists.

    Raises:
        RecipeError: begins with `<python>:`.
    """
    sections = {"goal": goal, "train": train, "data": data, "methods": methods}
    raw = {"recipe": 1, "seed": seed, "compat": compat}
    sections["accuracy"] = accuracy
    raw |= {k: v for k, v in sections.items() if v is not None}
    return Recipe.read(Document(NAME, _plain(raw, (), raw)))


def _plain(value: Any, keys: Keys, root: Mapping[str, Any]) -> Any:
    """Python values as YAML could hold them; anything else is refused by its path."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json", by_alias=True, exclude_none=True), keys, root)
    if isinstance(value, (Kernel, LevelValue, Entry)):
        return _plain(value.plain(), keys, root)
    if isinstance(value, Time):
        return str(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or unprintable(key):
                _refuse(
                    f"must have texts as keys, got {show(key)}. Put it into quotes.", keys, root
                )
        return {k: _plain(v, (*keys, k), root) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, (*keys, i), root) for i, v in enumerate(value)]
    if isinstance(value, str) and unprintable(value):
        _refuse(f"must be printable text, got {show(value)}. Remove the character.", keys, root)
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(f"must be a finite number, got {value}. Leave it out for no limit.", keys, root)
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        _refuse("must be a whole number of 64 bits. Write a smaller one.", keys, root)
    if value is None or type(value) in (bool, int, float, str):
        return value
    _refuse(
        f"must be plain data (number, text, list, mapping), got {show(value)}. Name it instead.",
        keys,
        root,
    )
    return None


def _refuse(text: str, keys: Keys, root: Mapping[str, Any]) -> None:
    raise RecipeError(f"{NAME}: {dotted(keys, root)} {text}")
