"""Climbing a ladder of recoveries: the cheapest first, kept where it does not lose, until enough.

The idea is ours. What a rung does, how accuracy is measured and what is put back are the caller's.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from gracile.errors import UserError

Run = Callable[[], Iterator[int]]


@dataclass(frozen=True)
class Rung:
    """What one recovery cost and brought.

    Attributes:
        rung: its name.
        seconds: that it took, its own measurements of accuracy included.
        images: that it ran through the network, one that it saw twice counted twice.
        before: top-1 on the validation data, a share in [0, 1].
        after: the same with it; None if it could not run.
        kept: whether the network goes on with it.
        why: it could not run; empty if it could.
    """

    rung: str
    seconds: float
    images: int
    before: float
    after: float | None
    kept: bool
    why: str = ""

    @property
    def gain(self) -> float:
        """Points of top-1 by which the network is better for it; 0 if it was not kept."""
        return 100 * (self.after - self.before) if self.kept and self.after is not None else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the gain."""
        return {**asdict(self), "gain": self.gain}


def climb(
    rungs: Iterable[tuple[str, Run]],
    start: float,
    *,
    measure: Callable[[], float],
    hold: Callable[[], Any],
    put_back: Callable[[Any], None],
    enough: Callable[[float], bool],
    clock: Callable[[], float] = perf_counter,
) -> Iterator[Rung]:
    """Take rungs until the accuracy is enough.

    A rung runs in parts and says after each how many images it took. The accuracy is measured after
    each part, and the best part from which nothing is lost is what stays of it. It ends early as
    soon as the accuracy is enough.

    Args:
        rungs: (name, what runs it), in order.
        start: the accuracy before the first.
        measure: the accuracy now.
        hold: a copy of all that rungs change.
        put_back: makes the network what it was when held.
        enough: whether an accuracy ends the climb.
        clock: seconds.

    Yields:
        One Rung for each that was begun.
    """
    top1 = start
    for name, run in rungs:
        if enough(top1):
            return
        begun, images, why = clock(), 0, ""
        best, after, kept = hold(), top1, False
        last: float | None = None
        try:
            for seen in run():
                images += seen
                found = measure()
                last = found if last is None else max(last, found)
                if found >= after:
                    after, best, kept = found, hold(), True
                if enough(found):
                    break
        except UserError as e:  # no use for it in the network as it has become
            why = str(e)
        put_back(best)
        yield Rung(name, clock() - begun, images, top1, last, kept, why)
        top1 = after
