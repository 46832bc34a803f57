"""Tables as CSV, one way for all: a header, Unix line ends, quotes only where they are needed."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The text of a CSV file.

    >>> csv_text(("layer", "macs"), [("conv1", 27), ("a,b", 3)])
    'layer,macs\\nconv1,27\\n"a,b",3\\n'
    """
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(columns)
    out.writerows(rows)
    return text.getvalue()
