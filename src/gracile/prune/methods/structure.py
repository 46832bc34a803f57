"""Structured pruning: cut the least important coupled channels out, each cut proven first.

Nothing is masked: the model is smaller from the firing on, and training goes on with what is left.
A group whose cut fails its proof is left as it was, named in the ledger, and the rest goes on.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from gracile.analyze.widths import CostModel, Widths
from gracile.core import method as core
from gracile.core.schedule import When
from gracile.errors import BindError, UserError, VerificationError
from gracile.graph.dependency import ChannelGroup
from gracile.prune.evidence import Evidence
from gracile.prune.ranking import normalized, pools, unit_scores
from gracile.prune.selection import finished
from gracile.prune.structure import Budget, Selection, Share, candidates, select
from gracile.prune.widths import Limits
from gracile.recipe.fields import KernelRef, Level, Selector, kernel


class StructureOptions(core.Options):
    """Options of `prune: structure`.

    Attributes:
        ratio: share to remove, a number or `{ramp, initial, final}`; of the channels that can be
            cut, or of the whole model's parameters or MACs.
        target: what `ratio` is a share of: channels, params, macs.
        criterion: importance of a weight; smaller goes first.
        scope: what is ranked together: each group of coupled channels (layer), all (global), or
            groups of one shape (isomorphic).
        norm: scores of a group are divided by their mean or max, so that layers compare; or none.
            auto: mean for scope global, none otherwise.
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
    scope: Literal["layer", "global", "isomorphic"] = "global"
    norm: Literal["auto", "none", "mean", "max"] = "auto"
    ignore: Selector | None = None
    families: Literal["outermost", "all"] = "outermost"
    multiple_of: int = Field(default=1, ge=1)
    min_keep: int = Field(default=1, ge=1)
    min_width: int = Field(default=1, ge=1)
    max_ratio: float = Field(default=1.0, gt=0, le=1)
    when: When


@core.method(
    "prune",
    "structure",
    source="Li et al. 2017, arXiv:1608.08710; scope isomorphic: Fang et al. 2024, arXiv:2407.04616",
)
class Structure(core.Method):
    """Cut the least important coupled channels, to an exact share of channels or cost.

    Args:
        predict: widths after a cut -> predicted milliseconds; then `ratio` is a share of these.
    """

    Options = StructureOptions

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
        chosen = self._candidates(s)
        if not chosen:
            reasons = dict.fromkeys(f"'{g.id}': {g.protected}" for g in s.groups if g.protected)
            raise BindError(
                f"'{self.id}': none of the {len(s.groups)} groups of channels in {s.name} can be "
                f"cut: {'; '.join([*reasons][:3]) or 'all of them are ignored'}."
            )
        self.original = {g.id: len(g.units) for g in chosen}
        self.pool_of = pools(chosen, o.scope)
        self.full = self._cost(s)({})
        if o.ratio.final > 0:  # a target out of reach is refused now, not after training
            flat = {g.id: torch.ones(len(g.units), dtype=torch.float64) for g in chosen}
            self._select(s, chosen, o.ratio.final, flat)

    def on_fire(self, s: Any, progress: float) -> None:
        level = self.options.ratio.at(progress)
        while chosen := self._candidates(s):
            known = len(self.failed)
            self.evidence.gather(self, s, _producers(chosen))
            try:
                found = self._select(s, chosen, level, self._unit_scores(s, chosen))
            except UserError as e:
                if not self.failed:
                    raise
                s.warn("target-missed", f"'{self.id}': {e}")
                break
            if found.gone:
                self._cut(s, found.gone)
            if len(self.failed) == known:
                self.evidence.forget()
                self._track(s, found)
                return
        if not chosen:
            raise VerificationError(
                f"'{self.id}': no group of channels passes its proof, nothing was cut: "
                f"{next(iter(self.failed.values()))}"
            )

    def claims(self, s: Any) -> Iterable[tuple[str, str]]:
        return [("structure", g.producers[0]) for g in s.groups if g.id in self.original]

    def on_before_step(self, s: Any) -> None:
        self.evidence.add_gradients(s, _producers(self._candidates(s)))

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        self.evidence.forget()  # gradients of other shapes

    def state_dict(self) -> dict[str, Any]:
        return {"failed": dict(self.failed), "evidence": self.evidence.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.failed = dict(state["failed"])
        self.evidence.load_state_dict(state["evidence"])

    def _candidates(self, s: Any) -> list[ChannelGroup]:
        found = candidates(s.groups, self.ignored, self.options.families)
        return [
            g for g in found if g.id not in self.failed and g.id in (self.original or {g.id: 0})
        ]

    def _unit_scores(self, s: Any, chosen: list[ChannelGroup]) -> dict[str, Tensor]:
        sums = unit_scores(chosen, lambda at: self._scores(s, at))
        return {id: finished(v, self.evidence.after) for id, v in sums.items()}

    def _select(
        self, s: Any, chosen: list[ChannelGroup], level: float, scores: dict[str, Tensor]
    ) -> Selection:
        norm = self.options.norm
        if norm == "auto":
            norm = "mean" if self.options.scope == "global" else "none"
        return select(
            chosen,
            {id: normalized(v, norm) for id, v in scores.items()},
            self._goal(s, level),
            pool_of=self.pool_of,
            limits=self.limits,
            original=self.original,
        )

    def _goal(self, s: Any, level: float) -> Share | Budget:
        if self.predict is None and self.options.target == "channels":
            return Share(level)
        measure = "ms" if self.predict is not None else self.options.target
        return Budget(measure, (1 - level) * self.full, self._cost(s))

    def _cost(self, s: Any) -> Callable[[Widths], float]:
        if self.predict is not None:
            return self.predict
        model, target = CostModel.of(s.model, s.graph, s.groups), self.options.target
        return lambda kept: model.total("macs" if target == "macs" else "params", kept)

    def _scores(self, s: Any, address: str) -> Tensor:
        weight = s.overlays.effective(address, upto="mask")
        with torch.no_grad():
            evidence = self.evidence.of(s, address)
            return self.options.criterion.fn(weight.detach(), *evidence)  # type: ignore[no-any-return]

    def _cut(self, s: Any, gone: Mapping[str, Iterable[int]]) -> None:
        """Cut all of these groups, or in halves as many as pass their proof."""
        try:
            s.cut(gone, by=self.id, reproduce=len(gone) == 1)
        except VerificationError as e:
            ids = list(gone)
            if len(ids) == 1:
                self._refuse(s, ids[0], str(e))
                return
            for part in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
                self._cut(s, {id: gone[id] for id in part})

    def _refuse(self, s: Any, id: str, why: str) -> None:
        self.failed[id] = why
        s.warn("cut-refused", f"'{self.id}': '{id}' is left as it was: {why}")
        self._protect(s, next(g for g in s.groups if g.id == id), why)

    def _protect(self, s: Any, group: ChannelGroup, why: str) -> None:
        for address in group.producers:
            s.note(address, "structure", "kept", "protected", why, self.id)

    def _track(self, s: Any, found: Selection) -> None:
        if found.reached > found.wanted and found.measure == "channels":
            s.warn(
                "target-missed",
                f"'{self.id}' keeps {found.reached:,.0f} channels, {found.wanted:,.0f} were asked "
                "for: the limits (multiple_of, min_keep, min_width, max_ratio) or narrow layers "
                "that feed wide ones allow no more.",
            )
        s.track(f"{found.measure}/{self.id}", found.reached)


def _producers(groups: Iterable[ChannelGroup]) -> list[str]:
    return [*dict.fromkeys(at for g in groups for at in g.writes)]
