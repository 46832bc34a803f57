"""Changing a recipe from the command line: `--set train.epochs=3 --set methods.int8.bits=4`."""

import copy
from collections.abc import Iterable
from typing import Any

from gracile.errors import RecipeError, nearest
from gracile.recipe.document import Document, Keys, parse
from gracile.recipe.load import loads
from gracile.recipe.messages import show, verbs_of
from gracile.recipe.schema import Recipe


def with_overrides(recipe: Recipe | str, overrides: Iterable[str]) -> Recipe:
    """A recipe with some values set, checked again as a whole.

    Args:
        recipe: a Recipe, or the text of one.
        overrides: `key.key=value`, the value in YAML (`0.5`, `[0.1, 0.2]`, `{at: end}`, `null`). A
            method's option goes by `methods.<id>.<option>` or `<verb>.<id>.<option>`;
            `methods.<id>=null` takes the entry out.

    Raises:
        RecipeError: an unknown path (names the nearest), or a value the recipe refuses.
    """
    recipe = loads(recipe) if isinstance(recipe, str) else recipe
    document = Document(recipe.path, copy.deepcopy(recipe.plain()), dict(recipe.places))
    return Recipe.read(overridden(document, overrides))


def overridden(document: Document, overrides: Iterable[str]) -> Document:
    """The plain values of a recipe with some set; its mappings are changed in place.

    Raises:
        RecipeError: an unknown path (names the nearest).
    """
    data, places = document.data, dict(document.places)
    for text in overrides:
        keys, value = _read(text, data)
        _set(data, keys, value, text)
        for old in [k for k in places if k[: len(keys)] == keys]:
            del places[old]
        for n in range(1, len(keys) + 1):
            places.setdefault(keys[:n], f"--set {text}")
    return Document(document.name, data, places)


def _read(text: str, data: dict[str, Any]) -> tuple[Keys, Any]:
    path, equals, written = text.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts) or not written.strip():
        raise RecipeError(f"--set {text}: must be key.key=value. Write train.epochs=3.")
    try:
        value = parse(written, "value").data
    except RecipeError as e:
        reason = str(e).split(": ", 1)[1]
        raise RecipeError(f"--set {text}: the value is {reason}") from None
    if parts[0] not in Recipe.model_fields:
        entry = data.get("methods", {}).get(parts[1]) if len(parts) > 1 else None
        if entry is None or parts[0] not in verbs_of(entry):
            guess = nearest(parts[0], Recipe.model_fields)
            raise RecipeError(f"--set {text}: the recipe has no '{parts[0]}'.{guess}")
        parts[0] = "methods"
    return tuple(parts), value


def _set(data: dict[str, Any], keys: Keys, value: Any, text: str) -> None:
    *way, last = (str(k) for k in keys)
    if way == ["methods"] and value is None:
        if last not in data.get("methods", {}):
            _no_key("methods", last, data.get("methods", {}), text)
        del data["methods"][last]
        return
    if way[:1] == ["methods"] and len(way) > 1 and way[1] not in data.get("methods", {}):
        _no_key("methods", way[1], data.get("methods", {}), text)
    for i, key in enumerate(way):
        if data.get(key) is None:
            data[key] = {}  # a wrong key is found when the whole is checked
        inner = data[key]
        if not isinstance(inner, dict):
            here = ".".join(way[: i + 1])
            raise RecipeError(
                f"--set {text}: {here} is {show(inner)}, which has no '{(*way, last)[i + 1]}'. "
                f"Set it as a whole: {here}={{...}}."
            )
        data = inner
    data[last] = value


def _no_key(where: str, key: str, known: dict[str, Any], text: str) -> None:
    raise RecipeError(f"--set {text}: {where} has no '{key}'.{nearest(key, known)}")
