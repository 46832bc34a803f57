"""Network slimming and MorphNet: L1 on the scales of BatchNorm, so that channels turn off.

A channel is one number here, its BatchNorm's gamma. A penalty on it needs no norms of weights, and
weighted by what the channel costs it saves that resource instead of channels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from gracile.analyze.widths import CostModel, Widths
from gracile.core import method as core
from gracile.errors import BindError
from gracile.graph.dependency import ChannelGroup
from gracile.recipe.fields import Selector
from gracile.regularize.regularizer import Regularizer, RegularizerOptions
from gracile.regularize.resource import Cost, marginal_costs


class SlimmingOptions(RegularizerOptions):
    """Options of `regularize: slimming`.

    Attributes:
        norms: which BatchNorm scales; default all whose channels can be cut.
        resource: weigh each channel by what it costs now: none, params or macs.
        alive: a channel counts as alive while |gamma| is above this.
    """

    norms: Selector | None = None
    resource: Literal["none", "params", "macs"] = "none"
    alive: float = Field(default=1e-3, ge=0)


@dataclass(frozen=True)
class Scales:
    """The scales of one group of channels.

    Attributes:
        group: the channels.
        at: address of a BatchNorm's weight -> indices in it.
        units: the unit of each of these indices, one address after the other.
        scaled: (units,) whether a unit has a scale at all; one without is always alive.
    """

    group: ChannelGroup
    at: dict[str, Tensor]
    units: Tensor
    scaled: Tensor


@core.method(
    "regularize",
    "slimming",
    source="Liu et al. 2017, arXiv:1708.06519; with costs: Gordon et al. 2018, arXiv:1711.06798",
)
class Slimming(Regularizer):
    """Pull the BatchNorm scales of channels that can be cut towards zero.

    Args:
        predict: widths of the network -> what it costs, for example predicted milliseconds; taken
            instead of `resource`.
    """

    Options = SlimmingOptions

    def __init__(self, id: str, options: Any, predict: Callable[[Widths], float] | None = None):
        super().__init__(id, options)
        self.predict = predict

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        self.addresses = self._norms(s)
        self._bind(s, note=True)
        if not self.scales:
            whys = dict.fromkeys(g.protected for g in s.groups if g.protected)
            raise BindError(
                f"'{self.id}': no channel of the {len(self.addresses)} selected BatchNorms can be "
                f"cut: {'; '.join([*whys][:3]) or 'their channels cannot be followed'}."
            )
        self.unit_cost = 1.0
        if self.cost is not None:
            costs = self._costs([torch.ones_like(x.scaled) for x in self.scales])
            scaled = torch.cat([x.scaled for x in self.scales])
            self.unit_cost = float(torch.cat(costs)[scaled].mean())
            if self.unit_cost <= 0:
                raise BindError(f"'{self.id}': by the given costs no channel costs anything.")

    def penalty(self, s: Any) -> Tensor:
        """Sum of |gamma|; with costs, of a channel's largest |gamma| times its relative cost."""
        gammas = [self._gammas(s, x) for x in self.scales]
        if self.cost is None or not gammas:
            return torch.cat([torch.zeros(1, device=s.device), *gammas]).sum()
        largest = [_largest(x, v) for x, v in zip(self.scales, gammas, strict=True)]
        weights = self._weights([v.detach() for v in largest])
        return torch.stack([w.to(v) @ v for w, v in zip(weights, largest, strict=True)]).sum()

    def on_epoch_end(self, s: Any) -> None:
        gammas = [self._gammas(s, x).detach() for x in self.scales]
        if gammas:
            s.track(
                f"alive/{self.id}", float((torch.cat(gammas) > self.options.alive).float().mean())
            )

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        self.addresses = [a for a in self.addresses if a in s.parameter_names]
        self._bind(s)

    def _norms(self, s: Any) -> list[str]:
        found = [
            f"{path}.weight".lstrip(".")
            for path, m in s.model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None
        ]
        found = [a for a in found if a in s.parameter_names]  # a tied scale has one name
        if not found:
            raise BindError(
                f"'{self.id}': {s.name} has no BatchNorm with a scale; on weights there is "
                "{regularize: penalty, penalty: group_lasso}."
            )
        if self.options.norms is None:
            return found
        chosen: list[str] = s.tensors(self.options.norms)
        for a in chosen:
            if a not in found:
                raise BindError(
                    f"'{self.id}': norms must select scales of BatchNorms, and '{a}' is none. "
                    "Narrow the selector, for example to 'type:BatchNorm2d'."
                )
        return chosen

    def _bind(self, s: Any, note: bool = False) -> None:
        """Find the channel of each scale. A scale counts once, for the first group that has it."""
        self.cost = self._cost(s)
        self.scales: list[Scales] = []
        self._known: tuple[Tensor, list[Tensor]] | None = None
        free = {a: np.ones(len(s.parameter(a)), dtype=bool) for a in self.addresses}
        why = dict.fromkeys(free, "its channels cannot be followed")
        for g in s.groups:
            at, units = {}, []
            for a, mine in free.items():
                layout = g.layout.get((a, 0))
                if layout is None:
                    continue
                index = np.flatnonzero((np.asarray(layout) >= 0) & mine)
                if g.protected is not None:
                    why[a] = g.protected
                elif len(index):
                    at[a] = torch.from_numpy(index).to(s.device)
                    units.append(np.asarray(layout)[index])
                    mine[index] = False
            if at:
                unit = torch.from_numpy(np.concatenate(units)).to(s.device)
                scaled = torch.zeros(len(g.units), dtype=torch.bool, device=s.device)
                scaled[unit] = True
                self.scales.append(Scales(g, at, unit, scaled))
        for a, left in free.items():
            if note and left.any():
                text = f"{left.sum()} of {len(left)} scales are not pulled: {why[a]}"
                s.note(a, "structure", "kept", "protected", text, self.id)

    def _gammas(self, s: Any, scales: Scales) -> Tensor:
        """|gamma| of all scales of a group, in the order of `scales.units`."""
        parts = [s.overlays.effective(a, upto="mask")[i] for a, i in scales.at.items()]
        return torch.cat(parts).abs()

    # --- costs

    def _cost(self, s: Any) -> Cost | None:
        if self.predict is not None or self.options.resource == "none":
            return self.predict
        model, measure = CostModel.of(s.model, s.graph, s.groups), self.options.resource
        return lambda kept: model.total(measure, kept)

    def _weights(self, largest: list[Tensor]) -> list[Tensor]:
        """What each channel costs, in units of the mean at the start; kept while none dies."""
        alive = [
            (v > self.options.alive) | ~x.scaled for x, v in zip(self.scales, largest, strict=True)
        ]
        now = torch.cat(alive)
        if self._known is None or not torch.equal(self._known[0], now):
            self._known = now, [c / self.unit_cost for c in self._costs(alive)]
        return self._known[1]

    def _costs(self, alive: list[Tensor]) -> list[Tensor]:
        states = {x.group.id: a.cpu().numpy() for x, a in zip(self.scales, alive, strict=True)}
        assert self.cost is not None
        found = marginal_costs([x.group for x in self.scales], states, self.cost)
        return [torch.from_numpy(found[x.group.id]) for x in self.scales]


def _largest(scales: Scales, gammas: Tensor) -> Tensor:
    """(units,) the largest |gamma| of each channel; one without a scale has 0."""
    out = gammas.new_zeros(len(scales.scaled))
    return out.scatter_reduce(0, scales.units, gammas, "amax")
