"""A page is sections of blocks, rendered into one self-contained HTML file by templates."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gracile.report.figures import Figure
from gracile.report.texts import Table


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    text: str
    kind: str = "prose"


@dataclass(frozen=True)
class Code:
    """Text to copy: a recipe, a command line."""

    text: str
    title: str
    kind: str = "code"


@dataclass(frozen=True)
class Items:
    """A list of (term, text) pairs; `warning` paints them in the warning colour."""

    pairs: tuple[tuple[str, str], ...]
    warning: bool = False
    kind: str = "items"


@dataclass(frozen=True)
class Stack:
    """A stacked bar with its legend of (swatch, name, percentage)."""

    title: str
    bar: Markup
    legend: tuple[tuple[Markup, str, str], ...]
    kind: str = "stack"


Block = Table | Figure | Prose | Code | Items | Stack


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    id: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Absent:
    """One sentence that says why a section is not there."""

    title: str
    why: str


def unbroken(text: str) -> str:
    """Keep a number and the word after it on one line.

    >>> unbroken("0.61 points").split(" ")
    ['0.61\\xa0points']
    """
    return re.sub(r"(?<=[\d×]) (?=\w)", "\u00a0", text)


def render(template: str, *, parts: Sequence[Section | Absent], **values: Any) -> str:
    """Fill a template of this package; everything that is not `Markup` is escaped."""
    environment = Environment(
        loader=PackageLoader("gracile.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = unbroken
    sections = [p for p in parts if isinstance(p, Section)]
    absent = [p for p in parts if isinstance(p, Absent)]
    page = environment.get_template(template)
    return page.render(sections=sections, absent=absent, **values)
