"""LeGR: one ranking of all channels, with a scale and a shift for each layer learned by evolution.

A magnitude says which channels of a layer matter least, not how layers compare; that is what is
learned here, once, on calibration data. After Chin et al.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, FiniteFloat, model_validator
from torch import Tensor

from gracile.core import method as core
from gracile.errors import BindError, nearest
from gracile.graph.surgery import remove_edits
from gracile.prune.cutting import producers
from gracile.prune.evolution import evolve
from gracile.prune.judged import Judged, JudgedOptions
from gracile.recipe.fields import KernelRef, kernel

Coefficients = dict[str, tuple[FiniteFloat, FiniteFloat]]  # group id -> (a, b)


class LegrOptions(JudgedOptions):
    """Options of `prune: legr`.

    Attributes:
        criterion: what is scaled and shifted; smaller goes first.
        learn_at: share to remove from candidates, as `ratio` counts; default the final `ratio`.
        start: what the search begins at: every scale 1 divided by the group's mean score, as
            `prune: structure` ranks, or 1 (none), as the paper does.
        generations: candidates that are tried.
        population: how many of the latest candidates may have descendants.
        samples: how many of them, drawn at random, compete to be the next parent.
        mutate: share of the groups that a descendant changes; at least one.
        sigma: standard deviation of a change of a scale's logarithm; a shift changes by the
            standard deviation of the group's scores.
        coefficients: group id -> [a, b], learned before: there is no search then.
    """

    on_noise: ClassVar[Mapping[str, Any]] = {**JudgedOptions.on_noise, "generations": 1}
    criterion: KernelRef("criterion") = Field(default_factory=lambda: kernel("criterion", "l2"))  # type: ignore[valid-type]
    learn_at: float | None = Field(default=None, gt=0, lt=1)
    start: Literal["mean", "none"] = "mean"
    generations: int = Field(default=100, ge=1)
    population: int = Field(default=64, ge=1)
    samples: int = Field(default=16, ge=1)
    mutate: float = Field(default=0.1, gt=0, le=1)
    sigma: float = Field(default=1.0, gt=0)
    coefficients: Coefficients | None = None

    @model_validator(mode="after")
    def _drawn_from_the_population(self) -> Self:
        if self.samples > self.population:
            raise ValueError(
                f"samples are drawn from the population of {self.population}, so there are no "
                f"more than that, got {self.samples}"
            )
        return self


@core.method(
    "prune", "legr", source="Chin et al. 2020, arXiv:1904.12368; NNCF, learned_ranking of filters"
)
class Legr(Judged):
    """Cut the channels that are last in a learned global ranking, to an exact target.

    A channel's score is a * importance + b, with a and b of its group. They are learned at the
    first firing and stay; each firing ranks anew by what the weights are then.

    Attributes:
        coefficients: group id -> (a, b); empty until they are learned.
    """

    Options = LegrOptions

    def __init__(self, id: str, options: Any, predict: Any = None):
        super().__init__(id, options, predict)
        self.coefficients: Coefficients = dict(options.coefficients or {})

    @property
    def judges(self) -> bool:
        return self.options.coefficients is None

    @property
    def levels(self) -> tuple[float, ...]:
        return (*super().levels, self._judged_at)

    @property
    def _judged_at(self) -> float:
        o = self.options
        return float(o.ratio.final if o.learn_at is None else o.learn_at)

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        if not self.judges:
            self._check_given()

    def on_fire(self, s: Any, progress: float) -> None:
        if not self.coefficients:
            self._learn(s)
            self._tell(s)
        before = len(s.plan.edits)
        self.cut_to(s, self.options.ratio.at(progress), self._ranked)
        if self.anew and len(s.plan.edits) > before:
            s.count_statistics(self)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "coefficients": self.coefficients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.coefficients = {id: (a, b) for id, (a, b) in state["coefficients"].items()}

    def _ranked(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        return ranked(scores, self.coefficients)

    def _learn(self, s: Any) -> None:
        """Find the coefficients whose cut costs the least loss."""
        chosen, o = self.ready(s), self.options
        self.evidence.gather(self, s, producers(chosen))
        scores = self.scores(s, chosen)
        first = started(scores, o.start)
        losses: dict[str, float] = {}  # many rankings choose the same channels

        def loss_of(found: Tensor) -> float:
            tried = ranked(scores, _coefficients(first, found))
            gone = self.select(s, chosen, self._judged_at, tried).gone
            key = str(sorted(gone.items()))
            if key not in losses:
                losses[key] = self._loss(s, gone)
            return losses[key]

        best, loss = evolve(
            loss_of,
            torch.stack([first[id] * v.std(correction=0) for id, v in scores.items()]),
            generations=o.generations,
            population=o.population,
            samples=o.samples,
            mutate=o.mutate,
            sigma=o.sigma,
            rng=s.generator(self.id, "evolution"),
        )
        if not math.isfinite(loss):
            raise self.no_loss()
        self.coefficients = _coefficients(first, best)
        s.track(f"loss/{self.id}", loss)

    def _loss(self, s: Any, gone: Mapping[str, Sequence[int]]) -> float:
        edits = remove_edits(s.groups, {id: set(units) for id, units in gone.items()}, self.id)
        if self.options.ft_batches:
            return self.tuned(s, edits)[0]
        tried = {"": edits}
        losses = s.losses_after(self, tried, own_statistics=self.anew, unchanged=False)
        return float(losses[""])

    def _tell(self, s: Any) -> None:
        """Each group's coefficients in the ledger."""
        name = self.options.criterion.name
        for g in s.groups:
            if g.id in self.coefficients:
                a, b = self.coefficients[g.id]
                text = f"'{g.id}' is ranked by a * {name} + b, [a, b] = [{a:.6g}, {b:.6g}]"
                s.note(g.producers[0], "structure", None, None, text, self.id)

    def _check_given(self) -> None:
        missing = [id for id in self.original if id not in self.coefficients]
        if missing:
            raise BindError(
                f"'{self.id}': coefficients has no [a, b] for '{missing[0]}'"
                f"{f' and {len(missing) - 1} others' if missing[1:] else ''}. Add it, name it in "
                "ignore, or leave coefficients out and they are learned."
            )
        for id in self.coefficients:
            if id not in self.original:
                raise BindError(
                    f"'{self.id}': coefficients names '{id}', which is no group that can be cut."
                    f"{nearest(id, [*self.original])}"
                )


def ranked(scores: Mapping[str, Tensor], coefficients: Coefficients) -> dict[str, Tensor]:
    """a * score + b of each group: scores that compare over all groups.

    >>> ranked({"w": torch.tensor([1.0, 2.0])}, {"w": (2.0, 0.5)})
    {'w': tensor([2.5000, 4.5000])}
    """
    return {id: coefficients[id][0] * v + coefficients[id][1] for id, v in scores.items()}


def started(scores: Mapping[str, Tensor], start: str) -> dict[str, float]:
    """Group id -> the scale that the search begins at, see `LegrOptions.start`."""
    means = {id: float(v.mean()) for id, v in scores.items()}
    return {id: 1 / m if start == "mean" and m > 0 else 1.0 for id, m in means.items()}


def _coefficients(first: Mapping[str, float], found: Tensor) -> Coefficients:
    rows = zip(first.items(), found.tolist(), strict=True)
    return {id: (scale * a, b) for (id, scale), (a, b) in rows}
