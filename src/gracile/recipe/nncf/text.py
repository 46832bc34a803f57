"""JSON as configuration files have it, with comments and trailing commas, each value with its line.

The standard library's reader knows no lines; this one takes scalars from it and keeps the places.
"""

import json
import re
from bisect import bisect_left
from typing import Any, NoReturn

from gracile.errors import RecipeError
from gracile.recipe.document import MAX_BYTES, MAX_DEPTH, Document, Keys
from gracile.recipe.messages import dotted

_BLANK = re.compile(r"(?:\s|//[^\n]*|/\*.*?\*/)*", re.S)
_BREAK = re.compile("\n")


def parse(text: str | bytes, name: str) -> Document:
    """Read JSON; `//` and `/* */` are comments, a comma may stand before a closing bracket.

    Args:
        text: of the file; bytes must be UTF-8.
        name: stands for the file in messages.

    Raises:
        RecipeError: it is not JSON, has a key twice, is larger than 1 MiB or nested deeper than 50.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            line = e.object.count(b"\n", 0, e.start) + 1
            raise RecipeError(f"{name}:{line}: must be UTF-8 text. Save it as that.") from None
    return _Reader(text, name).document()


def error(document: Document, keys: Keys, text: str) -> RecipeError:
    """What is wrong with the value at `keys`; `text` goes on after its dotted path."""
    path = dotted(keys, document.data) if keys else "the configuration"
    return RecipeError(f"{document.place(keys)}: {path} {text}")


class _Reader:
    """One pass over the text; `at` is where it stands."""

    def __init__(self, text: str, name: str):
        self.text, self.name, self.at = text, name, 0
        self.places: dict[Keys, str] = {}
        self.breaks = [m.start() for m in _BREAK.finditer(text)]
        self.decoder = json.JSONDecoder(parse_constant=self.constant)

    def document(self) -> Document:
        if len(self.text) > MAX_BYTES:
            self.refuse("a configuration must not be larger than 1 MiB. Is this the right file?")
        value = self.value(())
        if self.peek(end=True):
            self.refuse("not JSON: the first value ends before this. Remove what follows it.")
        return Document(self.name, value, self.places)

    def value(self, keys: Keys) -> Any:
        if len(keys) > MAX_DEPTH:
            self.refuse(f"must not be nested deeper than {MAX_DEPTH}. Write it flatter.")
        first = self.peek()
        self.places.setdefault(keys, self.place)
        if first == "{":
            return self.mapping(keys)
        return self.sequence(keys) if first == "[" else self.scalar()

    def mapping(self, keys: Keys) -> dict[str, Any]:
        out: dict[str, Any] = {}
        self.at += 1
        while self.peek() != "}":
            if self.peek() != '"':
                self.refuse("not JSON: a key must be a text in double quotes. Put it into them.")
            place, key = self.place, self.scalar()
            inner = (*keys, key)
            if key in out:
                self.refuse(f"duplicate key '{key}', first at {self.places[inner]}. Keep one.")
            self.places[inner] = place
            if self.peek() != ":":
                self.refuse(f"""not JSON: ':' is missing after "{key}". Write "{key}": value.""")
            self.at += 1
            out[key] = self.value(inner)
            self.comma("}")
        self.at += 1
        return out

    def sequence(self, keys: Keys) -> list[Any]:
        out: list[Any] = []
        self.at += 1
        while self.peek() != "]":
            out.append(self.value((*keys, len(out))))
            self.comma("]")
        self.at += 1
        return out

    def comma(self, close: str) -> None:
        if self.peek() == ",":
            self.at += 1
        elif self.peek() != close:
            self.refuse(f"not JSON: ',' or '{close}' is missing before this. Add it.")

    def scalar(self) -> Any:
        try:
            value, self.at = self.decoder.raw_decode(self.text, self.at)
        except (json.JSONDecodeError, RecursionError, ValueError) as e:
            reason = e.msg if isinstance(e, json.JSONDecodeError) else str(e)
            self.refuse(f"not JSON: {reason}. Write a number, a text in quotes, true or false.")
        return value

    def constant(self, word: str) -> NoReturn:
        self.refuse(f"a number must be finite, got {word}. Leave it out.")

    def peek(self, end: bool = False) -> str:
        """The next character that means something; "" at an end that may be."""
        found = _BLANK.match(self.text, self.at)
        self.at = found.end() if found else self.at
        if self.at == len(self.text) and not end:
            self.refuse("not JSON: the file ends before its brackets close. Close them.")
        return self.text[self.at : self.at + 1]

    @property
    def place(self) -> str:
        return f"{self.name}:{bisect_left(self.breaks, self.at) + 1}"

    def refuse(self, text: str) -> NoReturn:
        raise RecipeError(f"{self.place}: {text}")
