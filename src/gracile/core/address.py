"""Selectors: how a recipe names tensors of a model.

Exact name · glob (`*` stops at a dot, `**` does not) · `re:` (full match) · `type:Class` · a list
is a union · `!x` subtracts. A name that is a module means its `weight`.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache

from gracile.errors import BindError, nearest

Selector = str | Sequence[str]


def select(
    selector: Selector,
    tensors: Sequence[str],
    types: Mapping[str, Sequence[str]],
    *,
    what: str = "tensor",
    model: str = "the model",
) -> list[str]:
    """Names of the tensors a selector means, in the model's order, without doubles.

    Args:
        selector: one pattern or a list of them.
        tensors: dotted names that may be chosen (`layer1.0.conv1.weight`).
        types: class names of each module by module path; base classes included.
        what: the word for an item in error messages.
        model: the model's name in error messages.

    Raises:
        BindError: a pattern (also a subtracted one) matches nothing; names the nearest.
    """
    patterns = [selector] if isinstance(selector, str) else list(selector)
    if not patterns:
        raise BindError(f"an empty selector matches no {what} in {model}.")
    if all(p.startswith("!") for p in patterns):
        patterns = ["**", *patterns]
    chosen: set[str] = set()
    for pattern in [p for p in patterns if not p.startswith("!")]:
        chosen |= _matches(pattern, tensors, types, what, model)
    for pattern in [p for p in patterns if p.startswith("!")]:
        chosen -= _matches(pattern[1:], tensors, types, what, model)
    if not chosen:
        raise BindError(f"{selector!r} leaves no {what} in {model}: everything is subtracted.")
    return [name for name in tensors if name in chosen]


def _matches(
    pattern: str,
    tensors: Sequence[str],
    types: Mapping[str, Sequence[str]],
    what: str,
    model: str,
) -> set[str]:
    if pattern.startswith("type:"):
        wanted = pattern[5:]
        modules = [m for m, classes in types.items() if wanted in classes]
        found = {f"{m}.weight" if m else "weight" for m in modules} & set(tensors)
        if modules and not found:
            raise BindError(
                f"'{pattern}' matches no {what} in {model}: '{modules[0]}' has no weight of its "
                "own. Name the tensors, for example with a glob."
            )
        if not found:
            known = sorted({c for classes in types.values() for c in classes[:1]})
            raise BindError(f"'{pattern}' matches no {what} in {model}.{nearest(wanted, known)}")
        return found
    regex = compile_pattern(pattern)
    found = {t for t in tensors if regex.fullmatch(t)}
    found |= {t for t in tensors if t.endswith(".weight") and regex.fullmatch(t[:-7])}
    if not found:
        raise BindError(f"'{pattern}' matches no {what} in {model}.{nearest(pattern, tensors)}")
    return found


@lru_cache(maxsize=256)
def compile_pattern(pattern: str) -> "re.Pattern[str]":
    """Turn one pattern (`re:` or glob) into a regular expression for full matches.

    Raises:
        BindError: the regular expression is malformed.
    """
    if pattern.startswith("re:"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "possible nested set": [[] is fine here
                return re.compile(pattern[3:])
        except (re.error, OverflowError, RecursionError) as e:
            raise BindError(f"'{pattern}' is not a regular expression: {e}.") from None
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        elif pattern[i] == "*":
            out, i = out + "[^.]*", i + 1
        elif pattern[i] == "?":
            out, i = out + "[^.]", i + 1
        else:
            out, i = out + re.escape(pattern[i]), i + 1
    return re.compile(out)
