"""The lottery ticket: prune a trained network, then set what is left back to where it started.

If the sparse network learns as well from there as the dense one did, the values it started from
were a winning ticket. Two controls tell whether it was the values or the mask.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from gracile.core import method as core
from gracile.core.plan import Skip
from gracile.core.schedule import TimeField
from gracile.errors import BindError
from gracile.graph.depth import covers
from gracile.prune.masking import Masking, MaskOptions
from gracile.prune.selection import lowest, lowest_overall, mask_without, removed_count
from gracile.prune.thresholding import spread
from gracile.recipe.fields import Level


class LotteryOptions(MaskOptions):
    """Options of `prune: lottery`.

    Attributes:
        sparsity: share of weights that each firing prunes, a number or `{ramp, initial, final}`.
        of: what it is a share of: the weights that remain (remaining), so that 0.2 leaves
            0.8, 0.64, ... of them; or all, so that it is the sparsity after the firing.
        scope: rank magnitudes inside each tensor, or over all together.
        rewind_to: the time whose values are put back; 0ep: those the run began with. Must come
            before the first firing.
        rewind: what is put back: all parameters and buffers of the network, or only those selected.
        control: none; reinit: the selected weights get random normal values of the standard
            deviation theirs had; random_mask: in each tensor as many weights go, but any.
    """

    sparsity: Level
    of: Literal["remaining", "all"] = "remaining"
    scope: Literal["layer", "global"] = "layer"
    rewind_to: TimeField = Field(default="0ep", validate_default=True)
    rewind: Literal["all", "selected"] = "all"
    control: Literal["none", "reinit", "random_mask"] = "none"


@core.method(
    "prune",
    "lottery",
    source="Frankle & Carbin 2019, arXiv:1803.03635; rewinding: Frankle et al. 2019, "
    "arXiv:1903.01611",
)
class Lottery(Masking):
    """Prune by magnitude, then rewind the weights that stay to an earlier time.

    The optimizer forgets what it knew of a tensor that is put back. The learning rate goes on; take
    a schedule that begins anew after each firing.
    """

    Options = LotteryOptions

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        self.remembered: dict[str, Tensor] = {}
        self.moment = s.calendar.minibatch(self.options.rewind_to)
        firings = (*s.timetables[self.id].instants, s.calendar.instant(s.calendar.total))
        if self.moment and s.calendar.instant(self.moment) >= firings[0]:
            raise BindError(
                f"'{self.id}': rewind_to must come before the first firing and the end of "
                f"training, got {self.options.rewind_to}. Let it fire later."
            )
        self._remember(s)

    def masks(self, s: Any, progress: float) -> Mapping[str, Tensor]:
        own = {a: s.own_mask(self.id, a).cpu().reshape(-1) for a in self.addresses}
        sizes = {a: s.overlays.effective(a, upto="mask").detach().abs() for a in self.addresses}
        flat = {a: torch.where(own[a], v.cpu().reshape(-1), -1.0) for a, v in sizes.items()}
        gone = self._choose(flat, own, self.options.sparsity.at(progress))
        if self.options.control == "random_mask":
            gone = {a: lowest(self._drawn(s, a, own[a]), len(g)) for a, g in gone.items()}
        total = sum(len(v) for v in flat.values())
        s.track(f"sparsity/{self.id}", sum(len(g) for g in gone.values()) / max(1, total))
        return {
            a: mask_without(torch.arange(len(flat[a])), g).reshape(sizes[a].shape)
            for a, g in gone.items()
        }

    def on_fire(self, s: Any, progress: float) -> None:
        super().on_fire(s, progress)
        buffers = dict(s.model.named_buffers())
        with torch.no_grad():
            for name, value in self.remembered.items():
                if name not in s.parameter_names:
                    buffers[name].copy_(value)
                    continue
                if self.options.control == "reinit" and name in self.addresses:
                    value = self._new(s, name, value)
                s.parameter(name).copy_(value)
                if s.optimizer is not None:
                    s.optimizer.state.pop(s.parameter(name), None)

    def on_epoch_start(self, s: Any) -> None:
        super().on_epoch_start(s)
        self._remember(s)

    def on_batch_start(self, s: Any) -> None:
        super().on_batch_start(s)
        self._remember(s)

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        super().on_surgery(s, edits)
        for edit in edits:
            if isinstance(edit, Skip):
                self.remembered = {
                    a: v for a, v in self.remembered.items() if not covers(edit.gone, a)
                }
                continue
            for part in getattr(edit, "group", ()):
                if part.at in self.remembered:
                    old = self.remembered[part.at]
                    index = torch.tensor(part.keep, device=old.device)
                    self.remembered[part.at] = old.index_select(part.dim, index)
        there = {*s.parameter_names, *(name for name, _ in s.model.named_buffers())}
        self.remembered = {a: v for a, v in self.remembered.items() if a in there}

    def state_dict(self) -> dict[str, Any]:
        return {"remembered": dict(self.remembered)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.remembered = dict(state["remembered"])

    def _remember(self, s: Any) -> None:
        if self.remembered or s.now != self.moment:
            return
        values = dict(s.model.named_parameters())
        if self.options.rewind == "all":
            values |= dict(s.model.named_buffers())
        names = values if self.options.rewind == "all" else self.addresses
        self.remembered = {a: values[a].detach().clone() for a in names}

    def _choose(
        self, scores: Mapping[str, Tensor], own: Mapping[str, Tensor], level: float
    ) -> dict[str, Tensor]:
        """Address -> indices that are gone after this firing, those that were gone included."""
        if self.options.scope == "global":
            left = sum(int(m.sum()) for m in own.values())
            return lowest_overall(scores, self._count(level, left, _total(own)))
        return {
            a: lowest(v, self._count(level, int(own[a].sum()), len(v))) for a, v in scores.items()
        }

    def _count(self, level: float, left: int, n: int) -> int:
        if self.options.of == "all":
            return removed_count(level, n, done=n - left)
        return n - left + removed_count(level, left)

    def _drawn(self, s: Any, address: str, own: Tensor) -> Tensor:
        rng = s.generator(self.id, "mask", address, s.fired[self.id])
        return torch.where(own, torch.rand(own.shape, generator=rng), -1.0)

    def _new(self, s: Any, address: str, old: Tensor) -> Tensor:
        rng = s.generator(self.id, "reinit", address, s.fired[self.id])
        return torch.randn(old.shape, generator=rng).to(old) * spread(old)


def _total(masks: Mapping[str, Tensor]) -> int:
    return sum(m.numel() for m in masks.values())
