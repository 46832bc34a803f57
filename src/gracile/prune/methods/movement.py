"""Movement pruning: what goes is what training moves towards zero, not what is small.

Every weight, or group of them, has a score that is trained beside it and adds up -dL/dW' * W (Sanh
et al.). Fine-tuning a pretrained network hardly changes which weights are large, but it tells by
their movement which ones the new task does not want.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from gracile.core import method as core
from gracile.errors import BindError
from gracile.prune.learned import LearnedMasks, LearnedOptions
from gracile.prune.masked_units import whole_units
from gracile.prune.movement import Scores, importance_loss, score_at
from gracile.prune.selection import removed_count, without_lowest
from gracile.prune.thresholding import tell_share
from gracile.recipe.fields import Amount, Kernel, KernelRef, Level, Selector, Threshold, kernel


class Part(BaseModel):
    """Some of the weights, with a granularity of their own.

    Attributes:
        weights: which; all must be among the method's.
        granularity: of their groups.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Selector
    granularity: KernelRef("granularity")  # type: ignore[valid-type]


class MovementOptions(LearnedOptions):
    """Options of `prune: movement`; `sparsity` or `threshold`, one of the two.

    Attributes:
        weights: which tensors.
        sparsity: the hard form: this share of the groups is hidden, those with the lowest scores; a
            number or `{ramp, initial, final}`.
        threshold: the soft form: hidden is what has a score not above this. 0 is sigmoid(S) = 0.5.
        initial_sparsity: soft: the ramp of the threshold begins where it hides this share of the
            weights, instead of at `initial`.
        strength: soft: multiplies the loss that pulls all scores down; how much is hidden in the
            end follows from it.
        loss: that loss (see `gracile.prune.movement.importance_loss`).
        max_sparsity: soft: no tensor loses more than this share of its groups.
        scope: hard: the share holds in every tensor by itself, or over all of them.
        granularity: what has one score: element, row, column, block, ...
        parts: weights with another granularity.
        score_lr: learning rate of the scores; no schedule changes it.
        score_optimizer: of the scores, without weight decay.
        structured: at `freeze` only whole channels and heads stay masked, those that are hidden in
            every weight that writes or reads them; other weights are given back.
        when: the firings, each of which sets the level; scores are learned from the start of
            training, nothing is hidden before the first firing.
        freeze: from when masks stand still. Default: the end of training.
    """

    sparsity: Level | None = None
    threshold: Threshold | None = None
    initial_sparsity: float | None = Field(default=None, ge=0, lt=1)
    strength: Amount | None = None
    loss: Literal["mean", "paper", "nncf"] = "mean"
    max_sparsity: float = Field(default=0.98, gt=0, lt=1)
    scope: Literal["layer", "global"] = "layer"
    granularity: KernelRef("granularity") = Field(  # type: ignore[valid-type]
        default_factory=lambda: kernel("granularity", "element")
    )
    parts: tuple[Part, ...] = ()
    score_lr: float = Field(default=1e-2, gt=0)
    score_optimizer: Literal["adam", "sgd"] = "adam"
    structured: bool = False

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.sparsity is None) == (self.threshold is None):
            raise ValueError(
                "needs sparsity (that share goes) or threshold (what scores below it goes), one of "
                "the two; write sparsity: {ramp: cubic, final: 0.8}"
            )
        if self.threshold is None:
            soft = ("initial_sparsity", "strength", "loss", "max_sparsity")
            fields = type(self).model_fields
            given = [k for k in soft if getattr(self, k) != fields[k].default]
            if given:
                raise ValueError(f"{given[0]} goes with threshold; with sparsity leave it out")
        elif self.scope == "global":
            raise ValueError("scope goes with sparsity; one threshold is for all tensors anyway")
        elif self.initial_sparsity is not None and self.threshold.ramp is None:
            raise ValueError(
                "initial_sparsity is where a ramp begins; write threshold: {ramp: cubic, final: 0}"
            )
        if self.scope == "global" and self.parts:
            raise ValueError(
                "scope: global ranks all groups together, and those of parts are of another size; "
                "use scope: layer, or an entry for each granularity"
            )
        if self.structured and self.freeze is None:
            raise ValueError(
                "structured: true gives weights back, which then have to be trained; say freeze: "
                "5ep, some time before the end"
            )
        return self


@core.method(
    "prune",
    "movement",
    source="Sanh et al. 2020, arXiv:2005.07683, eq. 5-6; groups and whole heads: Lagunas et al. "
    "2021, arXiv:2109.04838, and NNCF's movement sparsity",
)
class Movement(LearnedMasks):
    """Hide the weights whose scores, learned beside them, are lowest."""

    Options = MovementOptions

    def on_attach(self, s: Any) -> None:
        o = self.options
        self.target: float | None = None  # share or threshold; None before the first firing
        self.strength = 0.0
        self.start: float | None = None  # where the threshold begins, once that is known
        self.hidden: dict[str, float] = {}  # address -> its share at the freeze
        self.moved = False  # a step was made: before it all scores are equal and say nothing
        self.stale = False  # scores moved since `keep` was set
        scores = {}
        for a, granularity in self._granularities(s).items():
            p = s.parameter(a)
            scores[a] = Scores(granularity.fn(tuple(p.shape)), p.device)
        self._begin(s, scores, o.score_optimizer, o.score_lr)
        self._lay(s)

    @property
    def scores(self) -> dict[str, Scores]:
        """Address -> its scores."""
        return self.learned

    def on_fire(self, s: Any, progress: float) -> None:
        o = self.options
        if o.sparsity is not None:
            self.target = o.sparsity.at(progress)
            s.track(f"sparsity/{self.id}/target", self.target)
        elif (threshold := self._threshold(s)) is not None:
            self.target = threshold.at(progress)
            s.track(f"threshold/{self.id}", self.target)
        if o.strength is not None:
            self.strength = o.strength.at(progress)
            s.track(f"strength/{self.id}", self.strength)
        if self._training:
            self._choose()

    def on_batch_start(self, s: Any) -> None:
        super().on_batch_start(s)
        if self._training:
            if self.stale:
                self._choose()
            for x in self.scores.values():
                x.wake()

    def on_loss(self, s: Any) -> dict[str, Tensor]:
        if not (self._training and self.strength):
            return {}
        scores = self.scores.values()
        loss = importance_loss(
            [x.values for x in scores], [x.sizes for x in scores], form=self.options.loss
        )
        return {self.id: self.strength * loss}

    def on_before_step(self, s: Any) -> None:
        super().on_before_step(s)
        if self._training:
            self.moved = self.stale = True

    def on_batch_end(self, s: Any) -> None:
        super().on_batch_end(s)
        if self._training and s.batch + 1 >= s.steps:
            self._choose()  # what is evaluated after an epoch is what would be frozen then

    def on_epoch_end(self, s: Any) -> None:
        if self._training and self.target is not None:
            s.track(f"sparsity/{self.id}", self._closed())

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        super().on_surgery(s, edits)
        if self._training:
            self._choose()

    def state_dict(self) -> dict[str, Any]:
        own = {"target": self.target, "strength": self.strength, "start": self.start}
        return {**own, "moved": self.moved, "hidden": self.hidden, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.target, self.start = state["target"], state["start"]
        self.strength, self.moved = float(state["strength"]), bool(state["moved"])
        self.hidden = dict(state["hidden"])
        super().load_state_dict(state)
        if self._training:
            self._choose()

    # --- inside

    def _granularities(self, s: Any) -> dict[str, Kernel]:
        """Address -> what has one score there."""
        o = self.options
        out = dict.fromkeys(s.tensors(o.weights), o.granularity)
        taken: set[str] = set()
        for part in o.parts:
            for a in s.tensors(part.weights):
                if a not in out:
                    raise BindError(
                        f"'{self.id}': parts: '{a}' is not among the weights; add it there, or "
                        "take it out of the part."
                    )
                if a in taken:
                    raise BindError(
                        f"'{self.id}': parts: '{a}' is in two of them; leave it in one."
                    )
                taken.add(a)
                out[a] = part.granularity
        return out

    def _threshold(self, s: Any) -> Any:
        """The threshold over time, or None while nothing says where it begins."""
        o, scores = self.options, self.scores.values()
        if o.initial_sparsity is None:
            return o.threshold
        if self.start is None:
            if not self.moved:
                return None
            values, sizes = [x.values for x in scores], [x.sizes for x in scores]
            self.start = score_at(values, sizes, o.initial_sparsity)
            if self.start > o.threshold.final:
                s.warn(
                    "threshold-falls",
                    f"'{self.id}': the lowest scores are at {self.start:.3g} already, above the "
                    f"final threshold {o.threshold.final:.3g}. Begin earlier, or raise it.",
                )
        return replace(o.threshold, initial=self.start)

    def _choose(self) -> None:
        """Set what is kept, from scores and level."""
        scores, self.stale = self.scores, False
        if self.target is None or not self.moved:
            return
        with torch.no_grad():
            if self.options.threshold is not None:
                for x in scores.values():
                    x.keep = _above(x.values, self.target, self.options.max_sparsity)
            elif self.options.scope == "layer":
                for x in scores.values():
                    x.keep = without_lowest(x.values, removed_count(self.target, len(x.values)))
            else:
                kept = _highest_overall({a: x.values for a, x in scores.items()}, self.target)
                for a, keep in kept.items():
                    scores[a].keep = keep

    def _final_masks(self, s: Any) -> dict[str, Tensor]:
        self._choose()
        masks = super()._final_masks(s)
        if self.options.structured:
            shapes = {a: tuple(s.parameter(a).shape) for a in s.parameter_names}
            masks = whole_units(s.groups, {a: m.cpu() for a, m in masks.items()}, shapes)
        tell_share(s, self.id, {a: masks[a] for a in self.scores})
        self.hidden = {a: 1 - float(masks[a].float().mean()) for a in self.scores}
        return masks

    def _report(self, s: Any) -> None:
        """Say in the ledger what became of each tensor, and warn where nothing did."""
        closed = {a: self.hidden[a] for a in self.scores}
        for a, share in closed.items():
            why = f"movement masked {share:.1%} of its weights"
            s.note(a, "sparsity", None, None if share else "sensitive", why, self.id)
        if closed and not self.moved:
            s.warn(
                "nothing-learned",
                f"'{self.id}' made no step, so it masks nothing: before_parameter_optimization "
                "was never called. Call it before optimizer.step().",
            )
        elif closed and not any(closed.values()) and self.options.threshold is not None:
            why = "all scores are above the threshold. Raise strength, score_lr or threshold."
            if self.options.structured:
                why = "no channel or head was hidden as a whole. Raise strength, or give weights"
                why += " that write them granularity row, those that read them column."
            s.warn("nothing-masked", f"'{self.id}' masks nothing: {why}")


def _above(scores: Tensor, threshold: float, most: float) -> Tensor:
    """(G,) bool: scores above the threshold; the highest if that leaves less than 1 - `most`."""
    keep = scores > threshold
    limit = removed_count(most, len(scores))
    return without_lowest(scores, limit) if int((~keep).sum()) > limit else keep


def _highest_overall(scores: Mapping[str, Tensor], level: float) -> dict[str, Tensor]:
    """What is kept of tensors that are ranked together; the highest of each is."""
    flat = torch.cat(list(scores.values()))
    lengths = [len(v) for v in scores.values()]
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
    for start, v in zip(starts, scores.values(), strict=True):
        flat[start + int(v.argmax())] = torch.inf
    k = removed_count(level, len(flat), min_keep=len(lengths))
    return dict(zip(scores, without_lowest(flat, k).split(lengths), strict=True))
