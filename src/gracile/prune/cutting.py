"""What all methods that cut coupled channels have in common.

A method says which units go at a firing; this says which groups may lose any, how far, what a
criterion sees, and what becomes of a group whose cut fails its proof: it is left as it was, named
in the ledger, and the rest goes on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gracile.analyze.widths import CostModel, Widths
from gracile.core import method as core
from gracile.core.schedule import When
from gracile.errors import BindError, UserError, VerificationError
from gracile.graph.dependency import ChannelGroup
from gracile.prune.evidence import Evidence
from gracile.prune.ranking import pools, unit_scores
from gracile.prune.selection import finished
from gracile.prune.structure import Budget, Selection, Share, amount, candidates, select
from gracile.prune.widths import Limits
from gracile.recipe.fields import KernelRef, Level, Selector, kernel


class CutOptions(core.Options):
    """Options of every method that cuts channels.

    Attributes:
        ratio: share to remove, a number or `{ramp, initial, final}`; of the channels that can be
            cut, or of the whole model's parameters or MACs.
        target: what `ratio` is a share of: channels, params, macs.
        criterion: importance of a weight; smaller goes first.
        ignore: tensors whose channels are left alone.
        families: of groups on the same axes (heads, and the width in each head) cut only the
            outermost, or all.
        multiple_of: cut only down to a multiple of so many channels (16 suits AVX-512).
        min_keep: units (channels, or whole heads) that stay in every group.
        min_width: channels that stay in every group.
        max_ratio: largest share that one group may lose.
        when: the firings.
    """

    ratio: Level
    target: Literal["channels", "params", "macs"] = "channels"
    criterion: KernelRef("criterion") = Field(default_factory=lambda: kernel("criterion", "l1"))  # type: ignore[valid-type]
    ignore: Selector | None = None
    families: Literal["outermost", "all"] = "outermost"
    multiple_of: int = Field(default=1, ge=1)
    min_keep: int = Field(default=1, ge=1)
    min_width: int = Field(default=1, ge=1)
    max_ratio: float = Field(default=1.0, gt=0, le=1)
    when: When


class Cutting(core.Method):
    """Base of the methods that cut channels; a subclass chooses and cuts in `on_fire`.

    Args:
        predict: widths after a cut -> predicted milliseconds; then `ratio` is a share of these.
    """

    Options: ClassVar[type[core.Options]] = CutOptions

    def __init__(self, id: str, options: Any, predict: Callable[[Widths], float] | None = None):
        super().__init__(id, options)
        self.predict = predict
        self.evidence = Evidence.of_criterion(id, options.criterion)
        self.needs = self.evidence.method_needs

    def on_attach(self, s: Any) -> None:
        o = self.options
        self.ignored = frozenset(s.tensors(o.ignore) if o.ignore is not None else ())
        self.limits = Limits(o.multiple_of, o.min_keep, o.min_width, o.max_ratio)
        self.failed: dict[str, str] = {}  # group id -> why its cut was rolled back
        self.original: dict[str, int] = {}
        for g in s.groups:
            if g.protected is not None:
                self._protect(s, g, g.protected)
        chosen = self.ready(s)
        if not chosen:
            reasons = dict.fromkeys(f"'{g.id}': {g.protected}" for g in s.groups if g.protected)
            raise BindError(
                f"'{self.id}': none of the {len(s.groups)} groups of channels in {s.name} can be "
                f"cut: {'; '.join([*reasons][:3]) or 'all of them are ignored'}."
            )
        self.original = {g.id: len(g.units) for g in chosen}
        self.pool_of = pools(chosen, self.scope)
        self.full = self.cost(s)({})
        flat = {g.id: torch.ones(len(g.units), dtype=torch.float64) for g in chosen}
        for level in self.levels:  # a target out of reach is refused now, not after training
            if level > 0:
                self.select(s, chosen, level, flat)

    def claims(self, s: Any) -> Iterable[tuple[str, str]]:
        return [("structure", g.producers[0]) for g in s.groups if g.id in self.original]

    def on_before_step(self, s: Any) -> None:
        self.evidence.add_gradients(s, producers(self.ready(s)))

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        self.evidence.forget()  # gradients of other shapes

    def state_dict(self) -> dict[str, Any]:
        return {"failed": dict(self.failed), "evidence": self.evidence.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.failed = dict(state["failed"])
        self.evidence.load_state_dict(state["evidence"])

    @property
    def scope(self) -> str:
        """What is ranked together, see `ranking.pools`."""
        return "global"

    @property
    def levels(self) -> tuple[float, ...]:
        """Shares to remove that the limits must allow."""
        return (float(self.options.ratio.final),)

    def ready(self, s: Any) -> list[ChannelGroup]:
        """The groups that may be cut, in the model as it is now."""
        found = candidates(s.groups, self.ignored, self.options.families)
        return [
            g for g in found if g.id not in self.failed and g.id in (self.original or {g.id: 0})
        ]

    def scores(self, s: Any, chosen: list[ChannelGroup]) -> dict[str, Tensor]:
        """Group id -> (units,) importance, by what the evidence shows (`evidence.gather`)."""
        sums = unit_scores(chosen, lambda at: self._element_scores(s, at))
        return {id: finished(v, self.evidence.after) for id, v in sums.items()}

    def select(
        self, s: Any, chosen: list[ChannelGroup], level: float, scores: dict[str, Tensor]
    ) -> Selection:
        """The least important units of these groups that bring the model to a level.

        Raises:
            UserError: the level cannot be reached within the limits.
        """
        spent = self._spent(s, chosen)
        flat = {g.id: torch.ones(1, dtype=torch.float64) for g in spent}
        return select(
            [*chosen, *spent],
            {**scores, **flat},
            self._goal(s, level),
            pool_of=self.pool_of,
            limits=self.limits,
            original=self.original,
        )

    def cost(self, s: Any) -> Callable[[Widths], float]:
        """Widths after a cut -> what is left of the target, in the model as it is now."""
        if self.predict is not None:
            return self.predict
        model, target = CostModel.of(s.model, s.graph, s.groups), self.options.target
        return lambda kept: model.total("macs" if target == "macs" else "params", kept)

    def cut_to(
        self,
        s: Any,
        level: float,
        comparable: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    ) -> None:
        """Bring the model to a level in one cut, as `select` does; others take over what fails.

        Args:
            s: the session.
            level: share that is gone afterwards.
            comparable: group id -> (units,) scores, put on one scale.

        Raises:
            UserError: the level cannot be reached within the limits.
            VerificationError: no group passes its proof.
        """
        while chosen := self.ready(s):
            known = len(self.failed)
            self.evidence.gather(self, s, producers(chosen))
            try:
                found = self.select(s, chosen, level, comparable(self.scores(s, chosen)))
            except UserError as e:
                if not self.failed:
                    raise
                s.warn("target-missed", f"'{self.id}': {e}")
                break
            if found.gone:
                self.cut(s, found.gone)
            if len(self.failed) == known:
                self.evidence.forget()
                self.track(s, found.measure, found.wanted, found.reached)
                return
        if not chosen and self.failed:
            raise self.none_passed()
        if not chosen:
            s.warn(
                "target-missed",
                f"'{self.id}' has nothing left to cut: other entries have left out or replaced "
                "all groups of channels that it could. Let it fire before them.",
            )

    def cut(self, s: Any, gone: Mapping[str, Iterable[int]]) -> None:
        """Cut all of these groups, or in halves as many as pass their proof."""
        try:
            s.cut(gone, by=self.id, reproduce=len(gone) == 1)
        except VerificationError as e:
            ids = list(gone)
            if len(ids) == 1:
                self._refuse(s, ids[0], str(e))
                return
            for part in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
                self.cut(s, {id: gone[id] for id in part})

    def none_passed(self) -> VerificationError:
        """What to raise if every group failed its proof."""
        return VerificationError(
            f"'{self.id}': no group of channels passes its proof, nothing was cut: "
            f"{next(iter(self.failed.values()))}"
        )

    def track(self, s: Any, measure: str, wanted: float, reached: float) -> None:
        """Add what is left to the report's curve; warn where limits kept channels."""
        if reached > wanted:
            s.warn(
                "target-missed",
                f"'{self.id}' keeps {amount(reached)} {measure}, {amount(wanted)} were asked "
                "for: the limits (multiple_of, min_keep, min_width, max_ratio) or narrow layers "
                "that feed wide ones allow no more.",
            )
        s.track(f"{measure}/{self.id}", reached)

    def _spent(self, s: Any, chosen: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        """Groups of which one unit is left: what they have lost counts in a share of channels."""
        able = {g.id for g in chosen} | set(self.failed)
        return [
            g for g in s.groups if g.id in self.original and g.id not in able and len(g.units) == 1
        ]

    def _goal(self, s: Any, level: float) -> Share | Budget:
        if self.predict is None and self.options.target == "channels":
            return Share(level)
        measure = "ms" if self.predict is not None else self.options.target
        return Budget(measure, (1 - level) * self.full, self.cost(s))

    def _element_scores(self, s: Any, address: str) -> Tensor:
        weight = s.overlays.effective(address, upto="mask")
        with torch.no_grad():
            evidence = self.evidence.of(s, address)
            return self.options.criterion.fn(weight.detach(), *evidence)  # type: ignore[no-any-return]

    def _refuse(self, s: Any, id: str, why: str) -> None:
        self.failed[id] = why
        s.warn("cut-refused", f"'{self.id}': '{id}' is left as it was: {why}")
        self._protect(s, next(g for g in s.groups if g.id == id), why)

    def _protect(self, s: Any, group: ChannelGroup, why: str) -> None:
        for address in group.producers:
            s.note(address, "structure", "kept", "protected", why, self.id)


def producers(groups: Iterable[ChannelGroup]) -> list[str]:
    """Addresses of the weights that write these channels, each once."""
    return [*dict.fromkeys(at for g in groups for at in g.writes)]
