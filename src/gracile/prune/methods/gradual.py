"""Gradual (or one-shot) pruning: at each firing the least important groups of weights become zero.

Criterion, granularity, ramp and timing are independent choices. With granularity `filter` or
`channel` the ranking runs over coupled channels (all layers a residual addition ties together lose
the same ones), and the masks cover all that a later `prune: thin` cuts, so cutting changes nothing.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from gracile import registry
from gracile.core import method as core
from gracile.core.plan import Mask
from gracile.core.schedule import When
from gracile.errors import BindError, GracileError
from gracile.prune.selection import (
    group_scores,
    lowest,
    lowest_overall,
    mask_without,
    removed_count,
)
from gracile.recipe.fields import KernelRef, Level, Selector, kernel

COUPLED = {"filter": 0, "channel": 1}  # granularity -> dim of the weight


class GradualOptions(core.Options):
    """Options of `prune: gradual` and `prune: oneshot`.

    Attributes:
        weights: which tensors.
        sparsity: share of groups to remove, a number or `{ramp, initial, final}`.
        criterion: importance of a weight; smaller goes first.
        granularity: what goes as one: element, filter, channel.
        scope: rank inside each layer, or all layers together.
        multiple_of: filters and channels: keep a multiple of this many (16 suits AVX-512).
        min_keep: at least this many groups stay in every layer.
        scores_from: rank by the masked weight ("effective": what is pruned stays pruned) or by
            the stored one ("dense": a pruned weight that grew can come back).
        when: the firings.
    """

    weights: Selector
    sparsity: Level
    criterion: KernelRef("criterion") = Field(default_factory=lambda: kernel("criterion", "l1"))  # type: ignore[valid-type]
    granularity: KernelRef("granularity") = Field(  # type: ignore[valid-type]
        default_factory=lambda: kernel("granularity", "element")
    )
    scope: Literal["layer", "global"] = "layer"
    multiple_of: int = Field(default=1, ge=1)
    min_keep: int = Field(default=1, ge=1)
    scores_from: Literal["effective", "dense"] = "effective"
    when: When


@core.method(
    "prune",
    "gradual",
    source="Zhu & Gupta 2017, arXiv:1710.01878; filters: Li et al. 2017, 1608.08710",
)
class Gradual(core.Method):
    """Zero the least important weights, filters or channels, along a ramp."""

    Options = GradualOptions
    needs = frozenset()

    def on_attach(self, s: Any) -> None:
        self.addresses: list[str] = s.tensors(self.options.weights)
        self.asked: dict[str, int] = {}  # address or group id -> how many groups are masked
        dim = COUPLED.get(self.options.granularity.name)
        self.coupled = dim is not None
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

    def on_fire(self, s: Any, progress: float) -> None:
        level = self.options.sparsity.at(progress)
        if self.coupled:
            self._mask_coupled(s, level)
        else:
            self._mask_separate(s, level)
        s.track(f"sparsity/{self.id}", level)

    def on_detach(self, s: Any) -> Iterable[Mask]:
        self._check_reached(s)
        edits: list[Mask] = s.mask_edits(self.id)
        return edits

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        self.asked.clear()  # counts start again from what was left
        self.addresses = [a for a in self.addresses if a in s.parameter_names]

    def state_dict(self) -> dict[str, Any]:
        return {"asked": dict(self.asked)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = {k: int(v) for k, v in state["asked"].items()}

    # --- one tensor at a time (elements and other uncoupled granularities)

    def _mask_separate(self, s: Any, level: float) -> None:
        groups = {
            a: self.options.granularity.fn(tuple(s.parameter(a).shape)) for a in self.addresses
        }
        scores = {a: group_scores(self._scores(s, a), groups[a]).cpu() for a in self.addresses}
        for a, gone in self._choose(s, scores, level).items():
            s.set_mask(self.id, a, mask_without(groups[a], gone))

    # --- coupled channels

    def _mask_coupled(self, s: Any, level: float) -> None:
        chosen = {g.id: g for g in self._groups(s)}
        scores = {id: self._unit_scores(s, g).cpu() for id, g in chosen.items()}
        masks: dict[str, Tensor] = {}
        for id, gone in self._choose(s, scores, level).items():
            possible = chosen[id].removable(gone.tolist())  # a narrow feeder keeps one channel
            for u in possible:
                for part in chosen[id].units[u]:
                    if part.at not in s.parameter_names:
                        continue  # buffers are cut by surgery, not masked
                    if part.at not in masks:
                        masks[part.at] = torch.ones(s.parameter(part.at).shape, dtype=torch.bool)
                    masks[part.at].index_fill_(part.dim, torch.tensor(part.index), False)
        for address, mask in masks.items():
            s.set_mask(self.id, address, mask)

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
        scores = {a: self._scores(s, a).cpu() for a in _sides(group, self.dim)}
        return torch.tensor(
            [
                sum(
                    float(scores[p.at].index_select(p.dim, torch.tensor(p.index)).sum())
                    for p in self._parts(group, u)
                )
                for u in range(len(group.units))
            ],
            dtype=torch.float64,
        )

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
        return self.options.criterion.fn(weight.detach())  # type: ignore[no-any-return]

    def _choose(self, s: Any, scores: dict[str, Tensor], level: float) -> dict[str, Tensor]:
        o = self.options
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
            gone = {
                a: lowest(
                    v,
                    removed_count(level, len(v), multiple_of=o.multiple_of, min_keep=o.min_keep),
                )
                for a, v in scores.items()
            }
        self.asked = {a: len(g) for a, g in gone.items()}
        return gone

    def _check_reached(self, s: Any) -> None:
        for key, n in self.asked.items():
            if self.coupled or n == 0:
                continue
            mask = s.own_mask(self.id, key)
            groups = self.options.granularity.fn(tuple(mask.shape))
            reached = int((group_scores((~mask).float(), groups) > 0).sum())
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
