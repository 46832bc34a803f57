"""Dynamic network surgery: prune below one threshold, take back above a higher one.

Between the two a weight stays as it is, so that it does not flicker. Weights under the mask go on
learning, or none could grow back.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gracile.core import method as core
from gracile.core.schedule import When
from gracile.prune.masking import Masking, MaskOptions
from gracile.prune.thresholding import spread, tell_share
from gracile.recipe.messages import FieldError


class SplicingOptions(MaskOptions):
    """Options of `prune: splicing`.

    Attributes:
        sensitivity: s; both thresholds are multiples of t = mean + s * std of |w|, as these were
            at the first firing. More prunes more.
        low_mult: a weight below low_mult * t is pruned.
        high_mult: a pruned weight from high_mult * t on comes back.
        growth: s is multiplied by 1 + growth * (epochs since the start of `when`), whole ones under
            compat: strict.
        masked: as everywhere; here trained is the default.
    """

    sensitivity: float
    low_mult: float = Field(default=0.9, gt=0)
    high_mult: float = Field(default=1.1, gt=0)
    growth: float = Field(default=0.0, ge=0)
    masked: Literal["frozen", "trained", "reset"] = "trained"

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.high_mult < self.low_mult:
            raise FieldError(
                f"must not be below low_mult ({self.low_mult:g}), got {self.high_mult:g}. "
                "Write a larger value.",
                ("high_mult",),
            )
        return self


@core.method("prune", "splicing", source="Guo et al. 2016, arXiv:1608.04493, eq. 3")
class Splicing(Masking):
    """Prune small weights, and take back those that have grown.

    The multipliers 0.9 and 1.1 are those of the authors' code; the paper leaves them open.
    """

    Options = SplicingOptions
    by_value = True

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        self.scale: dict[str, tuple[float, float]] = {}  # address -> mean, std of |w|

    def masks(self, s: Any, progress: float) -> Mapping[str, Tensor]:
        o = self.options
        sensitivity = o.sensitivity * (1 + o.growth * epochs_since_start(s, o.when))
        out = {}
        for a in self.addresses:
            size = s.parameter(a).detach().abs()
            mean, std = self.scale.setdefault(a, (float(size.mean()), spread(size)))
            t = max(0.0, mean + sensitivity * std)
            out[a] = spliced(size, s.own_mask(self.id, a), o.low_mult * t, o.high_mult * t)
        tell_share(s, self.id, out)
        return out

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        super().on_surgery(s, edits)
        self.scale.clear()  # that of other tensors

    def state_dict(self) -> dict[str, Any]:
        return {"scale": {a: list(v) for a, v in self.scale.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale = {a: (float(m), float(d)) for a, (m, d) in state["scale"].items()}


def spliced(size: Tensor, kept: Tensor, low: float, high: float) -> Tensor:
    """The new mask: what is below `low` goes, what is at least `high` stays, the rest as it was.

    Args:
        size: |w|.
        kept: the mask so far, same shape.
        low, high: thresholds, low <= high.

    >>> spliced(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1, 1, 0, 0]).bool(), 1.5, 2.5)
    tensor([False,  True, False,  True])
    """
    return torch.where(size < low, False, torch.where(size >= high, True, kept))


def epochs_since_start(s: Any, when: When) -> float:
    """How long the span of `when` lasts already; 0 for a single firing; whole if strict."""
    if when.at is not None:
        return 0.0
    steps = s.calendar.steps or 1
    start = s.calendar.minibatch(when.start) / steps if when.start else 0.0
    if s.recipe.compat == "strict":
        return float(s.epoch_number - int(start))
    return float(s.epoch_number + s.batch / steps - start)
