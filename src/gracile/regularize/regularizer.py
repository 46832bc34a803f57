"""What all regularizers have in common: a strength that may follow a ramp, and a span."""

from typing import Any, ClassVar, Self

from pydantic import model_validator
from torch import Tensor

from gracile.core import method as core
from gracile.core.schedule import When
from gracile.errors import BindError
from gracile.recipe.fields import Amount


class RegularizerOptions(core.Options):
    """Options of every regularizer.

    Attributes:
        strength: factor of the penalty, a number > 0 or `{ramp, initial, final}`.
        when: the span in which it acts, `{start, stop}`, default all of training; a ramp needs
            it, and goes on once an epoch or as `every` says.
    """

    strength: Amount
    when: When | None = None

    @model_validator(mode="after")
    def _ramp_has_a_span(self) -> Self:
        if self.strength.ramp is not None and self.when is None:
            raise ValueError("a ramp of the strength needs 'when'; write when: {start: 0ep}")
        return self


class Regularizer(core.Method):
    """Base of the methods that add a term to the loss; a subclass says which in `penalty`."""

    Options: ClassVar[type[core.Options]] = RegularizerOptions
    needs = frozenset({"train"})

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        self.strength: float = options.strength.at(0.0)

    def penalty(self, s: Any) -> Tensor:
        """The term, a scalar, without its strength."""
        raise TypeError(f"{type(self).__name__} does not say what it penalizes")

    def on_attach(self, s: Any) -> None:
        when = self.options.when
        if when is not None and when.at is not None:
            way = "leave it out" if when.at_end else f"write when: {{start: {when.at}}}"
            raise BindError(
                f"'{self.id}': a penalty acts over a span of training, not 'at' a point; {way}."
            )

    def on_fire(self, s: Any, progress: float) -> None:
        self.strength = self.options.strength.at(progress)
        if self.options.strength.ramp is not None:
            s.track(f"strength/{self.id}", self.strength)

    def on_loss(self, s: Any) -> dict[str, Tensor]:
        return {self.id: self.strength * self.penalty(s)} if s.active(self) else {}

    def ends(self, s: Any) -> bool:
        """Whether the present mini-batch is the last one of the span."""
        calendar, when = s.calendar, self.options.when
        stop = calendar.total
        if when is not None and when.stop is not None:
            stop = min(stop, calendar.minibatch(when.stop))
        whole = calendar.steps is not None or s.batch + 1 == s.steps  # else epochs are counted
        return bool(whole and s.now + 1 == stop)

    def state_dict(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.strength = float(state["strength"])
