"""Recipe text to plain values that know their lines: a small, safe part of YAML 1.2.

Only mappings with text keys, lists, text, whole and decimal numbers, true, false and null come
out. Tags, merge keys, duplicate keys, several documents and anything huge are refused with the
line, so a recipe from a stranger can do nothing but be read. `1e-6` is a number; `on`, `yes` and
`1:30` are text.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml
from yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from gracile.core.rules import is_number
from gracile.errors import RecipeError

MAX_BYTES = 1 << 20
MAX_NODES = 10_000
MAX_DEPTH = 50
MAX_KEY = 200

Keys = tuple[str | int, ...]

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff]")

# What people most often meant when the scanner stops at one of these.
_HINTS = (
    ("'\\t'", "indent with spaces, not tabs"),
    ("alias", "put a text that begins with * into quotes"),
    ("anchor", "put a text that begins with & into quotes"),
    ("tag", "put a text that begins with ! into quotes"),
    ("cannot start any token", "put the text into quotes"),
    ("mapping values are not allowed", "put a text that contains ': ' into quotes, or indent it"),
    ("end of stream", "close the quote"),
    ("expected ',' or", "close the bracket"),
    ("<block end>", "indent keys of one mapping alike"),
    ("could not find expected ':'", "write key: value"),
)


@dataclass(frozen=True)
class Document:
    """Plain values and where each came from.

    Attributes:
        name: what to call the source in messages: a file, "<string>" or "<python>".
        data: the values.
        places: "file:line" (or "--set key=value") of each path of keys; parts may be missing.
    """

    name: str
    data: Any
    places: Mapping[Keys, str] = field(default_factory=dict)

    def place(self, keys: Keys) -> str:
        """Where the nearest known ancestor of a path is written."""
        for n in range(len(keys), -1, -1):
            if keys[:n] in self.places:
                return self.places[keys[:n]]
        return self.name

    def line(self, keys: Keys) -> int | None:
        """The line of a path in the file, where it has one."""
        _, _, number = self.places.get(keys, "").rpartition(":")
        return int(number) if number.isdecimal() else None


def parse(text: str, name: str, lenient: list[str] | None = None) -> Document:
    """Read a recipe's text.

    Args:
        text: YAML.
        name: stands for the file in messages.
        lenient: for files of others: a key that comes twice has its last value, a number as key
            is a text; each key that comes twice is told here.

    Raises:
        RecipeError: it is not YAML, or not the part of it that a recipe may use.
    """
    return _Reader(text, name, lenient).document()


def scalar(text: str) -> Any:
    """What an unquoted word means: null, true, false, a number, or the text itself.

    >>> scalar("1e-6"), scalar("yes"), scalar("010")
    (1e-06, 'yes', 10)

    Raises:
        ValueError: a number that is not finite or does not fit 64 bits.
    """
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INT.fullmatch(text) or _BASED.fullmatch(text):
        based = bool(_BASED.fullmatch(text))
        value = int(text, 0 if based else 10) if len(text) < 25 else 1 << 64
        if not -(1 << 63) <= value < 1 << 63:
            raise ValueError("a whole number must fit 64 bits")
        return value
    if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
        number = math.inf if _NOT_FINITE.fullmatch(text) else float(text)
        if not math.isfinite(number):
            raise ValueError("a number must be finite")
        return number
    return text


def dump(data: Any) -> str:
    """Write plain values so that `parse` reads the same back: nested leaves in one line each."""
    return str(
        yaml.dump(
            data,
            Dumper=_Dumper,
            sort_keys=False,
            default_flow_style=None,
            allow_unicode=True,
            width=96,
        )
    )


def unprintable(text: str) -> str | None:
    """The first character a recipe must not hold: a control character, half a surrogate pair."""
    found = _UNPRINTABLE.search(text)
    return found.group() if found else None


def show_kind(value: object) -> str:
    """What a value is, in a word: a list, a text, a number, nothing."""
    words = {list: "a list", dict: "a mapping", str: "a text", type(None): "nothing"}
    return words.get(type(value), "a single value")


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `scalar`, or a reader of YAML 1.1, would take for something else."""

    yaml_implicit_resolvers = {
        k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _regex in (
    ("null", _NULL),
    ("bool", re.compile(f"{_TRUE.pattern}|{_FALSE.pattern}")),
    ("int", re.compile(f"{_INT.pattern}|{_BASED.pattern}")),
    ("float", re.compile(f"{_FLOAT.pattern}|{_NOT_FINITE.pattern}")),
    ("merge", re.compile("<<")),
):
    _Dumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_regex.pattern})$"), None
    )


class _Reader:
    """One pass over the parser's events; counts nodes and depth as it goes."""

    def __init__(self, text: str, name: str, lenient: list[str] | None = None):
        self.text, self.name, self.lenient = text, name, lenient
        self.places: dict[Keys, str] = {}
        self.anchors: dict[str, tuple[Any, int, int]] = {}  # value, nodes, height
        self.nodes = 0
        self.line = 1

    def document(self) -> Document:
        if len(self.text) > MAX_BYTES:
            self.refuse("a recipe must not be larger than 1 MiB; is this the right file?")
        events = self.events()
        event = next(events)
        while not isinstance(event, (DocumentStartEvent, StreamEndEvent)):
            event = next(events)
        if isinstance(event, StreamEndEvent):
            self.refuse("the recipe is empty; begin it with 'recipe: 1'.")
        value, _ = self.value(next(events), events, (), 0)
        next(events)  # the document's end
        if not isinstance(next(events), StreamEndEvent):
            self.refuse("a file holds one recipe; remove the '---' and what follows it.")
        self.places.setdefault((), f"{self.name}:1")
        return Document(self.name, value, self.places)

    def events(self) -> Iterator[Event]:
        try:
            loader = yaml.SafeLoader(self.text)
            while loader.check_event():
                event = loader.get_event()
                self.line = event.start_mark.line + 1
                yield event
        except yaml.MarkedYAMLError as e:
            said = ", ".join(filter(None, (e.context, e.problem)))
            marks = [m for m in (e.problem_mark, e.context_mark) if m is not None]
            if "end of stream" in said or "stream end" in said:
                marks.reverse()  # what was left open is of more use than the end of the file
            self.line = marks[0].line + 1 if marks else self.line
            hints = [hint for sign, hint in _HINTS if sign in said]
            self.refuse(f"not YAML: {said}; {hints[0] if hints else 'see this line'}.")
        except yaml.reader.ReaderError as e:
            self.line = self.text.count("\n", 0, e.position) + 1
            self.refuse(f"must be printable text, found the character {e.character:#x}; remove it.")
        except (ValueError, OverflowError):  # an escape beyond Unicode, a version of 5000 digits
            self.refuse("not YAML: a number in an escape or directive is too large; correct it.")

    def value(
        self, event: Event, events: Iterator[Event], keys: Keys, depth: int
    ) -> tuple[Any, int]:
        """The value an event begins, and its height (0 for a scalar)."""
        if isinstance(event, AliasEvent):
            return self.alias(str(event.anchor), depth)
        assert isinstance(event, ScalarEvent | CollectionStartEvent)
        self.count(1, depth)
        before, at = self.nodes, self.line
        if event.tag is not None:
            self.refuse(
                f"tags are not allowed in a recipe, got '{event.tag}'; remove it, or put a text "
                "that begins with ! into quotes."
            )
        value: Any
        if isinstance(event, ScalarEvent):
            value, height = self.scalar(event), 0
        elif isinstance(event, SequenceStartEvent):
            value, height = self.sequence(events, keys, depth)
        else:
            assert isinstance(event, MappingStartEvent)
            value, height = self.mapping(events, keys, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, self.nodes - before + 1, height)
        self.places.setdefault(keys, f"{self.name}:{at}")
        return value, height

    def sequence(self, events: Iterator[Event], keys: Keys, depth: int) -> tuple[list[Any], int]:
        items: list[Any] = []
        height = 0
        for event in events:
            if isinstance(event, SequenceEndEvent):
                return items, height + 1
            item, h = self.value(event, events, (*keys, len(items)), depth + 1)
            items.append(item)
            height = max(height, h)
        raise AssertionError("a sequence ends")

    def mapping(
        self, events: Iterator[Event], keys: Keys, depth: int
    ) -> tuple[dict[str, Any], int]:
        items: dict[str, Any] = {}
        first: dict[str, int] = {}
        height = 0
        for event in events:
            if isinstance(event, MappingEndEvent):
                return items, height + 1
            key = self.key(event)
            if key in items:
                self.repeated((*keys, key), first[key])
            first[key] = self.line
            self.places[(*keys, key)] = f"{self.name}:{self.line}"
            items[key], h = self.value(next(events), events, (*keys, key), depth + 1)
            height = max(height, h)
        raise AssertionError("a mapping ends")

    def repeated(self, keys: Keys, line: int) -> None:
        if self.lenient is None:
            self.refuse(f"duplicate key '{keys[-1]}', first on line {line}; keep one of the two.")
        self.lenient.append(
            f"{self.name}:{self.line}: '{keys[-1]}' was on line {line} already; this one counts."
        )
        for old in [k for k in self.places if k[: len(keys)] == keys]:
            del self.places[old]

    def key(self, event: Event) -> str:
        self.count(1, 0)
        if not isinstance(event, ScalarEvent):
            self.refuse("a key must be a text, got something nested; write key: value.")
        if event.tag is not None:
            self.refuse(f"tags are not allowed in a recipe, got '{event.tag}'; remove it.")
        key = self.scalar(event)
        if event.implicit[0] and key == "<<":
            self.refuse("merge keys (<<) are not allowed in a recipe; write the keys out.")
        if self.lenient is not None and is_number(key):
            return str(event.value)
        if not isinstance(key, str):
            self.refuse(
                f"a key must be a text, got {event.value or 'nothing'}; put it into quotes."
            )
        if len(key) > MAX_KEY:
            self.refuse(
                f"a key must not be longer than {MAX_KEY} letters, got {len(key)}; shorten it."
            )
        return key

    def scalar(self, event: ScalarEvent) -> Any:
        if bad := unprintable(event.value):
            self.refuse(f"must be printable text, found the character {ord(bad):#x}; remove it.")
        if not event.implicit[0]:
            return event.value
        try:
            return scalar(event.value)
        except ValueError as e:
            self.refuse(f"{e}, got {event.value[:40]}; write a smaller one, or quote it as text.")

    def alias(self, anchor: str, depth: int) -> tuple[Any, int]:
        if anchor not in self.anchors:
            self.refuse(
                f"'*{anchor}' repeats nothing before it; put a text that begins with * into quotes."
            )
        value, nodes, height = self.anchors[anchor]
        self.count(nodes, depth + height)
        return value, height

    def count(self, nodes: int, depth: int) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            self.refuse(
                f"a recipe must not have more than {MAX_NODES} values; write a shorter one."
            )
        if depth > MAX_DEPTH:
            self.refuse(f"a recipe must not be nested deeper than {MAX_DEPTH}; write it flatter.")

    def refuse(self, text: str) -> NoReturn:
        raise RecipeError(f"{self.name}:{self.line}: {text}")
