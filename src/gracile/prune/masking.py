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
    """Base of the methods that mask weights; a subclass says what is kept in `masks`."""

    Options: ClassVar[type[core.Options]] = MaskOptions

    def on_attach(self, s: Any) -> None:
        self.addresses: list[str] = s.tensors(self.options.weights)
        self.in_span = True
        s.train_masked(self.id, self.options.masked != "frozen")

    def masks(self, s: Any, progress: float) -> Mapping[str, Tensor]:
        """Address -> what is kept (bool, of the tensor's shape) from this firing on."""
        raise TypeError(f"{type(self).__name__} does not say what it masks")

    def on_fire(self, s: Any, progress: float) -> None:
        for address, keep in self.masks(s, progress).items():
            s.set_mask(self.id, address, keep)

    def on_epoch_start(self, s: Any) -> None:
        self._leave_span(s)

    def on_batch_start(self, s: Any) -> None:
        self._leave_span(s)
        if self.options.masked == "reset" and self.in_span:
            with torch.no_grad():
                for address in s.masked_by(self.id):
                    s.parameter(address).mul_(s.own_mask(self.id, address))

    def on_batch_end(self, s: Any) -> None:
        if self.options.lifetime == "batch":
            s.drop_masks(self.id)

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        self.addresses = [a for a in self.addresses if a in s.parameter_names]

    def on_detach(self, s: Any) -> Iterable[Mask]:
        if self.options.lifetime != "run":
            s.drop_masks(self.id)
        edits: list[Mask] = s.mask_edits(self.id)
        return edits

    def _leave_span(self, s: Any) -> None:
        if not (self.in_span and s.over(self)):
            return
        self.in_span = False
        s.train_masked(self.id, False)
        if self.options.lifetime != "run":
            s.drop_masks(self.id)
