"""Names of parameters as a schedule of Distiller has them, and as gracile's selectors.

Distiller names what it sees: a network wrapped in DataParallel, and layers as torchvision called
them in 2020.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

V = TypeVar("V")

EVERY = "*"  # in a mapping by names: all parameters that are not named
_RENAMED = (  # torchvision made blocks of these layers of Mask R-CNN
    (r"(^|.*\.)fpn\.(inner|layer)_blocks\.(\d+)\.(weight|bias)", r"\1fpn.\2_blocks.\3.0.\4"),
    (r"(^|.*\.)rpn\.head\.conv\.(weight|bias)", r"\1rpn.head.conv.0.0.\2"),
)
_MASK_HEAD = re.compile(r"(^|.*\.)roi_heads\.mask_head\.mask_fcn([1-9]\d*)\.(weight|bias)")
_PATTERN = re.compile(r".*[*?].*|!.*|(?:re|type):.*")


def plain_name(name: str) -> str:
    """The name without the wrapper DataParallel, and as torchvision calls it today.

    >>> plain_name("module.conv1.weight"), plain_name("features.module.0.weight")
    ('conv1.weight', 'features.0.weight')
    >>> plain_name("roi_heads.mask_head.mask_fcn2.weight")
    'roi_heads.mask_head.1.0.weight'
    """
    name = ".".join(part for part in name.split(".") if part != "module")
    for old, new in _RENAMED:
        if re.fullmatch(old, name):
            return re.sub(old, new, name)
    if m := _MASK_HEAD.fullmatch(name):
        return f"{m[1]}roi_heads.mask_head.{int(m[2]) - 1}.0.{m[3]}"
    return name


def is_pattern(name: str) -> bool:
    """Whether a selector would take this name for a pattern; Distiller has none."""
    return bool(_PATTERN.fullmatch(name)) or not plain_name(name)


def listed(names: str | Iterable[str]) -> list[str]:
    """The names of a list, or the one of a text, plain and each once."""
    names = [names] if isinstance(names, str) else names
    return list(dict.fromkeys(plain_name(n) for n in names))


def by_value(values: Mapping[str, V]) -> list[tuple[V, list[str]]]:
    """Each value with a selector of the parameters that have it, in the mapping's order.

    >>> by_value({"module.a": 0.5, "*": 0.1, "b": 0.5})
    [(0.5, ['a', 'b']), (0.1, ['**', '!a', '!b'])]
    """
    others = [f"!{plain_name(n)}" for n in values if n != EVERY]
    out: list[tuple[V, list[str]]] = []
    for name, value in values.items():
        if name == EVERY:
            out.append((value, ["**", *others]))
            continue
        found = next((s for v, s in out if v == value and s[0] != "**"), None)
        if found is None:
            out.append((value, [plain_name(name)]))
        elif plain_name(name) not in found:
            found.append(plain_name(name))
    return out
