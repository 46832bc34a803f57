"""Greedy pruning: of all layers, cut the one that bears it best, again and again.

No ranking across layers is believed: before each step every group of channels is tried, by the loss
that the network has without its weakest channels. After Distiller's greedy filter pruning and
NetAdapt.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from gracile.analyze.widths import Timeline, Widths
from gracile.core import method as core
from gracile.core.plan import Remove
from gracile.graph.surgery import remove_edits
from gracile.prune.cutting import producers
from gracile.prune.judged import Judged, JudgedOptions
from gracile.prune.structure import one_step


class GreedyOptions(JudgedOptions):
    """Options of `prune: greedy`.

    Attributes:
        step: share of its remaining units that a group loses at once; at least one unit.
        score: what is smallest for the group that is cut: the loss after it, or the rise of the
            loss for each parameter, MAC or channel (as `target` counts) that goes with it.

    What the candidate that is cut has learnt in its `ft_batches` is kept.
    """

    step: float = Field(default=0.1, gt=0, lt=1)
    score: Literal["loss", "loss_per_cost"] = "loss_per_cost"


@dataclass(frozen=True)
class Step:
    """What a group would lose.

    Attributes:
        units: of the group, that go.
        saved: how much of what the target counts goes with them.
        edits: the cut.
    """

    units: list[int]
    saved: float
    edits: list[Remove]


@core.method(
    "prune",
    "greedy",
    source="Distiller, greedy filter pruning; score loss_per_cost: after Yang et al. 2018, "
    "arXiv:1804.03230 (NetAdapt); by loss: Abbasi-Asl & Yu 2017, arXiv:1705.07356",
)
class Greedy(Judged):
    """Cut step by step whichever group of channels costs the least loss, to an exact target.

    Distiller keeps the candidate of highest accuracy; here it is the loss, which also tells
    candidates apart that classify the same images right.
    """

    Options = GreedyOptions

    def on_fire(self, s: Any, progress: float) -> None:
        limit, before = self._limit(self.options.ratio.at(progress)), len(s.plan.edits)
        while steps := self._steps(s, limit):
            self._take(s, *self._best(s, steps))
        cut = len(s.plan.edits) > before
        if not cut and not self.ready(s):
            raise self.none_passed()
        if cut and self.anew:
            s.count_statistics(self)
        self.evidence.forget()
        self.track(s, self._measure, limit, self._left(s)(0, {}))

    @property
    def _measure(self) -> str:
        return "ms" if self.predict is not None else str(self.options.target)

    def _limit(self, level: float) -> float:
        """How much may be left at a level."""
        if self._measure != "channels":
            return (1 - level) * self.full
        n = sum(self.original.values())
        return n - int(level * n + 1e-6)

    def _left(self, s: Any) -> Callable[[int, Widths], float]:
        """(how many units go, widths after that) -> what is left of what the target counts."""
        if self._measure == "channels":
            now = sum(len(g.units) for g in s.groups if g.id in self.original)
            return lambda units, kept: now - units
        cost = self.cost(s)
        return lambda units, kept: cost(kept)

    def _steps(self, s: Any, limit: float) -> dict[str, Step]:
        """Group id -> what it would lose next; none where no more is asked for, or may go."""
        left, chosen = self._left(s), self.ready(s)
        now = left(0, {})
        if now <= limit:
            return {}
        self.evidence.gather(self, s, producers(chosen))
        scores = self.scores(s, chosen)
        found = {}
        for g in chosen:
            units = one_step(
                g,
                scores[g.id],
                self.options.step,
                left=left,
                limit=limit,
                limits=self.limits,
                original=self.original[g.id],
            )
            kept = Timeline([[g.units[u] for u in units]], g.sizes).kept(1)
            saved = now - left(len(units), kept)
            if saved > 0:
                edits = remove_edits(s.groups, {g.id: units}, self.id)
                found[g.id] = Step(units, saved, edits)
        return found

    def _best(self, s: Any, steps: Mapping[str, Step]) -> tuple[str, Step, Mapping[str, Tensor]]:
        """The step of the best score, with the parameters its training has made, if any."""
        o = self.options
        edits = {} if o.ft_batches else {id: step.edits for id, step in steps.items()}
        losses = s.losses_after(self, edits, own_statistics=self.anew)
        best, lowest = "", math.inf
        tuned: Mapping[str, Tensor] = {}
        for id, step in steps.items():
            values: Mapping[str, Tensor] = {}
            if o.ft_batches:
                losses[id], values = self.tuned(s, step.edits)
            found = self._score(losses[id], losses[None], step.saved)
            if found < lowest:
                best, lowest, tuned = id, found, values
        if not best:
            raise self.no_loss()
        return best, steps[best], tuned

    def _score(self, loss: float, before: float, saved: float) -> float:
        return loss if self.options.score == "loss" else rise_per_cost(loss, before, saved)

    def _take(self, s: Any, id: str, step: Step, tuned: Mapping[str, Tensor]) -> None:
        before = {a: s.parameter(a).detach().clone() for a in tuned}
        s.put(tuned)
        self.cut(s, {id: step.units})
        if id in self.failed:
            s.put(before)
        elif self.anew and self.evidence.needs:
            s.count_statistics(self)  # what the criterion looks at next is normalized by them


def rise_per_cost(loss: float, before: float, saved: float) -> float:
    """The rise of the loss for each unit of what is saved; of a fall, the more the more is saved.

    >>> rise_per_cost(3.0, 1.0, 4.0), rise_per_cost(0.5, 1.0, 4.0)
    (0.5, -2.0)
    """
    rise = loss - before
    return rise / saved if rise > 0 else rise * saved
