"""What a recipe would do, without data or training: the Session's own hooks, run in seconds.

Real are timetables, ramps, rankings, surgery and the learning rate. Left out are forward, backward
and the optimizer's step: weights stand still, and what only training moves is named in a warning.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils._pytree import tree_leaves

from gracile.analyze.cost import cost
from gracile.benchmark.runtimes.base import parse_target
from gracile.core.method import Method, Options
from gracile.core.schedule import Calendar, Time
from gracile.core.state import derive_seed
from gracile.graph.capture import as_inputs
from gracile.prune.evidence import FROM_GRADIENTS
from gracile.recipe.explain import Firing, timetable_rows
from gracile.recipe.load import load as load_recipe
from gracile.recipe.schema import Recipe
from gracile.train.counting import Count, count
from gracile.train.loop import make_optimizer
from gracile.train.session import Session
from gracile.train.speed import filters, speed_warnings

NOISE_BATCHES = 2


@dataclass(frozen=True)
class Fired:
    """What one entry of the recipe did in an epoch, or after training.

    Attributes:
        id: the recipe's name of the entry.
        method: `verb: name`.
        times: how often it fired; 0 for one that acts all the time (`distill: kd`).
        progress: of the last firing, in [0, 1]; None without one.
        levels: option -> its level at the last firing.
    """

    id: str
    method: str
    times: int
    progress: float | None
    levels: dict[str, float]


@dataclass(frozen=True)
class Moment:
    """The end of an epoch.

    Attributes:
        epoch: counted from 0; None after training.
        learning_rate: at the epoch's first mini-batch; None after training.
        fired: what fired or acted since the moment before.
        count: what the network is now.
    """

    epoch: int | None
    learning_rate: float | None
    fired: tuple[Fired, ...]
    count: Count

    def to_dict(self) -> dict[str, Any]:
        """As JSON: `count` on one level with the others."""
        out: dict[str, Any] = asdict(self)
        out.update(out.pop("count"))
        return out


@dataclass(frozen=True)
class Simulation:
    """What a recipe would do.

    Attributes:
        before: the network as it came.
        epochs: one Moment for each epoch.
        end: after training, what fires `at: end` included.
        not_simulated: ids of entries whose effect is in none of the figures.
        warnings: (code, text).
    """

    before: Count
    epochs: tuple[Moment, ...]
    end: Moment
    not_simulated: tuple[str, ...]
    warnings: tuple[tuple[str, str], ...]

    @property
    def totals(self) -> dict[str, int]:
        """`params`, `nnz`, `macs_before` and `macs_after`."""
        end = self.end.count
        return {
            "params": end.params,
            "nnz": end.nnz,
            "macs_before": self.before.macs,
            "macs_after": end.macs,
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "before": asdict(self.before),
            "epochs": [m.to_dict() for m in self.epochs],
            "end": self.end.to_dict(),
            "totals": self.totals,
            "not_simulated": list(self.not_simulated),
            "warnings": [{"code": code, "text": text} for code, text in self.warnings],
        }


def simulate(
    recipe: Recipe | str | Path,
    model: nn.Module,
    *,
    example: Tensor | tuple[Tensor, ...],
    steps_per_epoch: int = 100,
    calibration: Iterable[Any] | None = None,
    runtimes: Sequence[str] = (),
) -> Simulation:
    """Fast-forward a recipe: what fires in each epoch, and what is left of the network.

    Only mini-batches at which something is due are run through the hooks, and the first and last of
    each epoch; a method that counts mini-batches itself sees no others.

    Args:
        recipe: a Recipe, or the path of one; `train.epochs` says how long.
        model: changed in place, as in a run.
        example: a batch of inputs, batch size >= 2.
        steps_per_epoch: mini-batches per epoch.
        calibration: batches (tensor, label) for methods that look at data; default noise of the
            example's shape with random targets.
        runtimes: where the model will run, `NAME[:DEVICE]`: what brings no speed there is a
            warning.

    Raises:
        UserError: the recipe does not fit the model, or an unknown runtime.
    """
    names = [parse_target(r)[0] for r in runtimes]
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    warnings: list[tuple[str, str]] = []
    train = recipe.train
    if train.lr is not None and train.lr.get("class") == "ReduceLROnPlateau":
        train = train.model_copy(update={"lr": None})
        recipe = recipe.model_copy(update={"train": train})
        warnings.append(
            (
                "not-simulated",
                "train.lr: ReduceLROnPlateau goes by a metric; only its first rate is told.",
            )
        )
    noise = _Noise(example, recipe.seed)
    s = Session(
        model,
        recipe,
        make_optimizer(model, train) if train.epochs else None,
        example=example,
        steps_per_epoch=steps_per_epoch if train.epochs else None,
        calibration=noise if calibration is None else calibration,
        loss_of=noise.loss if calibration is None else cross_entropy,
        val=noise.labelled,
        train=[*noise.labelled()],
    )
    methods, recorder = list(s.methods), _Recorder(s, names)
    for m in methods if calibration is None else ():
        m.options = m.options.model_copy(update=m.options.on_noise)
    s.methods.append(recorder)
    _drive(s)
    lost = tuple(m.id for m in methods if not m.by_value and _trained(m))
    warnings += [w for w in s.warnings if not w[1].startswith(tuple(f"'{id}'" for id in lost))]
    for m in methods:
        warnings += _limits(m, lost=m.id in lost, noise=calibration is None)
    return Simulation(
        before=recorder.before,
        epochs=tuple(recorder.epochs),
        end=recorder.end,
        not_simulated=lost,
        warnings=(*warnings, *recorder.slow),
    )


class _Recorder(Method):
    """Comes behind the recipe's methods in every hook and writes down what they have done."""

    def __init__(self, s: Session, runtimes: Sequence[str]):
        super().__init__("", Options())
        self.runtimes = runtimes
        self.strict = s.recipe.compat == "strict"
        self.firings: dict[str, list[Firing]] = {}
        for row in timetable_rows(s.recipe, s.calendar):
            self.firings.setdefault(row.id, []).append(row)
        self.told = dict(s.fired)
        self.lr: float | None = None
        self.epochs: list[Moment] = []
        self.slow: list[tuple[str, str]] = []
        self.filters = filters(s)
        self.graph: Any = None
        self.before = self._count(s)

    def on_batch_start(self, s: Any) -> None:
        if s.batch == 0:
            self.lr = s.optimizer.param_groups[0]["lr"]

    def on_epoch_end(self, s: Any) -> None:
        self.epochs.append(self._moment(s, s.epoch_number, self.lr))

    def on_detach(self, s: Any) -> Iterable[Any]:
        self.end = self._moment(s, None, None)
        self.slow = speed_warnings(s, self.runtimes, self.filters)
        return ()

    def _moment(self, s: Any, epoch: int | None, lr: float | None) -> Moment:
        fired = []
        for id, rows in self.firings.items():
            times = s.fired[id] - self.told[id]
            if times:
                row = rows[s.fired[id] - 1]
                fired.append(Fired(id, row.method, times, row.progress, row.levels))
            elif rows[0].progress is None and epoch is not None:  # acts all the time
                fired.append(Fired(id, rows[0].method, 0, None, {}))
        self.told = dict(s.fired)
        return Moment(epoch, lr, tuple(fired), self._count(s))

    def _count(self, s: Any) -> Count:
        if s.graph is not self.graph:  # another one after each surgery
            self.graph, self.rows = s.graph, cost(s.model, s.graph)
        return count(s, self.rows, strict=self.strict)


# ------------------------------------------------------------------ driving


def _drive(s: Session) -> None:
    """All hooks but those of forward, backward and the optimizer's step."""
    steps = s.calendar.steps or 1
    due = _due(s)
    for epoch in range(s.epochs):
        s.model.train()
        s.on_epoch_begin(epoch)
        for batch in sorted({0, steps - 1} | due.get(epoch, set())):
            s.on_minibatch_begin(epoch, batch, steps)
            s.on_minibatch_end(epoch, batch, steps)
        s.on_epoch_end(epoch)
    s.finish()


def _due(s: Session) -> dict[int, set[int]]:
    """Epoch -> mini-batches of firings, and of all times that options name with those before."""
    points = {(e, b) for table in s.timetables.values() for e, b in table.instants}
    if s.calendar.steps is not None:
        for m in s.methods:
            for time in _times(m.options):
                points |= _around(s.calendar, time)
    out: dict[int, set[int]] = {}
    for epoch, batch in points:
        out.setdefault(epoch, set()).add(batch)
    return out


def _around(calendar: Calendar, time: Time) -> set[tuple[int, int]]:
    at = calendar.minibatch(time)
    return {calendar.instant(n) for n in (at - 1, at) if 0 <= n < calendar.total}


def _times(value: Any) -> Iterator[Time]:
    if isinstance(value, Time):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _times(getattr(value, name))


class _Noise:
    """Calibration batches like the example, and a loss for them."""

    def __init__(self, example: Tensor | tuple[Tensor, ...], seed: int):
        self.example = as_inputs(example)[0]
        self.seed = derive_seed(seed, "simulate")

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = torch.Generator().manual_seed(self.seed)
        for _ in range(NOISE_BATCHES):
            x = self.example.cpu()
            if x.is_floating_point():
                x = torch.randn(x.shape, generator=rng).to(x.dtype)
            else:  # indices stay in range
                x = x.flatten()[torch.randperm(x.numel(), generator=rng)].reshape(x.shape)
            yield x, torch.zeros(len(x))

    def labelled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same with whole numbers as labels."""
        return ((x, y.long()) for x, y in self)

    def loss(self, outputs: Any, _labels: Tensor) -> Tensor:
        """Squared distance of all outputs to random targets."""
        rng = torch.Generator().manual_seed(self.seed)
        seen = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
        return torch.stack(
            [mse_loss(t, torch.randn(t.shape, generator=rng).to(t)) for t in seen]
        ).sum()


# ------------------------------------------------------------------ what is not known


def _trained(m: Method) -> bool:
    """Whether a method acts through data or training."""
    return m.verb != "prune" or type(m).on_loss is not Method.on_loss


def _looks(m: Method) -> bool:
    """Whether a method ranks by what data shows."""
    needs = getattr(getattr(m, "evidence", None), "needs", ())
    return "calibration" in m.needs or any(n in FROM_GRADIENTS for n in needs)


def _limits(m: Method, *, lost: bool, noise: bool) -> Iterator[tuple[str, str]]:
    """Warnings of what cannot be known of a method's effect."""
    name = f"'{m.id}' ({m.verb}: {m.kind_name})"
    if lost:
        text = "needs data or training; its effect is in none of these figures."
        yield "not-simulated", f"{name} {text}"
        return
    if m.by_value:
        text = "goes by the values of the weights: training moves them, and with them its share."
        yield "depends-on-weights", f"{name} {text}"
    elif getattr(m.options, "scope", "layer") != "layer":
        text = "ranks layers together: what each of them loses depends on how training moves them."
        yield "depends-on-weights", f"{name} {text}"
    if noise and _looks(m):
        text = "ranked on random data: which weights go is not known, how many is."
        yield "random-data", f"{name} {text}"
