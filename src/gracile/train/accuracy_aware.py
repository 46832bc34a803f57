"""Accuracy-aware training: stop when the accuracy is good enough, or find the highest level.

The two modes of NNCF's accuracy-aware training, for every method that masks or cuts to a level.
Different from NNCF: what failed is undone, by a new session brought to the last state that was
good, where NNCF trains on from the failed one; and a level that is too high from the start is
lowered by training anew, where NNCF takes masks off a network that was trained with them.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gracile.core.method import Method
from gracile.errors import BindError, UserError, nearest
from gracile.prune.cutting import Cutting
from gracile.prune.masking import Masking
from gracile.recipe.fields import LevelValue
from gracile.train.evaluate import predict_module, score
from gracile.train.loop import fit
from gracile.train.rate import LearningRate
from gracile.train.session import Session
from gracile.train.tuning import Batches

LEVELS = ("sparsity", "ratio")  # options that are levels


@dataclass(frozen=True)
class Kept:
    """An epoch worth going back to: all that a new session needs to be there."""

    level: float
    epoch: int  # so many are over
    top1: float
    state: dict[str, Any]


class AccuracyAware:
    """Training as a recipe's `accuracy` says.

    Each epoch in which all methods have reached their last level is scored. `early_exit` stops at
    the first that is within `max_drop`. `adaptive` does the same with the recipe as written (with
    lower last levels, until one succeeds), then raises the level step by step from the best state,
    each time for `patience` epochs; what fails is rolled back, and the step shrinks.

    Args:
        make: a session at its start, each time on a fresh copy of the original model and with an
            optimizer of its own.
        loader: training mini-batches.
        val: makes the validation batches that the accuracy is of.
        progress: show a progress bar on stderr.

    Raises:
        UserError: no validation data.
        BindError: adaptive, and no entry (of that name) has a level to vary.
    """

    def __init__(
        self,
        make: Callable[[], Session],
        loader: Batches,
        *,
        val: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None,
        progress: bool = True,
    ):
        if val is None:
            raise UserError("the recipe's accuracy goes by validation data: give val=<batches>.")
        self.make, self.loader, self.val, self.progress = make, loader, val, progress
        self.session = self._judged()
        assert self.session.recipe.accuracy is not None
        self.goal = self.session.recipe.accuracy
        dense = score(*predict_module(self.session.model, val())).top1
        drop = self.goal.max_drop / 100 * (dense if self.goal.relative else 1.0)
        self.bound = dense - drop - 1e-9
        self.spent = 0  # epochs
        self.tried: dict[str, list[tuple[float, float]]] = {"level": [], "top1": []}

    def _judged(self) -> Session:
        session = self.make()
        session.judged = True
        return session

    def fit(self) -> Session:
        """Train.

        Returns:
            The session at the best state, not finished yet: the highest level within the bound, or
            the most accurate one, with the warning `accuracy-missed`. The curves `accuracy/level`
            and `accuracy/top1` tell what was tried.
        """
        if self.goal.mode == "adaptive":
            best = self._adapted()
        else:
            best = self._until(0)
        s = self._back_to(best)
        if self.goal.mode == "adaptive":
            s.history |= {f"accuracy/{k}": v for k, v in self.tried.items()}
        if best.top1 < self.bound:
            s.warn(
                "accuracy-missed",
                f"the best epoch has {best.top1:.2%} on the validation data; {self.bound:.2%} was "
                "asked for. Train longer, or ask for less.",
            )
        return s

    def _adapted(self) -> Kept:
        goal = self.goal
        level, step, rate = _level_of(self._varied()).final, goal.step, 1.0
        first = best = kept = self._until(0)
        while kept.top1 < self.bound:
            level = round(level - step, 9)
            if level < goal.min_level or self.spent >= goal.max_epochs:
                return best
            self.session = self._judged()
            _end_at(self._varied(), level)
            kept = self._until(0)
            best = max(best, kept, key=lambda k: k.top1)
        if kept is not first:  # one step up has failed already
            step *= goal.shrink
        while step >= goal.min_step - 1e-9 and self.spent < goal.max_epochs:
            level = round(kept.level + step, 9)
            if level > goal.max_level:
                break
            found = self._raised(kept, level, rate)
            if found.top1 >= self.bound:
                kept = found
            else:
                step, rate = step * goal.shrink, rate * goal.lr_factor
        return kept

    def _raised(self, kept: Kept, level: float, rate: float) -> Kept:
        """A higher level from a good state, at a constant learning rate."""
        s = self._back_to(kept)
        s.epochs = kept.epoch + self.goal.patience
        s.calendar = replace(s.calendar, epochs=max(s.calendar.epochs, s.epochs))
        s._rate = LearningRate(None, None, s.calendar)  # its schedule is over
        for group in s.optimizer.param_groups if s.optimizer else ():
            group["lr"] = group.get("initial_lr", group["lr"]) * rate
        method = self._varied()
        _end_at(method, level)
        method.on_fire(s, 1.0)
        return self._until(kept.epoch)

    def _until(self, start: int) -> Kept:
        """Train until an epoch meets the bound; else the most accurate one is kept."""
        s = self.session
        level = _level_of(self._varied()).final if self.goal.mode == "adaptive" else 0.0
        found: list[Kept] = []

        def judge(epoch: int) -> bool:
            self.spent += 1
            top1 = s.history["val_top1"][-1][1]
            if not _complete(s) or (found and top1 <= found[-1].top1):
                return False
            found.append(Kept(level, epoch + 1, top1, copy.deepcopy(s.state_dict())))
            return top1 >= self.bound

        fit(s, self.loader, val=self.val, start=start, after_epoch=judge, progress=self.progress)
        if not found:
            raise BindError(
                "accuracy: in no epoch of training have all methods fired for the last time. "
                "Train longer, or let them fire earlier."
            )
        for name, value in (("level", level), ("top1", found[-1].top1)):
            self.tried[name].append((self.spent, value))
        return found[-1]

    def _back_to(self, kept: Kept) -> Session:
        s = self.session = self._judged()
        s.load_state_dict(copy.deepcopy(kept.state))
        s.epochs = s.epoch_number = kept.epoch
        if self.goal.mode == "adaptive":
            _end_at(self._varied(), kept.level)
        return s

    def _varied(self) -> Method:
        """The method whose level is varied: gates and the like reach theirs by training alone."""
        able = {
            m.id: m
            for m in self.session.methods
            if isinstance(m, (Masking, Cutting)) and _level_name(m) is not None
        }
        if not able:
            raise BindError(
                "accuracy: no method that masks or cuts has a level to vary; use mode: early_exit."
            )
        name = self.goal.method or [*able][-1]
        if name not in able:
            raise BindError(f"accuracy.method: '{name}' has no level to vary.{nearest(name, able)}")
        return able[name]


def _level_name(m: Method) -> str | None:
    return next((k for k in LEVELS if isinstance(getattr(m.options, k, None), LevelValue)), None)


def _level_of(m: Method) -> LevelValue:
    level: LevelValue = getattr(m.options, _level_name(m) or "")
    return level


def _end_at(m: Method, final: float) -> None:
    """Let a method's level end somewhere else, on the same kind of way."""
    old = _level_of(m)
    new = replace(old, final=final, initial=min(old.initial, final))
    m.options = m.options.model_copy(update={_level_name(m): new})


def _complete(s: Session) -> bool:
    """Whether all firings but those after training have been."""
    return all(s.fired[id] >= len(t.instants) for id, t in s.timetables.items())
