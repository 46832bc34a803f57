"""When a method fires: times with units, and the timetable they make for a given training length.

Times are `2ep` (epochs), `50it` (optimizer steps), `100mb` (mini-batches) or `end` (after
training). An epoch time means the moment before that epoch's first batch. A method fires at one
time, at each of a list, or over a span. No torch here: a recipe is checked without it.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, takewhile
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, GetPydanticSchema, model_validator
from pydantic_core import core_schema

from gracile.errors import BindError

UNITS = ("ep", "it", "mb")
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ep|it|mb)")
_NEGATIVE = re.compile(r"-\s*\d+(?:\.\d+)?\s*(?:ep|it|mb)?")

END = "end"
Instant = tuple[int, int]  # (epoch, mini-batch within it)


@dataclass(frozen=True, order=True)
class Time:
    """A point or span of training time in one unit."""

    value: Fraction
    unit: str

    @classmethod
    def parse(cls, text: object) -> "Time":
        """Read ``"2ep"``, ``"0.5ep"``, ``"50it"``, ``"3mb"``.

        Raises:
            ValueError: no unit, a negative number, or something else altogether.
        """
        if isinstance(text, Time):
            return text
        if isinstance(text, str) and (m := _TIME.fullmatch(text.strip())):
            value = Fraction(m[1])
            if m[2] != "ep" and value.denominator != 1:
                raise ValueError(
                    f"steps and mini-batches are whole numbers, got '{text}'; write 50it or 100mb"
                )
            return cls(value, m[2])
        if isinstance(text, str) and _NEGATIVE.fullmatch(text.strip()):
            raise ValueError(
                f"a time must not be negative, got '{text}'; 0ep is the start of training"
            )
        raise ValueError(
            f"a time needs a number and a unit (ep, it or mb), got {text!r}; "
            "write 2ep, 50it or 100mb"
        )

    def __str__(self) -> str:
        whole, rest = divmod(self.value, 1)
        digits = ""
        while rest and len(digits) < self.value.denominator.bit_length():
            digit, rest = divmod(rest * 10, 1)  # ends by itself for a time read from decimals
            digits += str(digit)
        return f"{whole}{'.' if digits else ''}{digits}{self.unit}"


def _time_schema(_source: Any, _handler: Any) -> core_schema.CoreSchema:
    return core_schema.no_info_plain_validator_function(
        Time.parse, serialization=core_schema.to_string_ser_schema()
    )


TimeField = Annotated[Time, GetPydanticSchema(_time_schema)]


def _at_schema(_source: Any, _handler: Any) -> core_schema.CoreSchema:
    def parse(value: object) -> Time | tuple[Time, ...] | str:
        if isinstance(value, (list, tuple)):
            if not value:
                raise ValueError("needs a time, got []; write at: [1ep, 3ep]")
            return tuple(Time.parse(v) for v in value)
        return END if value == END else Time.parse(value)

    def write(value: Time | tuple[Time, ...] | str) -> str | list[str]:
        return [str(t) for t in value] if isinstance(value, tuple) else str(value)

    return core_schema.no_info_plain_validator_function(
        parse, serialization=core_schema.plain_serializer_function_ser_schema(write)
    )


AtField = Annotated[Time | tuple[Time, ...] | str, GetPydanticSchema(_at_schema)]


class When(BaseModel):
    """``{at: T}`` fires once; ``{start, stop, every}`` fires at start, start+every, ... < stop.

    ``{at: [T, T, ...]}`` fires at each of these times. `stop` is exclusive and defaults to the end
    of training, `every` to once an epoch. ``{at: end, times: N}`` fires N times after training, in
    turn with the other methods that do so; one that fires there once does so in the last turn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: AtField | None = None
    start: TimeField | None = None
    stop: TimeField | None = None
    every: TimeField | None = None
    times: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        spans = [k for k in ("start", "stop", "every") if getattr(self, k) is not None]
        if self.at is not None and spans:
            raise ValueError(f"give either 'at' or 'start/stop/every', not 'at' with '{spans[0]}'")
        if self.at is None and not spans:
            raise ValueError("needs 'at', or 'start' (with 'stop' and 'every')")
        if self.times is not None and not self.at_end:
            raise ValueError(
                "'times' goes with at: end; write every, or at: [1ep, 2ep], to fire several times "
                "in training"
            )
        if self.every is not None and self.every.value == 0:
            raise ValueError("'every' must be more than 0")
        if (
            self.start is not None
            and self.stop is not None
            and self.start.unit == self.stop.unit
            and self.stop.value <= self.start.value
        ):
            raise ValueError(
                f"never fires: stop ({self.stop}) must be after start ({self.start}), "
                "it is exclusive"
            )
        return self

    @property
    def at_end(self) -> bool:
        """Whether this fires after training."""
        return self.at == END

    @property
    def once(self) -> bool:
        """Whether this is one point, and neither several nor a span."""
        return isinstance(self.at, (Time, str)) and self.times in (None, 1)

    def __str__(self) -> str:
        names = ("at", "start", "stop", "every", "times")
        times: dict[str, Any] = {k: v for k in names if (v := getattr(self, k))}
        if isinstance(self.at, tuple):
            times["at"] = f"[{', '.join(str(t) for t in self.at)}]"
        return "{" + ", ".join(f"{k}: {v}" for k, v in times.items()) + "}"


@dataclass(frozen=True)
class Calendar:
    """How long training is: what turns times into instants.

    `steps` is mini-batches per epoch; None where a user's own loop did not say, and then only
    whole epochs can be used.
    """

    epochs: int
    steps: int | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name, value, low in (
            ("epochs", self.epochs, 0),
            ("steps per epoch", 1 if self.steps is None else self.steps, 1),
            ("accumulate", self.accumulate, 1),
        ):
            if value < low:
                raise BindError(f"{name} must be at least {low}, got {value}.")

    @property
    def updates(self) -> int:
        """Optimizer steps per epoch; the last one may be made of fewer mini-batches."""
        return -(-(self.steps or 1) // self.accumulate)

    def minibatch(self, time: Time) -> int:
        """The time as a count of mini-batches from the start (of epochs, if steps is None).

        Raises:
            BindError: it is not a whole epoch, and the mini-batches per epoch are not known.
        """
        if self.steps is None and (time.unit != "ep" or time.value.denominator != 1):
            raise BindError(
                f"the time {time} needs the number of mini-batches per epoch: pass "
                "steps_per_epoch, or give the time in whole epochs (ep)."
            )
        if time.unit == "ep":
            return int(time.value * (self.steps or 1))
        return self.of_update(int(time.value)) if time.unit == "it" else int(time.value)

    def of_update(self, update: int) -> int:
        """The mini-batch an optimizer step begins with, both counted from the start."""
        epoch, rest = divmod(update, self.updates)
        return epoch * (self.steps or 1) + rest * self.accumulate

    @property
    def total(self) -> int:
        """Mini-batches in the whole training (epochs, if steps is None)."""
        return self.epochs * (self.steps or 1)

    def instant(self, minibatch: int) -> Instant:
        """(epoch, batch) of a mini-batch counted from the start."""
        return divmod(minibatch, self.steps or 1)


@dataclass(frozen=True)
class Timetable:
    """The instants at which a method fires, in order, then `at_end` times after training.

    Attributes:
        instants: in training.
        at_end: firings after it.
        by_epoch: progress stands still within an epoch.
    """

    instants: tuple[Instant, ...]
    at_end: int = 0
    by_epoch: bool = False

    def __len__(self) -> int:
        return len(self.instants) + self.at_end

    def index(self, instant: Instant) -> int | None:
        """Which firing this instant is (0-based), or None."""
        i = bisect_left(self.instants, instant)
        return i if i < len(self.instants) and self.instants[i] == instant else None

    def progress(self, k: int) -> float:
        """k/(n-1) for the k-th of n firings, or of the epochs they span; 1 if there is only one."""
        last = len(self) - 1
        if self.by_epoch:
            (first, _), (end, _) = self.instants[0], self.instants[-1]
            k, last = self.instants[k][0] - first, end - first
        return k / last if last else 1.0


def timetable(when: When, calendar: Calendar, *, strict: bool = False) -> Timetable:
    """Work out all firings.

    Args:
        when: the firings as a recipe says them.
        calendar: how long training is.
        strict: `every` of mini-batches means, as in Distiller, those of training that it divides
            and the first of each epoch in the span; levels move by epochs.

    >>> when = When(start="0ep", stop="4ep", every="2ep")
    >>> timetable(when, Calendar(epochs=10, steps=5)).instants
    ((0, 0), (2, 0))

    Raises:
        BindError: it never fires within this training, or needs steps per epoch.
    """
    if when.at_end:
        return Timetable((), at_end=when.times or 1)
    if calendar.epochs == 0:
        raise BindError(
            f"when {when} never fires: there is no training (0 epochs); write {{at: end}}."
        )
    by_epoch = False
    if isinstance(when.at, Time):
        points = [calendar.minibatch(when.at)]
    elif isinstance(when.at, tuple):
        points = _listed(when, calendar)
    else:
        start = calendar.minibatch(when.start) if when.start else 0
        stop = calendar.minibatch(when.stop) if when.stop else calendar.total
        every = when.every or Time(Fraction(1), "ep")
        stop, by_epoch = min(stop, calendar.total), strict and every.unit == "mb"
        if by_epoch:
            found = _of_training(start, int(every.value), calendar)
        else:
            found = _firings(when.start, start, every, calendar)
        points = list(takewhile(lambda p: p < stop, found))
    points = [p for p in points if p < calendar.total]
    if not points:
        raise BindError(
            f"when {when} never fires in {calendar.epochs} epoch(s)"
            + (f" of {calendar.steps} mini-batches" if calendar.steps else "")
            + "; epochs count from 0, 'stop' is exclusive, and 'at: end' is after training."
        )
    return Timetable(tuple(calendar.instant(p) for p in points), by_epoch=by_epoch)


def _listed(when: When, calendar: Calendar) -> list[int]:
    """The mini-batches of `at: [T, T, ...]`; none may come too late, or together with another."""
    times: tuple[Time, ...] = when.at  # type: ignore[assignment]
    points = [calendar.minibatch(t) for t in times]
    late = [t for t, p in zip(times, points, strict=True) if p >= calendar.total]
    if late:
        raise BindError(
            f"{late[0]} of when {when} never comes in {calendar.epochs} epoch(s); epochs count "
            "from 0."
        )
    if sorted(set(points)) != points:
        raise BindError(f"the times of when {when} must rise. Put them in order, each once.")
    return points


def _firings(first: Time | None, start: int, every: Time, calendar: Calendar) -> Iterator[int]:
    """Mini-batches from `start` on, without end; each once.

    Every point is worked out from the start, not from the one before, so that half an epoch of an
    odd number of mini-batches does not drift away from the epochs.
    """
    calendar.minibatch(every)  # refuses what needs the steps per epoch
    if every.unit == "it":
        epoch, rest = divmod(start, calendar.steps or 1)
        update = epoch * calendar.updates + rest // calendar.accumulate
        yield start
        yield from map(calendar.of_update, count(update + int(every.value), int(every.value)))
    elif every.unit == "mb":
        yield from count(start, int(every.value))
    else:
        steps = calendar.steps or 1
        exact = first.value * steps if first and first.unit == "ep" else Fraction(start)
        step = max(every.value * steps, Fraction(1))
        yield from (int(exact + k * step) for k in count())


def _of_training(start: int, every: int, calendar: Calendar) -> Iterator[int]:
    """`start`, and behind it all mini-batches that `every` divides or that begin an epoch."""
    calendar.minibatch(Time(Fraction(1), "mb"))  # refuses where the steps per epoch are unknown
    return (
        p for p in count(start) if p == start or p % every == 0 or p % (calendar.steps or 1) == 0
    )
