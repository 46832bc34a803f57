"""The learning rate of a run: the schedule of the recipe's `train.lr`, laid on the optimizer."""

from collections.abc import Mapping
from typing import Any

import torch

from gracile.core.lr import make
from gracile.core.schedule import Calendar


class LearningRate:
    """Sets `lr` (and momentum, where the schedule moves it) of every parameter group.

    Groups keep the ratio of their initial rates. With gradient accumulation a schedule that counts
    steps counts those of the optimizer.

    Args:
        optimizer: None, or
        spec: None: nothing is ever set.

    Raises:
        UserError: the schedule does not fit.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None,
        spec: Any,
        calendar: Calendar,
    ):
        self._optimizer, self._calendar = optimizer, calendar
        self._schedule = None
        if spec is None or optimizer is None:
            return
        for g in optimizer.param_groups:
            g.setdefault("initial_lr", g["lr"])
        self._schedule = make(
            spec,
            base_lr=optimizer.param_groups[0]["initial_lr"],
            epochs=calendar.epochs,
            steps_per_epoch=self._steps,
        )

    @property
    def _steps(self) -> int | None:
        """Optimizer steps per epoch."""
        steps = self._calendar.steps
        return None if steps is None else -(-steps // self._calendar.accumulate)

    def set(self, epoch: int, batch: int) -> None:
        """Set what is due before a mini-batch."""
        if self._schedule is None or self._optimizer is None:
            return
        step = epoch * (self._steps or 1)
        step += batch // self._calendar.accumulate if self._calendar.steps else 0
        base = self._optimizer.param_groups[0]["initial_lr"]
        lr = self._schedule.lr(epoch, step)
        momentum = self._schedule.momentum(epoch, step)
        for g in self._optimizer.param_groups:
            g["lr"] = lr * g["initial_lr"] / base
            if momentum is not None:
                if "momentum" in g:
                    g["momentum"] = momentum
                elif "betas" in g:
                    g["betas"] = (momentum, *g["betas"][1:])

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Tell a schedule that watches a metric how the epoch went."""
        if self._schedule is not None:
            self._schedule.end_epoch(dict(metrics))

    def state_dict(self) -> dict[str, Any] | None:
        """What the schedule remembers."""
        return self._schedule.state_dict() if self._schedule else None

    def load_state_dict(self, state: Any) -> None:
        """Inverse of `state_dict`."""
        if self._schedule is not None:
            self._schedule.load_state_dict(state)
