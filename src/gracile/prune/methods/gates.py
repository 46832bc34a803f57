"""Gates: a learned switch on every weight, or group of them, that a loss closes to a given share.

The regularization-based (RB) sparsity of NNCF, after the L0 regularization of Louizos et al. Which
weights go is not ranked but learned: each gate has a logit s with a gradient from the task, and one
from a loss on how many weights are left.
"""

import math
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

from gracile.core import method as core
from gracile.prune.gate import Gate, density_loss
from gracile.prune.learned import LearnedMasks, LearnedOptions
from gracile.recipe.fields import KernelRef, Level, kernel
from gracile.recipe.messages import FieldError, show


class Adaptive(BaseModel):
    """`schedule: adaptive`: the level goes up once the network has followed (NNCF).

    Attributes:
        initial: level of the first firing.
        step: added to the level, up to the final one.
        patience: so many firings must find the level reached before it goes up.
        tolerance: reached means at most this far below.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["adaptive"] = "adaptive"
    initial: float = Field(default=0.0, ge=0, lt=1)
    step: float = Field(default=0.05, gt=0, lt=1)
    patience: int = Field(default=1, ge=1)
    tolerance: float = Field(default=0.03, ge=0, lt=1)

    def next(self, level: float, reached: float, found: int, final: float) -> tuple[float, int]:
        """The level from now on, and how many firings have found it reached.

        >>> Adaptive(step=0.25).next(0.25, 0.23, 0, 0.6)
        (0.5, 0)
        """
        found += reached >= level - self.tolerance
        return (min(level + self.step, final), 0) if found >= self.patience else (level, found)


def _schedule(value: object) -> object:
    if value is None or isinstance(value, Adaptive):
        return value
    if value == "adaptive":
        return {}
    if isinstance(value, dict) and value.get("name") == "adaptive":
        return value
    raise FieldError(
        f"must be adaptive or {{name: adaptive, step: 0.05, ...}}, got {show(value)}. "
        "For a ramp write sparsity: {ramp: ..., final: ...} and leave schedule out."
    )


class GatesOptions(LearnedOptions):
    """Options of `prune: gates`.

    Attributes:
        weights: which tensors.
        sparsity: share of their weights that is to become zero, a number or
            `{ramp, initial, final}`.
        schedule: adaptive: raise the level step by step, each time it is reached.
        granularity: one gate for each group of weights. Filters and channels are not coupled with
            those of other layers.
        scope: the share is one over all tensors, or holds in every tensor by itself.
        loss: what pulls the gates to the level: the loss of the paper, or that of its released code
            (see `gracile.prune.gate`).
        strength: multiplies the loss.
        gate_lr: learning rate of the logits; no schedule changes it.
        gate_optimizer: of the logits, without weight decay.
        initial_keep: chance of every gate to be open at first.
        tolerance: difference to the final level above which the report has a warning.
        when: the firings, each of which sets the level; before the first there are no gates.
        freeze: from when gates stand still: what is closed without noise is a mask from then on.
            Default: the end of training.
    """

    sparsity: Level
    schedule: Annotated[Adaptive | None, BeforeValidator(_schedule)] = None
    granularity: KernelRef("granularity") = Field(  # type: ignore[valid-type]
        default_factory=lambda: kernel("granularity", "element")
    )
    scope: Literal["global", "layer"] = "global"
    loss: Literal["released", "paper"] = "released"
    strength: float = Field(default=1.0, gt=0)
    gate_lr: float = Field(default=1e-3, gt=0)
    gate_optimizer: Literal["adam", "sgd"] = "adam"
    initial_keep: float = Field(default=0.99, gt=0.5, lt=1)
    tolerance: float = Field(default=0.03, ge=0, lt=1)

    @model_validator(mode="after")
    def _adaptive(self) -> Self:
        if self.schedule is None:
            return self
        if self.sparsity.ramp is not None:
            raise ValueError(
                "schedule: adaptive finds its own way to the final level; write it as a number, "
                f"sparsity: {self.sparsity.final}"
            )
        if self.when.at is not None:
            raise ValueError(
                "schedule: adaptive needs many firings; write when: {start: 0ep} instead of 'at'"
            )
        return self


@core.method(
    "prune",
    "gates",
    source="Kozlov et al. 2020, arXiv:2002.08679 (RB sparsity), and its released code; after "
    "Louizos et al. 2018, arXiv:1712.01312",
)
class Gates(LearnedMasks):
    """Learn which weights to close, together with the weights."""

    Options = GatesOptions

    def on_attach(self, s: Any) -> None:
        self.level: float | None = None  # what the loss asks for; None before the first firing
        self.found = 0  # firings that found the level reached (adaptive)
        o = self.options
        gates = {
            a: Gate(o.granularity.fn(tuple(p.shape)), o.initial_keep, p.device)
            for a in s.tensors(o.weights)
            for p in [s.parameter(a)]
        }
        self._begin(s, gates, o.gate_optimizer, o.gate_lr)

    @property
    def gates(self) -> dict[str, Gate]:
        """Address -> its gates."""
        return self.learned

    def on_fire(self, s: Any, progress: float) -> None:
        adaptive, level = self.options.schedule, self.options.sparsity
        if adaptive is None:
            wanted = level.at(progress)
        elif self.level is None:
            wanted = min(adaptive.initial, level.final)
        else:
            wanted, self.found = adaptive.next(self.level, self._closed(), self.found, level.final)
        if self.level is None:
            self._lay(s)
        self.level = wanted
        s.track(f"sparsity/{self.id}/target", wanted)

    def on_batch_start(self, s: Any) -> None:
        super().on_batch_start(s)
        if not self._training:
            return
        seed = s.generator(self.id, "noise", s.epoch_number, s.batch).initial_seed()
        rng = torch.Generator(s.device).manual_seed(seed)
        for address, gate in self.gates.items():
            gate.draw(rng, s.model.get_submodule(address.rpartition(".")[0]))

    def on_loss(self, s: Any) -> dict[str, Tensor]:
        if not self._training:
            return {}
        o, gates = self.options, self.gates.values()
        assert self.level is not None
        loss = density_loss(
            [g.logits for g in gates],
            [g.sizes for g in gates],
            1 - self.level,
            form=o.loss,
            scope=o.scope,
        )
        return {self.id: o.strength * loss}

    def on_epoch_end(self, s: Any) -> None:
        if self.level is None or not self.gates:
            return
        s.track(f"sparsity/{self.id}", self._closed())
        expected = sum(g.expected() for g in self.gates.values())
        s.track(f"sparsity/{self.id}/expected", 1 - expected / self._weights())

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "found": self.found, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level, self.found = state["level"], int(state["found"])
        super().load_state_dict(state)

    # --- inside

    @property
    def _training(self) -> bool:
        return self.level is not None and super()._training

    def _report(self, s: Any) -> None:
        """Say in the ledger what became of each tensor, and warn where the level was missed."""
        o, asked = self.options, self.options.sparsity.final
        closed = {a: 1 - g.kept() / math.prod(g.shape) for a, g in self.gates.items()}
        for a, share in closed.items():
            why = f"gates closed {share:.1%} of its weights; {asked:.1%} asked for"
            why += " over all tensors" if o.scope == "global" else ""
            s.note(a, "sparsity", None, None if share else "sensitive", why, self.id)
        if o.scope == "global" and closed:
            closed = {"all its tensors": self._closed()}
        missed = {a: v for a, v in closed.items() if abs(v - asked) > o.tolerance}
        if missed:
            worst = max(missed, key=lambda a: abs(missed[a] - asked))
            s.warn(
                "target-missed",
                f"'{self.id}' closed {missed[worst]:.1%} of the weights of {worst}, where "
                f"{asked:.1%} was asked for. Train longer, or change strength or gate_lr.",
            )
