"""What methods share that learn beside the weights what to mask: values, their optimizer, the end.

A value belongs to a group of a weight's entries and has a gradient from the task. While it is
learned, an overlay shows the weight through it; once it stands still, what it closes is a mask.
"""

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from gracile.core import method as core
from gracile.core.plan import Mask
from gracile.core.schedule import END, TimeField, When
from gracile.distribute.collective import average_gradients
from gracile.errors import BindError
from gracile.recipe.fields import Selector

LAYER = "gate"  # the overlay layer of weights


class Learned:
    """A value for each group of one weight's entries; called with the weight, it is its overlay.

    Args:
        groups: group of each entry, 0..G-1, of the weight's shape.
        start: first value of all groups.
        device: of the weight.

    Attributes:
        shape: of the weight.
        values: (G,), learned.
        sizes: (G,) entries of each group.
    """

    def __init__(self, groups: Tensor, start: float, device: torch.device):
        self.shape = tuple(groups.shape)
        self._set_groups(groups.to(device))
        self.values = nn.Parameter(torch.full((len(self.sizes),), start, device=device))

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight as the forward is to see it."""
        raise TypeError(f"{type(self).__name__} does not say what a weight looks like")

    def open(self) -> Tensor:
        """(G,) bool: the groups that are kept."""
        raise TypeError(f"{type(self).__name__} does not say what it keeps")

    def rest(self) -> None:
        """End a mini-batch: no gradient until the next."""

    def mask(self) -> Tensor:
        """What is kept (bool, of the weight's shape)."""
        return self.spread(self.open())

    def kept(self) -> int:
        """Number of weights that are kept."""
        return int((self.sizes * self.open()).sum())

    def spread(self, values: Tensor) -> Tensor:
        """(G,) -> the weight's shape."""
        if self._groups is None:
            return values.reshape(self.shape)
        return values.index_select(0, self._groups.flatten()).reshape(self.shape)

    def cut(self, dim: int, index: Tensor) -> Tensor:
        """Follow a cut of the weight; returns the numbers of the groups that are left."""
        before = self._groups
        if before is None:
            before = torch.arange(len(self.values), device=self.values.device).reshape(self.shape)
        left: Tensor
        left, groups = before.index_select(dim, index).unique(return_inverse=True)
        self.shape = tuple(groups.shape)
        self._set_groups(groups)
        self.values = nn.Parameter(self.values.detach()[left])
        self.rest()
        return left

    def _set_groups(self, groups: Tensor) -> None:
        flat = groups.flatten()
        each = torch.arange(flat.numel(), device=flat.device)
        self._groups = None if torch.equal(flat, each) else groups  # None: a value for each weight
        self.sizes = torch.ones_like(each[:1]).expand(len(each))
        if self._groups is not None:
            self.sizes = torch.bincount(flat)


class LearnedOptions(core.Options):
    """Options of every method that learns its masks.

    Attributes:
        weights: which tensors.
        when: the firings, each of which sets the level.
        freeze: from when the values stand still: what is closed is a mask from then on. Default:
            the end of training.
    """

    weights: Selector
    when: When
    freeze: TimeField | None = None

    @model_validator(mode="after")
    def _in_training(self) -> Self:
        if self.when.at == END:
            raise ValueError("masks are learned, 'at: end' is too late; write when: {start: 0ep}")
        return self


class LearnedMasks(core.Method):
    """Base of the methods that learn masks; a subclass calls `_begin` when it is attached.

    The values have an optimizer of their own, which steps when the training's does: they want no
    weight decay, another learning rate and no schedule, and the user's optimizer may be made before
    the Session and restored from a file without knowing of them.

    Attributes:
        learned: address -> its values.
        frozen: the values stand still.
    """

    Options: ClassVar[type[core.Options]] = LearnedOptions
    needs = frozenset({"train"})
    learned: dict[str, Any]

    def _begin(
        self, s: Any, learned: dict[str, Any], kind: Literal["adam", "sgd"], lr: float
    ) -> None:
        """Take the values of all tensors over.

        Args:
            s: the Session.
            learned: address -> its `Learned`.
            kind: of the optimizer, without weight decay.
            lr: its learning rate, constant.

        Raises:
            BindError: autocast: fp16, or a `freeze` at which nothing could be frozen.
        """
        core.refuse_loss_scaling(self, s, "what it learns, which has an optimizer of its own")
        self.session = s
        self.learned = learned
        self.frozen = False
        self.freeze_at = self._freeze_at(s)
        self._rate = (torch.optim.Adam if kind == "adam" else torch.optim.SGD, lr)
        self._make_optimizer()

    def claims(self, s: Any) -> Iterable[tuple[str, str]]:
        return [("gates", a) for a in self.learned]

    def masked(self, s: Any) -> Iterable[str]:
        return self.learned

    def on_batch_start(self, s: Any) -> None:
        if self._training and s.now >= self.freeze_at:
            self._fix(s)

    def on_before_step(self, s: Any) -> None:
        if not self._training:
            return
        average_gradients(nn.ParameterList(x.values for x in self.learned.values()))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def on_batch_end(self, s: Any) -> None:
        for x in self.learned.values():
            x.rest()

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        states = {a: dict(self.optimizer.state[x.values]) for a, x in self.learned.items()}
        for edit in edits:
            for part in getattr(edit, "group", ()):
                x = self.learned.get(part.at)
                if x is None:
                    continue
                of = x.values.shape
                left = x.cut(part.dim, torch.tensor(part.keep, device=x.values.device))
                states[part.at] = {
                    k: v[left] if isinstance(v, Tensor) and v.shape == of else v
                    for k, v in states[part.at].items()
                }
        self.learned = {a: x for a, x in self.learned.items() if a in s.parameter_names}
        self._make_optimizer()
        for a, x in self.learned.items():
            self.optimizer.state[x.values] = states[a]

    def on_detach(self, s: Any) -> Iterable[Mask]:
        if not self.frozen:
            self._fix(s)
        self._report(s)
        edits: list[Mask] = s.mask_edits(self.id)
        return edits

    def state_dict(self) -> dict[str, Any]:
        return {
            "frozen": self.frozen,
            "values": {a: x.values.detach().clone() for a, x in self.learned.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.frozen = bool(state["frozen"])
        with torch.no_grad():
            for address, values in state["values"].items():
                self.learned[address].values.copy_(values)
        self.optimizer.load_state_dict(state["optimizer"])
        if self._training:
            self._lay(self.session)
        elif self.frozen:
            self._take_off(self.session)

    # --- inside

    @property
    def _training(self) -> bool:
        return not self.frozen and bool(self.learned)

    def _final_masks(self, s: Any) -> dict[str, Tensor]:
        """Address -> what is kept from the freeze on."""
        return {a: x.mask() for a, x in self.learned.items()}

    def _report(self, s: Any) -> None:
        """Say in the ledger what became of each tensor, and warn where that is not what was meant.

        Called once, when all masks are final.
        """

    def _make_optimizer(self) -> None:
        cls, lr = self._rate
        self.optimizer = cls([{"params": [x.values for x in self.learned.values()]}], lr=lr)

    def _freeze_at(self, s: Any) -> int:
        """The mini-batch (epoch, if their number is unknown) from which values stand still."""
        time, calendar = self.options.freeze, s.calendar
        if time is None:
            return int(calendar.total)
        at = int(calendar.minibatch(time))
        epoch, batch = s.timetables[self.id].instants[-1]
        if not epoch * (calendar.steps or 1) + batch < at < calendar.total:
            raise BindError(
                f"'{self.id}': freeze: {time} must lie between the last firing (epoch {epoch}, "
                f"mini-batch {batch}) and the end of training ({calendar.epochs} epochs). Give "
                "'when' a stop before it."
            )
        return at

    def _lay(self, s: Any) -> None:
        for address, x in self.learned.items():
            s.overlays.set(address, LAYER, x)

    def _take_off(self, s: Any) -> None:
        for address in self.learned:
            s.overlays.remove(address, LAYER)

    def _fix(self, s: Any) -> None:
        """Put masks in the place of what is learned."""
        self._take_off(s)
        for address, keep in self._final_masks(s).items():
            s.set_mask(self.id, address, keep)
        self.frozen = True

    def _weights(self) -> int:
        return max(1, sum(int(math.prod(x.shape)) for x in self.learned.values()))

    def _closed(self) -> float:
        """Share of the weights that are not kept now."""
        return 1 - sum(int(x.kept()) for x in self.learned.values()) / self._weights()
