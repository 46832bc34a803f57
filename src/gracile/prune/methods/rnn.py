"""Pruning by a threshold that grows in two slopes, made for recurrent networks.

It needs one number for all layers of a kind, is cheap enough for every few steps, and prunes slowly
at first, while the network still learns much.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator
from torch import Tensor

from gracile.core import method as core
from gracile.core.schedule import Time, TimeField
from gracile.errors import BindError
from gracile.prune.masking import Masking, MaskOptions
from gracile.prune.thresholding import tell_share
from gracile.recipe.messages import FieldError


class RnnOptions(MaskOptions):
    """Options of `prune: rnn`.

    Attributes:
        q: about where the threshold ends; the paper takes the 90th percentile of |w| of a trained
            network of this kind.
        ramp_at: when the threshold begins to grow faster, counted from the start of `when` and in
            its unit.
        ramp_slope: how many times faster.
        when: a span in one unit; `stop` counts in the slopes.
    """

    q: float = Field(gt=0)
    ramp_at: TimeField
    ramp_slope: float = Field(default=1.5, gt=0)

    @model_validator(mode="after")
    def _span(self) -> Self:
        if self.when.at is not None:
            raise FieldError(
                "must be a span, in which the threshold grows. "
                "Write {start: 0ep, stop: 10ep, every: 1ep}.",
                ("when",),
            )
        times = (self.ramp_at, self.when.start, self.when.stop, self.when.every or _EPOCH)
        if len({t.unit for t in times if t is not None}) > 1:
            raise FieldError(
                f"must be in the unit of when, got {self.ramp_at} and {self.when}. Write ramp_at, "
                "start, stop and every in ep, or all in it, or all in mb.",
                ("ramp_at",),
            )
        return self


@core.method("prune", "rnn", source="Narang et al. 2017, arXiv:1704.05119, algorithm 1 and eq. 1")
class Rnn(Masking):
    """Zero the weights that are not above a threshold that grows from firing to firing.

    What is pruned counts as 0 from then on, so it stays pruned (Distiller's BaiduRNNPruner).
    """

    Options = RnnOptions
    by_value = True

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        if self._ramp > self._length(s):
            raise BindError(
                f"'{self.id}': ramp_at must lie within when, which lasts {self._length(s):g}"
                f"{self.options.ramp_at.unit}, got {self.options.ramp_at}."
            )

    def masks(self, s: Any, progress: float) -> Mapping[str, Tensor]:
        o, every = self.options, float((self.options.when.every or _EPOCH).value)
        t = threshold(
            s.fired[self.id] * every,
            q=o.q,
            ramp=self._ramp,
            length=self._length(s),
            every=every,
            slope=o.ramp_slope,
        )
        out = {a: s.overlays.effective(a, upto="mask").detach().abs() > t for a in self.addresses}
        s.track(f"threshold/{self.id}", t)
        tell_share(s, self.id, out)
        return out

    @property
    def _ramp(self) -> float:
        return float(self.options.ramp_at.value)

    def _length(self, s: Any) -> float:
        when, unit = self.options.when, self.options.ramp_at.unit
        start = when.start.value if when.start else 0
        if when.stop is not None:
            return float(when.stop.value - start)
        per_epoch = {"ep": 1, "it": s.calendar.updates, "mb": s.calendar.steps or 1}[unit]
        return float(s.calendar.epochs * per_epoch - start)


def threshold(
    at: float, *, q: float, ramp: float, length: float, every: float, slope: float
) -> float:
    """The threshold so long after the start; all times in one unit.

    With theta = 2 q every / (2 ramp + 3 (length - ramp)) it is theta (at + 1) / every before the
    ramp, from there on (theta (ramp + 1) + slope theta (at - ramp + 1)) / every.

    Args:
        at: time since the start.
        q: what the threshold would reach at the end with slope 1.5, but for the +1.
        ramp: time from the start until it grows faster.
        length: from the start to the end.
        every: time between two firings.
        slope: how many times faster it grows then.

    >>> threshold(0, q=1.3, ramp=2, length=5, every=1, slope=2)
    0.2
    """
    theta = 2 * q * every / (2 * ramp + 3 * (length - ramp))
    if at < ramp:
        return theta * (at + 1) / every
    return theta * (ramp + 1 + slope * (at - ramp + 1)) / every


_EPOCH = Time.parse("1ep")
