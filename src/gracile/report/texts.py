"""Numbers and tables as text: fixed digits, one unit a column, a dash where nothing is known."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

COUNTS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
SIZES = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))


@dataclass(frozen=True)
class Table:
    """A table of texts; columns listed in `words` are aligned left, all others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[int] = frozenset({0})
    note: str = ""
    folded: bool = False
    kind: str = "table"


def scaled(steps: Sequence[tuple[float, str]], *values: float | None) -> tuple[str, list[str]]:
    """Numbers in one common unit, chosen for the largest: (unit, texts).

    >>> scaled(COUNTS, 41_000_000, 9_500_000)
    ('M', ['41.00', '9.50'])
    """
    largest = max((abs(v) for v in values if v is not None), default=0.0)
    size, unit = next((s for s in steps if largest >= s[0]), steps[-1])
    digits = 0 if size == 1 else 2
    return unit, ["–" if v is None else f"{v / size:.{digits}f}" for v in values]


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign, a real minus, and no negative zero.

    >>> signed(-0.614)
    '−0.61'
    """
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def percent_text(share: float | None, digits: int = 2) -> str:
    """A share as a percentage; the column head has the sign."""
    return "–" if share is None else f"{100 * share:.{digits}f}"


def number(value: float | None, digits: int = 3) -> str:
    """A real number."""
    return "–" if value is None else f"{value:.{digits}f}"


def significant(value: float | None) -> str:
    """A real number to three significant digits."""
    return "–" if value is None else f"{value:.3g}"


def integer(value: int | None) -> str:
    """A count."""
    return "–" if value is None else f"{value}"


def p_value(p: float | None) -> str:
    """A probability; tiny ones are not pretended to be exact."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def part_of(part: int | None, whole: int | None) -> str:
    """`18 of 19`."""
    return "–" if part is None or whole is None else f"{part} of {whole}"


def over(value: float | None, size: float) -> float | None:
    """A number in multiples of a unit."""
    return None if value is None else value / size


def listed(values: Iterable[str | None]) -> str:
    """Each text once, in order of appearance."""
    return ", ".join(dict.fromkeys(v for v in values if v))


def dash(value: object) -> str:
    """A text, or a dash for None."""
    return "–" if value is None else str(value)
