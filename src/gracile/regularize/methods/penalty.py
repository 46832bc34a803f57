"""Penalties on weights, with the choice to zero what they made small, mini-batch by mini-batch.

The penalty (which function), the granularity (which weights go as one) and the threshold are
independent choices. Distiller's regularizers; group lasso over filters and channels is SSL.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from gracile.core import method as core
from gracile.core.groups import MEASURES, group_max
from gracile.core.plan import Mask
from gracile.errors import BindError
from gracile.graph.dependency import mask_units
from gracile.recipe.fields import KernelRef, Selector, kernel
from gracile.regularize.regularizer import Regularizer, RegularizerOptions

Units = npt.NDArray[np.bool_]  # (units of a group,)
COUPLED = ("filter", "channel")  # granularities whose zero groups can be whole channels


class PenaltyOptions(RegularizerOptions):
    """Options of `regularize: penalty`.

    Attributes:
        weights: which tensors.
        penalty: the function: l1, l2, lp, group_lasso, group_variance.
        granularity: which weights form a group, for the penalty and the threshold.
        threshold: after each mini-batch of the span, groups that are not above it become zero: a
            number; strength: that of the moment, as in Distiller; or none. Under compat: strict it
            also takes the masks of all methods off these tensors.
        threshold_on: what of a group is compared: mean_abs, max, l1 (sum of |w|), l2 (norm).
        keep_mask: at the end of the span, what a threshold has zeroed is masked for good.
    """

    weights: Selector
    penalty: KernelRef("penalty")  # type: ignore[valid-type]
    granularity: KernelRef("granularity") = Field(  # type: ignore[valid-type]
        default_factory=lambda: kernel("granularity", "filter")
    )
    threshold: Literal["none", "strength"] | Annotated[float, Field(gt=0)] = "none"
    threshold_on: Literal["mean_abs", "max", "l1", "l2"] = "mean_abs"
    keep_mask: bool = True


@core.method(
    "regularize",
    "penalty",
    source="Han et al. 2015, arXiv:1506.02626; SSL: Wen et al. 2016, 1608.03665; Distiller",
)
class Penalty(Regularizer):
    """Add a penalty on weights to the loss; zero the groups it makes small."""

    Options = PenaltyOptions

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        self.kept = False  # the masks at the end of the span are laid
        self.by_value = self.options.threshold != "none"
        self.addresses: list[str] = s.tensors(self.options.weights)
        self._bind(s)

    def penalty(self, s: Any) -> Tensor:
        fn = self.options.penalty.fn
        terms = [fn(self._weight(s, a), self.groups[a]) for a in self.addresses]
        return torch.stack(terms).sum() if terms else torch.zeros((), device=s.device)

    def on_batch_end(self, s: Any) -> None:
        if self.options.threshold == "none" or not s.active(self):
            return
        if s.recipe.compat == "strict":  # the threshold takes the place of every other mask
            for a in self.addresses:
                s.unmask(a)
        self._zero_small(s)
        if self.options.keep_mask and self.ends(s):
            self._mask_zeros(s)

    def on_epoch_end(self, s: Any) -> None:
        if self.options.threshold != "none" and self.addresses:
            zero = torch.cat([self._zero_groups(s, a).cpu() for a in self.addresses])
            s.track(f"zero-groups/{self.id}", float(zero.float().mean()))

    def on_detach(self, s: Any) -> Iterable[Mask]:
        if self.options.threshold != "none" and self.options.keep_mask and not self.kept:
            self._mask_zeros(s)  # training ended inside the span
        edits: list[Mask] = s.mask_edits(self.id)
        return edits

    def masked(self, s: Any) -> Iterable[str]:
        return self.addresses if self.options.threshold != "none" and self.options.keep_mask else ()

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        self.addresses = [a for a in self.addresses if a in s.parameter_names]
        self._bind(s)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.kept = bool(state["kept"])

    def _bind(self, s: Any) -> None:
        """Number the groups of each tensor, and try the penalty once."""
        self.groups: dict[str, Tensor] = {}
        for a in self.addresses:
            weight = s.parameter(a).detach()  # overlays may not have followed a cut yet
            doing = f"granularity {self.options.granularity.name}"
            try:
                ids = self.options.granularity.fn(tuple(weight.shape))
                # a broadcast view stays where it is small
                self.groups[a] = ids if 0 in ids.stride() else ids.to(weight.device)
                doing = f"penalty {self.options.penalty.name}"
                self.options.penalty.fn(weight, self.groups[a])
            except (ValueError, IndexError) as e:
                raise BindError(
                    f"'{self.id}': {doing} does not fit '{a}' of shape {tuple(weight.shape)}: {e}"
                ) from None

    def _weight(self, s: Any, address: str) -> Tensor:
        return s.overlays.effective(address, upto="mask")  # type: ignore[no-any-return]

    # --- thresholding

    @torch.no_grad()
    def _zero_small(self, s: Any) -> None:
        """Zero the stored weights of small groups; what another mask hides as a whole stays.

        The optimizer's state stays as well: stale momentum that lifts a group is met by the next
        threshold and dies out geometrically, and no optimizer's names need be known here.
        """
        o = self.options
        limit = self.strength if o.threshold == "strength" else o.threshold
        for a in self.addresses:
            size = MEASURES[o.threshold_on](self._weight(s, a), self.groups[a])
            small = (size > 0) & (size <= limit)
            if small.any():
                s.parameter(a).masked_fill_(small[self.groups[a].to(small.device)], 0.0)

    @torch.no_grad()
    def _zero_groups(self, s: Any, address: str) -> Tensor:
        return group_max(s.parameter(address).abs(), self.groups[address]) == 0

    def _mask_zeros(self, s: Any) -> None:
        self.kept = True
        masks: dict[str, Tensor] = {}
        for a in self.addresses:
            zero = self._zero_groups(s, a).cpu()
            if zero.any():
                masks[a] = ~zero[self.groups[a].cpu()]
            if zero.all():
                s.warn("layer-is-zero", f"'{self.id}': nothing is left of '{a}'.")
        if self.options.granularity.name in COUPLED:
            self._mask_channels(s, masks)
        for a, mask in masks.items():
            s.set_mask(self.id, a, mask)

    def _mask_channels(self, s: Any, masks: dict[str, Tensor]) -> None:
        """Where all filters (or readers) of a channel are zero, mask all that `prune: thin` cuts.

        That takes the biases and BatchNorm shifts of zero filters along, as pruning them does.
        """
        name = self.options.granularity.name
        shapes = {a: tuple(s.parameter(a).shape) for a in s.parameter_names}
        others = f"other layers still {'make' if name == 'filter' else 'read'} these channels"
        for group in s.groups:
            alive = {axis: self._alive_units(s, group, axis) for axis in _sides(group, name)}
            zero = {a: there & ~alive[a, d][1] for (a, d), (there, _) in alive.items()}
            if not any(z.any() for a, z in zero.items() if a in self.groups):
                continue
            whole = np.any([*zero.values()], axis=0) & ~np.any(
                [v for _, v in alive.values()], axis=0
            )
            gone = [] if group.protected else group.removable(np.flatnonzero(whole).tolist())
            mask_units(masks, group, gone, shapes)
            for a, z in zero.items():
                z[gone] = False
                if a in self.groups and z.any():
                    kept = "a layer keeps one channel" if (z & whole).any() else others
                    why = group.protected or kept
                    text = f"{z.sum()} zero {name}s cannot be cut: {why}"
                    s.note(a, "structure", "kept", "protected", text, self.id)

    @torch.no_grad()
    def _alive_units(self, s: Any, group: Any, axis: tuple[str, int]) -> tuple[Units, Units]:
        """Which units of a group are in one weight at all, and which are not zero there."""
        weight = s.parameter(axis[0]).movedim(axis[1], 0).flatten(1)
        unit, nonzero = np.asarray(group.layout[axis]), (weight != 0).any(1).cpu().numpy()
        there, alive = np.zeros((2, len(group.units)), dtype=bool)
        there[unit[unit >= 0]] = True
        alive[unit[(unit >= 0) & nonzero]] = True
        return there, alive


def _sides(group: Any, granularity: str) -> list[tuple[str, int]]:
    """The axes whose slices make (filter) or read (channel) the units."""
    if granularity == "filter":
        return [axis for axis in group.writes.items() if axis in group.layout]
    return [(a, d) for a, d in group.layout if a in group.consumers and group.writes.get(a) != d]
