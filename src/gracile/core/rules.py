"""What a plain value must be, in words and as a test; for arguments that are named, not typed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """`text` completes the sentence "must be ..."; `fits` says whether a value is that."""

    text: str
    fits: Callable[[Any], bool]


def is_number(value: object) -> bool:
    """An int or float; True and False are not numbers here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(
    low: float | None = None,
    high: float | None = None,
    *,
    above: bool = False,
    below: bool = False,
) -> Rule:
    """A number in an interval; `above` and `below` leave the ends out.

    >>> number(0, 1, below=True).text
    'a number in [0, 1)'
    >>> number(0, above=True).text
    'a number > 0'
    """

    def fits(value: Any) -> bool:
        if not is_number(value):
            return False
        over = low is None or (value > low if above else value >= low)
        under = high is None or (value < high if below else value <= high)
        return over and under

    if low is not None and high is not None:
        where = f" in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
    elif low is not None:
        where = f" {'>' if above else '>='} {low:g}"
    elif high is not None:
        where = f" {'<' if below else '<='} {high:g}"
    else:
        where = ""
    return Rule("a number" + where, fits)


def whole(low: int) -> Rule:
    """A whole number, not less than `low`."""
    return Rule(
        f"a whole number >= {low}",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= low,
    )


def one_of(*values: str) -> Rule:
    """One of a few words."""
    return Rule(" or ".join(f"'{v}'" for v in values), lambda v: v in values)


def list_of(item: Rule, length: int | None = None) -> Rule:
    """A non-empty list (of a fixed length) whose items all fit."""

    def fits(value: Any) -> bool:
        if not isinstance(value, (list, tuple)) or not value:
            return False
        return length in (None, len(value)) and all(item.fits(v) for v in value)

    return Rule(f"a list of {'' if length is None else f'{length} times '}{item.text}", fits)


def or_null(rule: Rule) -> Rule:
    """The same, or null."""
    return Rule(f"{rule.text}, or null", lambda v: v is None or rule.fits(v))


FLAG = Rule("true or false", lambda v: isinstance(v, bool))
TEXT = Rule("a text", lambda v: isinstance(v, str) and bool(v))
