"""Gradual (or one-shot) pruning: at each firing the least important groups of weights become zero.

Criterion, granularity, ramp and timing are independent choices. With granularity `filter` or
`channel` the ranking runs over coupled channels (all layers a residual addition ties together lose
the same ones), and the masks cover all that a later `prune: thin` cuts, so cutting changes nothing.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from gracile import registry
from gracile.core import method as core
from gracile.core.groups import group_sums
from gracile.core.plan import Mask
from gracile.errors import BindError, GracileError
from gracile.graph.dependency import mask_units
from gracile.prune.evidence import Evidence
from gracile.prune.masking import Masking, MaskOptions
from gracile.prune.selection import (
    finished,
    lowest,
    lowest_overall,
    mask_without,
    noisy,
    removed_count,
    with_ties,
)
from gracile.recipe.fields import KernelRef, Level, kernel

COUPLED = {"filter": 0, "channel": 1}  # granularity -> dim of the weight


class GradualOptions(MaskOptions):
    """Options of `prune: gradual` and `prune: oneshot`.

    Attributes:
        sparsity: share of groups to remove, a number or `{ramp, initial, final}`.
        criterion: importance of a weight; smaller goes first.
        granularity: what goes as one: element, filter, channel.
        scope: rank inside each layer, or all layers together.
        rank_by: coupled filters and channels: by the sum over all layers that make (or read) them,
            or by one of them alone: the first in the network, or the first that `weights` lists.
        multiple_of: filters and channels: keep a multiple of this many (16 suits AVX-512).
        min_keep: at least this many groups stay in every layer.
        scores_from: rank by the masked weight ("effective": what is pruned stays pruned) or by
            the stored one ("dense": a pruned weight that grew can come back).
        noise: chance that a score is multiplied by a standard normal number before ranking.
    """

    sparsity: Level
    criterion: KernelRef("criterion") = Field(default_factory=lambda: kernel("criterion", "l1"))  # type: ignore[valid-type]
    granularity: KernelRef("granularity") = Field(  # type: ignore[valid-type]
        default_factory=lambda: kernel("granularity", "element")
    )
    scope: Literal["layer", "global"] = "layer"
    multiple_of: int = Field(default=1, ge=1)
    min_keep: int = Field(default=1, ge=1)
    rank_by: Literal["all", "first", "listed"] = "all"
    scores_from: Literal["effective", "dense"] = "effective"
    noise: float = Field(default=0.0, ge=0, le=1)


@core.method(
    "prune",
    "gradual",
    source="Zhu & Gupta 2017, arXiv:1710.01878; filters: Li et al. 2017, 1608.08710",
)
class Gradual(Masking):
    """Zero the least important weights, filters or channels, along a ramp."""

    Options = GradualOptions

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        self.evidence = Evidence.of_criterion(id, options.criterion)
        self.needs = self.evidence.method_needs

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        self.asked: dict[str, int] = {}  # address or group id -> how many groups are masked
        dim = COUPLED.get(self.options.granularity.name)
        self.coupled = dim is not None
        self.leaders = self._listed(s) if self.options.rank_by == "listed" else []
        if dim is None:
            return
        self.dim = dim
        small = [a for a in self.addresses if s.parameter(a).dim() <= dim]
        if small:
            raise BindError(
                f"'{self.id}': granularity {self.options.granularity.name} needs weights of "
                f"at least {dim + 1} dimensions; '{small[0]}' has {s.parameter(small[0]).dim()}. "
                "Narrow the selector, for example to 'type:Conv2d'."
            )
        if not self._groups(s, note=True):
            raise BindError(
                f"'{self.id}': none of the {len(self.addresses)} selected weights can lose "
                f"{self.options.granularity.name}s: " + "; ".join(self._refusals(s)[:3])
            )

    def on_before_step(self, s: Any) -> None:
        self.evidence.add_gradients(s, self.addresses)

    def masks(self, s: Any, progress: float) -> Mapping[str, Tensor]:
        level = self.options.sparsity.at(progress)
        self.evidence.gather(self, s, self._ranked(s))
        masks = self._coupled_masks(s, level) if self.coupled else self._separate_masks(s, level)
        self.evidence.forget()
        s.track(f"sparsity/{self.id}", level)
        return masks

    def on_detach(self, s: Any) -> Iterable[Mask]:
        if self.options.lifetime == "run" and self.flags is None:  # strict: others may end masks
            self._check_reached(s)
        return super().on_detach(s)

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        super().on_surgery(s, edits)
        self.asked.clear()  # counts start again from what was left
        self.evidence.forget()  # gradients of other shapes

    def state_dict(self) -> dict[str, Any]:
        return {"asked": dict(self.asked), "evidence": self.evidence.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = {k: int(v) for k, v in state["asked"].items()}
        self.evidence.load_state_dict(state["evidence"])

    # --- one tensor at a time (elements and other uncoupled granularities)

    def _separate_masks(self, s: Any, level: float) -> dict[str, Tensor]:
        groups = {
            a: self.options.granularity.fn(tuple(s.parameter(a).shape)) for a in self.addresses
        }
        scores = {
            a: finished(group_sums(self._scores(s, a), groups[a]).cpu(), self.evidence.after)
            for a in self.addresses
        }
        chosen = self._choose(s, scores, level)
        return {a: mask_without(groups[a], gone) for a, gone in chosen.items()}

    # --- coupled channels

    def _ranked(self, s: Any) -> list[str]:
        """Addresses whose elements are scored."""
        if not self.coupled:
            return self.addresses
        return [*dict.fromkeys(a for g in self._groups(s) for a in self._rankers(g))]

    def _rankers(self, group: Any) -> tuple[str, ...]:
        sides = _sides(group, self.dim)
        if self.options.rank_by == "all":
            return sides
        return (min(sides, key=self.leaders.index),) if self.leaders else sides[:1]

    def _listed(self, s: Any) -> list[str]:
        """The selected tensors in the order of the selector's patterns."""
        given = self.options.weights
        patterns = [p for p in ([given] if isinstance(given, str) else given) if p[0] != "!"]
        found = dict.fromkeys(a for p in patterns for a in s.tensors(p))
        return list(found) or self.addresses

    def _coupled_masks(self, s: Any, level: float) -> dict[str, Tensor]:
        chosen = {g.id: g for g in self._groups(s)}
        scores = {id: self._unit_scores(s, g).cpu() for id, g in chosen.items()}
        masks: dict[str, Tensor] = {}
        shapes = {a: tuple(s.parameter(a).shape) for a in s.parameter_names}
        for id, gone in self._choose(s, scores, level).items():
            possible = chosen[id].removable(gone.tolist())  # a narrow feeder keeps one channel
            mask_units(masks, chosen[id], possible, shapes)
        return masks

    def _groups(self, s: Any, note: bool = False) -> list[Any]:
        """Groups whose every producer (filter) or consumer (channel) is selected, not protected."""
        out, selected = [], set(self.addresses)
        whys = dict.fromkeys(
            self.addresses,
            "its channels are the model's own inputs or outputs, or cannot be followed",
        )
        for g in s.groups:
            why = _refusal(g, selected, self.dim)
            if why is None:
                out.append(g)
            for a in selected & set(_sides(g, self.dim)):
                whys[a] = why or ""
        for address, why in whys.items():
            if note and why:
                s.note(address, "structure", "kept", "protected", why, self.id)
        return out

    def _refusals(self, s: Any) -> list[str]:
        whys = [_refusal(g, set(self.addresses), self.dim) for g in s.groups]
        return sorted({w for w in whys if w})

    def _unit_scores(self, s: Any, group: Any) -> Tensor:
        """(units,) importance: the sum over the slices that make (or read) a channel."""
        scores = {a: self._scores(s, a).cpu() for a in self._rankers(group)}
        total = [
            sum(
                float(scores[p.at].index_select(p.dim, torch.tensor(p.index)).sum())
                for p in self._parts(group, u)
                if p.at in scores
            )
            for u in range(len(group.units))
        ]
        return finished(torch.tensor(total, dtype=torch.float64), self.evidence.after)

    def _parts(self, group: Any, unit: int) -> list[Any]:
        if self.dim == 0:
            return list(group.written(unit))
        return [
            p
            for p in group.units[unit]
            if p.at in group.consumers and group.writes.get(p.at) != p.dim
        ]

    # --- shared

    def _scores(self, s: Any, address: str) -> Tensor:
        if self.options.scores_from == "effective":
            weight = s.overlays.effective(address, upto="mask")
        else:
            weight = s.parameter(address)
        evidence = self.evidence.of(s, address)
        return self.options.criterion.fn(weight.detach(), *evidence)  # type: ignore[no-any-return]

    def _choose(self, s: Any, scores: dict[str, Tensor], level: float) -> dict[str, Tensor]:
        o = self.options
        if o.noise:
            rng = s.generator(self.id, "noise", self.evidence.firings)
            scores = {a: noisy(v, o.noise, rng) for a, v in scores.items()}
        if o.scope == "global":
            k = removed_count(level, sum(len(v) for v in scores.values()))
            gone = lowest_overall(scores, k, min_keep=o.min_keep)
            if o.multiple_of > 1:
                gone = {
                    a: lowest(
                        scores[a],
                        removed_count(
                            len(g) / len(scores[a]),
                            len(scores[a]),
                            multiple_of=o.multiple_of,
                            min_keep=o.min_keep,
                        ),
                    )
                    for a, g in gone.items()
                }
        else:
            strict = s.recipe.compat == "strict"
            counts = {
                a: removed_count(
                    level, len(v), multiple_of=o.multiple_of, min_keep=o.min_keep, strict=strict
                )
                for a, v in scores.items()
            }
            gone = {a: lowest(v, counts[a]) for a, v in scores.items()}
            if strict and o.criterion.name in ("l1", "l2"):
                gone = {a: with_ties(scores[a], g) for a, g in gone.items()}
        self.asked = {a: len(g) for a, g in gone.items()}
        return gone

    def _check_reached(self, s: Any) -> None:
        for key, n in self.asked.items():
            if self.coupled or n == 0:
                continue
            mask = s.own_mask(self.id, key)
            groups = self.options.granularity.fn(tuple(mask.shape))
            reached = int((group_sums((~mask).float(), groups) > 0).sum())
            if reached != n:
                raise GracileError(
                    f"'{self.id}': '{key}' should have {n} pruned groups and has {reached}."
                )


registry.register(
    "method",
    "prune/oneshot",
    source="Li et al. 2017, arXiv:1608.08710 (prune once, then fine-tune)",
)(Gradual)


def _sides(group: Any, dim: int) -> tuple[str, ...]:
    return group.producers if dim == 0 else group.consumers  # type: ignore[no-any-return]


def _refusal(group: Any, selected: set[str], dim: int) -> str | None:
    """None: may be pruned. "": not asked. Otherwise the reason it may not."""
    sides = _sides(group, dim)
    mine = selected & set(sides)
    if not mine:
        return ""
    if group.protected:
        return f"'{sorted(mine)[0]}': {group.protected}"
    left_out = [a for a in sides if a not in selected]
    if left_out:
        return (
            f"'{sorted(mine)[0]}' shares its channels with '{left_out[0]}', which is not selected; "
            "select both or neither"
        )
    return None
