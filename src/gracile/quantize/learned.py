"""Quantizers whose ranges are trained parameters: their optimizer, their state, their end.

What LSQ, PACT and NNCF's ranges have in common; a method says which range each grid has.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gracile.core import method as core
from gracile.core.plan import Bits
from gracile.core.schedule import TimeField
from gracile.distribute.collective import average_gradients
from gracile.errors import BindError, GracileError
from gracile.nn.rounding import fake_quantize
from gracile.quantize.affine import range_of
from gracile.quantize.grid import WeightGrid
from gracile.quantize.learned_ranges import LearnedRange
from gracile.quantize.observers.base import Observer
from gracile.quantize.placement import ActivationSpec, WeightSpec
from gracile.quantize.ranges import Range
from gracile.quantize.training import Begins, TrainedQuantizer, TrainingOptions
from gracile.recipe.fields import KernelRef, kernel

MOMENTUM = 0.9


class LearningOptions(Begins):
    """Options of what is learned beside the weights, added to `Begins`.

    Attributes:
        range_lr: learning rate of what is learned; default that of the training at each moment.
        range_optimizer: sgd (momentum 0.9) or adam.
        freeze: from when ranges stand still; default the end of training.
    """

    range_lr: float | None = Field(default=None, gt=0)
    range_optimizer: Literal["sgd", "adam"] = "sgd"
    freeze: TimeField | None = None


class LearnedOptions(LearningOptions, TrainingOptions):
    """Options of the methods that learn ranges, added to `LearningOptions` and `TrainingOptions`.

    Attributes:
        observer: first range of an activation, over the calibration batches.
    """

    observer: KernelRef("observer") = Field(  # type: ignore[valid-type]
        default_factory=lambda: kernel("observer", "percentile")
    )


class LearnedGrid(WeightGrid):
    """The overlay of a weight whose range is learned."""

    def __init__(self, spec: WeightSpec, learned: LearnedRange):
        super().__init__(spec, _none)
        self.learned = learned

    def __call__(self, weight: Tensor) -> Tensor:
        return super().__call__(weight) if self.scale is not None else self.learned(weight)

    def fix(self, weight: Tensor) -> None:
        """Keep the scale and zero point learned so far."""
        self.scale, self.zero_point = self.learned.fixed()

    def keep(self, index: Tensor) -> None:
        super().keep(index)
        self.learned.cut(index)


class LearnedQuantizer(TrainedQuantizer):
    """Base of the methods that learn ranges; a subclass gives each grid its range, or none.

    The ranges have an optimizer of their own, which steps when the training's does: they want no
    weight decay, and the user's optimizer may be made before the Session and restored from a file
    without knowing of them. By default it follows the learning rate of the training.

    Attributes:
        learned: key of the Bits edit -> its range; of activations that share one, the leader's.
        frozen: the ranges stand still.
    """

    freezes = ("freeze", *TrainedQuantizer.freezes)

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        self.learned: dict[str, LearnedRange] = {}
        self.frozen = False
        self.optimizer: torch.optim.Optimizer | None = None

    # --- what a method decides

    def weight_range(self, spec: WeightSpec) -> LearnedRange | None:
        """The range that is learned of a weight; None if it follows from the weight."""
        return None

    def activation_range(self, spec: ActivationSpec) -> LearnedRange | None:
        """The range that is learned of an activation; None if it stays as it was calibrated."""
        return None

    def decay(self, s: Any, learned: LearnedRange) -> float:
        """Weight decay of one range."""
        return 0.0

    def first_weight(self, weight: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
        """Scale and zero point a weight starts from: as observed."""
        return super()._grid(spec).params(weight)

    def rounded(self, weight: Tensor, spec: WeightSpec) -> Tensor:
        grid = self._grid(spec)
        if isinstance(grid, LearnedGrid):
            grid.learned.start(*self.first_weight(weight, spec))
        return grid(weight)

    # --- hooks

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        freeze = self.options.freeze
        if freeze is not None and s.calendar.minibatch(freeze) <= s.calendar.minibatch(
            self.options.start
        ):
            raise BindError(
                f"'{self.id}': freeze: {freeze} must be after the start ({self.options.start}), or "
                "nothing is learned."
            )
        core.refuse_loss_scaling(self, s, "what it learns, which has an optimizer of its own")
        if s.optimizer is None and self.options.range_lr is None:
            raise BindError(
                f"'{self.id}' follows the learning rate of the training, and the Session was given "
                "no optimizer. Set range_lr, or pass one: Session(model, recipe, optimizer)."
            )

    def on_fire(self, s: Any, progress: float) -> None:
        super().on_fire(s, progress)
        self.settle()
        self._make_optimizer(s)

    def on_batch_start(self, s: Any) -> None:
        time = self.options.freeze
        if self._learning and time is not None and s.now >= s.calendar.minibatch(time):
            self._freeze(s)
        super().on_batch_start(s)

    def on_before_step(self, s: Any) -> None:
        if not self._learning or self.optimizer is None:
            return
        ranges = list(self.learned.values())
        average_gradients(nn.ParameterList(p for r in ranges for p in r.values.values()))
        before = [{k: v.detach().clone() for k, v in r.values.items()} for r in ranges]
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(s)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for r, old in zip(ranges, before, strict=True):
            r.limit(old)
        self._show()

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        if self.optimizer is None:
            super().on_surgery(s, edits)
            return
        states = {
            (key, name): dict(self.optimizer.state[p])
            for key, r in self.learned.items()
            for name, p in r.values.items()
        }
        edits = list(edits)
        for key, index in self._kept(edits):
            for (other, _), state in states.items():
                if key == other:
                    state.update(_taken(state, index))
        super().on_surgery(s, edits)
        self._cut_learned(edits)
        for spec in self._weights():
            if spec.address not in self.grids:
                self.learned.pop(f"{spec.address}.weight", None)
        self._make_optimizer(s)
        if self.optimizer is not None:
            for key, r in self.learned.items():
                for name, p in r.values.items():
                    self.optimizer.state[p] = states[key, name]

    def on_detach(self, s: Any) -> Iterable[Bits]:
        if self.laid:
            self._freeze(s)
        return super().on_detach(s)

    # --- order

    def lay(self, s: Any, placement: Any = None) -> None:
        super().lay(s, placement)
        for spec in self._weights():
            grid = self.grids[spec.address]
            if isinstance(grid, LearnedGrid):
                with torch.no_grad():
                    weight = s.overlays.effective(spec.address, upto="share").detach()
                    grid.learned.start(*self.first_weight(weight, spec))
                self.learned[f"{spec.address}.weight"] = grid.learned

    def refresh(self) -> None:
        """Start the ranges of activations from what was observed."""
        super().refresh()
        self._start_activations()
        self._show()

    # --- state

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "frozen": self.frozen,
            "learned": {
                key: {k: v.detach().clone() for k, v in r.values.items()}
                for key, r in self.learned.items()
            },
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if not self._begun:
            return
        self._start_activations()
        with torch.no_grad():
            for key, values in state["learned"].items():
                for name, value in values.items():
                    self.learned[key].values[name].copy_(value)
        self._make_optimizer(self.session)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        if state["frozen"]:
            self._freeze(self.session)

    def ranges(self) -> dict[str, Range]:
        """What every activation's grid spans now: observed ranges were only the start."""
        out = {}
        for id, seen in super().ranges().items():
            q = self.quantizers[id]
            low, high = range_of(q.scale, q.zero_point, q.bits, q.signed, q.narrow)
            out[id] = Range(float(low), float(high), seen.observer)
        return out

    # --- inside

    @property
    def _learning(self) -> bool:
        return self._begun and not self.frozen

    @property
    def _begun(self) -> bool:
        return self.laid

    def _kept(self, edits: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
        """(key of a range, the indices of it that a cut leaves)."""
        for edit in edits:
            for part in getattr(edit, "group", ()):
                grid = self.grids.get(part.at)
                if grid is not None and part.dim == grid.spec.axis:
                    yield f"{part.at}.weight", torch.tensor(part.keep)

    def _cut_learned(self, edits: Iterable[Any]) -> None:
        """Let what is learned follow a cut, where no weight's grid does it."""

    def _grid(self, spec: WeightSpec) -> WeightGrid:
        learned = self.weight_range(spec)
        if learned is None:
            return super()._grid(spec)
        return LearnedGrid(spec, learned)

    def _weights(self) -> tuple[WeightSpec, ...]:
        return () if self.placement is None else self.placement.weights

    def _start_activations(self) -> None:
        for leader, members in self.sharing().items():
            learned = self.activation_range(members[0])
            if learned is None:
                continue
            first = self.quantizers[members[0].id]
            learned.start(first.scale, first.zero_point)
            self.learned[f"{leader}.{members[0].role}"] = learned
            for a in members:
                self.quantizers[a.id].rule = learned

    def _show(self) -> None:
        """Let the quantizers in the model hold the grids as they are now."""
        for members in self.sharing().values():
            for a in members:
                q = self.quantizers[a.id]
                if isinstance(q.rule, LearnedRange):
                    scale, zero_point = q.rule.fixed()
                    q.scale.copy_(scale)
                    q.zero_point.copy_(zero_point)

    def _freeze(self, s: Any) -> None:
        self._show()
        self.fix_weights(s)
        for q in self.quantizers.values():
            if q.__dict__.get("by") == self.id:
                q.rule = fake_quantize
        self.frozen = True

    def _make_optimizer(self, s: Any) -> None:
        groups: dict[float, list[nn.Parameter]] = {}
        for r in self.learned.values():
            groups.setdefault(self.decay(s, r), []).extend(r.values.values())
        each: Any = [{"params": p, "weight_decay": decay} for decay, p in groups.items()]
        if not each:
            self.optimizer = None
        elif self.options.range_optimizer == "adam":
            self.optimizer = torch.optim.Adam(each, lr=self._lr(s))
        else:
            self.optimizer = torch.optim.SGD(each, lr=self._lr(s), momentum=MOMENTUM)

    def _lr(self, s: Any) -> float:
        if self.options.range_lr is not None:
            return float(self.options.range_lr)
        return float(s.optimizer.param_groups[0]["lr"])


def _none() -> Observer:
    raise GracileError("a learned range is observed by nobody once it has begun.")


def _taken(state: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """An optimizer's state of a parameter, for some of its channels."""
    return {
        k: v[index.to(v.device)] if isinstance(v, Tensor) and v.ndim else v
        for k, v in state.items()
    }
