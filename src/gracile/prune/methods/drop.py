"""Stochastic training: filters are left out at random, for a mini-batch or a while, as in dropout.

What is learned while other filters are missing depends less on any of them, so the network bears
pruning better. The masks are gone when training ends; nothing is pruned by this.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from gracile.core import method as core
from gracile.core.groups import group_sums
from gracile.errors import BindError
from gracile.prune.evidence import Evidence
from gracile.prune.grouping import group_ids
from gracile.prune.masking import Masking, MaskOptions
from gracile.prune.selection import finished, lowest, mask_without, removed_count
from gracile.recipe.fields import KernelRef, Level, kernel
from gracile.recipe.messages import FieldError, share, show


class DropOptions(MaskOptions):
    """Options of `prune: drop`.

    Attributes:
        sparsity: share of groups to leave out, a number or `{ramp, initial, final}`.
        range: instead of it, [lowest, highest]: a share drawn anew for each tensor and firing.
        choose: bernoulli: each group by itself, with the share as its chance; the name of a
            criterion: floor(share * groups) with the lowest scores (random: any of them).
        granularity: what is left out as one.
        rescale: what stays is divided by its share, so that sums keep their expected size.
        masked: frozen: what is left out gets no gradient; trained: it does.
        lifetime: until the mini-batch is over (batch), or the next firing or the end of `when`
            (span).
    """

    sparsity: Level | None = None
    range: tuple[float, float] | None = None
    choose: KernelRef("criterion", "bernoulli") = "bernoulli"  # type: ignore[valid-type]
    granularity: KernelRef("granularity") = Field(  # type: ignore[valid-type]
        default_factory=lambda: kernel("granularity", "filter")
    )
    rescale: bool = True
    masked: Literal["frozen", "trained"] = "frozen"
    lifetime: Literal["span", "batch"] = "batch"

    @field_validator("range", mode="before")
    @classmethod
    def _two_shares(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise FieldError(f"must be two shares, got {show(value)}. Write [0.1, 0.3].")
        for i, end in enumerate(value):
            if wrong := share(end):
                raise FieldError(wrong, (i,))
        if value[0] > value[1]:
            raise FieldError(f"must be [lowest, highest], got {show(value)}. Swap them.")
        return tuple(value)

    @model_validator(mode="after")
    def _one_share(self) -> Self:
        if (self.sparsity is None) == (self.range is None):
            raise FieldError("needs either 'sparsity' or 'range'. Write sparsity: 0.1.")
        return self


@core.method(
    "prune",
    "drop",
    source="Pan et al. 2018, arXiv:1810.09849; Distiller, BernoulliFilterPruner, "
    "RandomLevelStructureParameterPruner",
)
class Drop(Masking):
    """Leave filters (or other groups) out at random during training.

    At least one group of each tensor stays.
    """

    Options = DropOptions

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        ranked = options.choose != "bernoulli"
        self.evidence = Evidence.of_criterion(id, options.choose) if ranked else Evidence(id)
        self.needs = frozenset({"train"}) | self.evidence.method_needs

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        self.scales: dict[str, float] = {}  # address -> factor of what stays
        self.loaded = False
        if self.options.when.at_end:
            raise BindError(
                f"'{self.id}' acts during training; write when: {{start: 0ep, every: 16mb}} "
                "instead of 'at: end'."
            )
        group_ids(self.id, self.options.granularity, s, self.addresses)

    def on_fire(self, s: Any, progress: float) -> None:
        changed = s.changed
        s.drop_masks(self.id)
        for a, keep in self.masks(s, progress).items():
            self.scales[a] = keep.numel() / int(keep.sum()) if self.options.rescale else 1.0
            s.set_mask(self.id, a, keep, scale=self.scales[a])
        s.changed = changed or self.options.lifetime == "span"

    def masks(self, s: Any, progress: float) -> Mapping[str, Tensor]:
        ids = group_ids(self.id, self.options.granularity, s, self.addresses)
        self.evidence.gather(self, s, self.addresses)
        out = {}
        for a, groups in ids.items():
            n, level = int(groups.max()) + 1, self._level(s, a, progress)
            if self.options.choose == "bernoulli":
                gone = by_chance(n, level, s.generator(self.id, a, s.fired[self.id]))
            else:
                gone = lowest(self._scores(s, a, groups), removed_count(level, n))
            out[a] = mask_without(groups, gone)
        self.evidence.forget()
        return out

    def on_epoch_start(self, s: Any) -> None:
        super().on_epoch_start(s)
        if self.loaded:  # the session's state has the masks without their factors
            changed, self.loaded = s.changed, False
            for a in s.masked_by(self.id):
                s.set_mask(self.id, a, s.own_mask(self.id, a), scale=self.scales[a])
            s.changed = changed

    def on_before_step(self, s: Any) -> None:
        self.evidence.add_gradients(s, self.addresses)

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        super().on_surgery(s, edits)
        self.evidence.forget()  # gradients of other shapes

    def state_dict(self) -> dict[str, Any]:
        return {"scales": dict(self.scales), "evidence": self.evidence.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scales = {a: float(v) for a, v in state["scales"].items()}
        self.evidence.load_state_dict(state["evidence"])
        self.loaded = True

    def _level(self, s: Any, address: str, progress: float) -> float:
        o = self.options
        if o.range is None:
            return float(o.sparsity.at(progress))
        rng = s.generator(self.id, "level", address, s.fired[self.id])
        return float(o.range[0] + (o.range[1] - o.range[0]) * torch.rand((), generator=rng))

    def _scores(self, s: Any, address: str, groups: Tensor) -> Tensor:
        weight = s.overlays.effective(address, upto="mask").detach()  # other methods' masks
        scores = self.options.choose.fn(weight, *self.evidence.of(s, address))
        return finished(group_sums(scores, groups).cpu(), self.evidence.after)


def by_chance(n: int, chance: float, rng: torch.Generator) -> Tensor:
    """Which of n groups go, each with the same chance by itself; one stays in any case.

    Args:
        n: number of groups.
        chance: in [0, 1).
        rng: one number is drawn for each group.

    Returns:
        Indices, rising.
    """
    drawn = torch.rand(n, generator=rng)
    goes = drawn < chance
    goes[drawn.argmax()] = False
    return goes.nonzero().flatten()
