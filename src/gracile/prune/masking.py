"""What all methods that mask weights have in common.

A method says which weights are kept at a firing; this says what happens to those under a mask and
how long a mask lasts. The choices are those of the classic compression schedulers, told by their
effect (mask_on_forward_only, use_double_copies, mask_gradients, discard_masks_at_minibatch_end,
keep_mask).
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gracile.core import method as core
from gracile.core.plan import Mask
from gracile.core.schedule import When
from gracile.prune.flags import Flags, Policy
from gracile.recipe.fields import Selector


class MaskOptions(core.Options):
    """Options of every method that masks weights.

    Attributes:
        weights: which tensors.
        masked: what a weight under a mask does while `when` lasts. frozen: keeps its value and gets
            no gradient; trained: gets the gradient that an unmasked one would get
            (straight-through), so that it can grow back; reset: the same from zero at every
            mini-batch. Once the span of `when` is over it is frozen (a single firing has no end).
        lifetime: how long a mask lasts. run: for good; span: until `when` is over; batch: for one
            mini-batch.
        when: the firings.
    """

    weights: Selector
    masked: Literal["frozen", "trained", "reset"] = "frozen"
    lifetime: Literal["run", "span", "batch"] = "run"
    when: When


class Masking(core.Method):
    """Base of the methods that mask weights; a subclass says what is kept in `masks`.

    Attributes:
        style: how the masks live at present: frozen, trained, reset (see `MaskOptions`), lifted
            (there are none any more) or zeroed (of `compat: strict`, see `Flags`).
    """

    Options: ClassVar[type[core.Options]] = MaskOptions

    def on_attach(self, s: Any) -> None:
        self.addresses: list[str] = s.tensors(self.options.weights)
        self.style = ""
        self.flags = self._flags(s)
        self._settle(s, self.options.masked)

    def masks(self, s: Any, progress: float) -> Mapping[str, Tensor]:
        """Address -> what is kept (bool, of the tensor's shape) from this firing on."""
        raise TypeError(f"{type(self).__name__} does not say what it masks")

    def on_fire(self, s: Any, progress: float) -> None:
        for address, keep in self.masks(s, progress).items():
            s.set_mask(self.id, address, keep)

    def on_epoch_start(self, s: Any) -> None:
        self._settle(s, self._style(s))

    def on_batch_start(self, s: Any) -> None:
        self._settle(s, self._style(s))
        if self.style == "reset":
            self._zero(s, s.masked_by(self.id))

    def on_batch_end(self, s: Any) -> None:
        if self.style == "zeroed":
            self._zero(s, self._named(s))
        if self.options.lifetime == "batch":
            self._discard(s)

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        self.addresses = [a for a in self.addresses if a in s.parameter_names]

    def on_detach(self, s: Any) -> Iterable[Mask]:
        if not self._lasts(s):
            s.drop_masks(self.id)
        edits: list[Mask] = s.mask_edits(self.id)
        return edits

    def masked(self, s: Any) -> Iterable[str]:
        o = self.options
        to_the_end = o.lifetime == "span" and o.when.stop is None
        return self.addresses if self._lasts(s) or to_the_end else ()

    def _style(self, s: Any) -> str:
        """How masks live from now on."""
        if self.flags is not None:
            return self.flags.at((s.epoch_number, s.batch))
        if not s.over(self):
            return str(self.options.masked)
        return "frozen" if self.options.lifetime == "run" else "lifted"

    def _lasts(self, s: Any) -> bool:
        """Whether the masks are there when training is over."""
        if self.flags is not None:
            return self.flags.at((s.epochs, 0)) == "zeroed"
        return bool(self.options.lifetime == "run")

    def _settle(self, s: Any, style: str) -> None:
        if style == self.style:
            return
        self.style = style
        s.train_masked(self.id, style not in ("frozen", "lifted"))
        if style == "lifted":
            s.drop_masks(self.id)

    def _named(self, s: Any) -> set[str]:
        """What is masked and not only coupled: the rest is whole where a channel comes back."""
        return set(self.addresses) & set(s.masked_by(self.id))

    @torch.no_grad()
    def _zero(self, s: Any, addresses: Iterable[str]) -> None:
        for address in addresses:
            s.parameter(address).mul_(s.own_mask(self.id, address))

    def _discard(self, s: Any) -> None:
        s.drop_masks(self.id)
        if self.flags is None or s.epoch_number not in self._policy(s).epochs:
            return
        for m in self._others(s):  # strict: those of all
            if m.style == "zeroed":
                m._zero(s, m._named(s))
            s.drop_masks(m.id)

    # --- compat: strict

    def _flags(self, s: Any) -> Flags | None:
        """Those of all that mask in training; None unless strict, and for what fires after it."""
        if s.recipe.compat != "strict" or self.options.when.at_end:
            return None
        return Flags(m._policy(s) for m in self._others(s))

    def _others(self, s: Any) -> list["Masking"]:
        """All methods that mask in training, this one included."""
        return [m for m in s.methods if isinstance(m, Masking) and not m.options.when.at_end]

    def _policy(self, s: Any) -> Policy:
        o = self.options
        return Policy.of(o.when, s.timetables[self.id], s.calendar, o.masked, o.lifetime)
