"""A progress bar on stderr that appears only once something takes longer than a moment."""

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 2.0


def slow_progress(items: Sequence[T], what: str, *, after_s: float = PATIENCE_S) -> Iterator[T]:
    """Yield the items; after `after_s` seconds show how many of them are done.

    Args:
        items: what to go through.
        what: shown before the bar, e.g. "decoding train.parquet".
        after_s: seconds before the bar appears.
    """
    from rich.console import Console
    from rich.progress import Progress

    began = time.monotonic()
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=len(items))
    shown = False
    try:
        for done, item in enumerate(items):
            if not shown and time.monotonic() - began > after_s:
                bar.start()
                shown = True
            if shown:
                bar.update(task, completed=done)
            yield item
    finally:
        if shown:
            bar.stop()
