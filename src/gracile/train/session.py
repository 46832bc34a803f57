"""The Session: the live state of one run, driven by six call-backs from any training loop.

Your own loop keeps working; the names are those of the classic compression scheduler:

    session = gracile.Session(model, "r.yaml", optimizer, example=x, steps_per_epoch=len(loader))
    for epoch in range(epochs):
        session.on_epoch_begin(epoch)
        for batch, (x, y) in enumerate(loader):
            session.on_minibatch_begin(epoch, batch, len(loader))
            loss = criterion(session.model(x), y)
            loss = session.before_backward_pass(epoch, batch, len(loader), loss)
            optimizer.zero_grad(); loss.backward()
            session.before_parameter_optimization(epoch, batch, len(loader))
            optimizer.step()
            session.on_minibatch_end(epoch, batch, len(loader))
        session.on_epoch_end(epoch)
    result = session.finish()

`epoch()`, `loss()` and `step()` are short forms of the same.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gracile.analyze.cost import cost
from gracile.analyze.ledger import Inventory, Ledger, inventory
from gracile.analyze.ledger import build as build_ledger
from gracile.core.address import Selector, select
from gracile.core.method import Method
from gracile.core.overlay import Overlays
from gracile.core.plan import (
    Architecture,
    Exit,
    Factorize,
    Mask,
    Plan,
    Replace,
    Skip,
    check_conflicts,
    in_order,
)
from gracile.core.result import Result
from gracile.core.schedule import Calendar, Instant
from gracile.core.state import derive_seed
from gracile.errors import BindError, GracileError, UserError, VerificationError
from gracile.graph import surgery
from gracile.graph.additions import structural
from gracile.graph.capture import as_inputs, capture
from gracile.graph.dependency import ChannelGroup, channel_groups
from gracile.graph.depth import Block, blocks, skip_edits
from gracile.graph.factorize import Factors
from gracile.graph.graph import Graph
from gracile.graph.instrument import instrument
from gracile.graph.reproduce import Refusal
from gracile.graph.surgery import Structural, remove_edits, verified_apply
from gracile.models.spec import architecture_sha
from gracile.nn.quantized import ActivationQuantizer
from gracile.recipe.load import load as load_recipe
from gracile.recipe.schema import Recipe
from gracile.train.bind import (
    at_entry,
    at_train,
    build_methods,
    check_claims,
    check_company,
    check_needs,
    class_names,
    timetables,
)
from gracile.train.masks import Masks
from gracile.train.rate import LearningRate
from gracile.train.teachers import Teachers, learns_from_original, separate
from gracile.train.tuning import Batches, Repeated, Tuning

LAST = {"quantize": 1, "": 2}  # verbs that decide behind all others: of what masks have left
Note = tuple[str, str, str | float | None, str | None, str, str]


class Session(Tuning):
    """One compression run.

    Args:
        model: the network; trained further in place. Use `session.model` from here on.
        recipe: a Recipe, or the path of one.
        optimizer: the optimizer of the loop; its state follows every surgery.
        example: an input batch (or tuple of inputs) on the model's device, batch size >= 2.
        steps_per_epoch: mini-batches per epoch; needed for times in `it` or `mb` and for
            learning-rate schedules that count steps.
        epochs: length of training; default the recipe's `train.epochs`.
        calibration: batches for methods that observe activations: tensors, or (tensor, label).
        profile: the target runtime's quantizer profile.
        architecture: what a checkpoint calls this network; default its class name.
        loss_of: (outputs, labels) -> scalar loss, for methods that want gradients of calibration
            batches.
        val: makes the validation batches, for methods that go by accuracy.
        train: training mini-batches, for methods that train by themselves: a sized loader of
            (input, label), or an object whose `batches(epoch)` are in an order of their own for
            each epoch.
        teachers: name -> network that entries of the recipe learn from by this name; frozen.
        numbered: whether the loop says which images a mini-batch has (`samples`), each the same
            picture every time; None if that is not known beforehand.

    Raises:
        RecipeError, BindError, PlanConflict: before anything is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe | str | Path,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        example: Tensor | tuple[Tensor, ...],
        steps_per_epoch: int | None = None,
        epochs: int | None = None,
        calibration: Iterable[Any] | None = None,
        profile: str = "portable",
        architecture: Architecture | None = None,
        loss_of: Callable[[Any, Tensor], Tensor] | None = None,
        val: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None = None,
        train: Batches | Iterable[Any] | None = None,
        teachers: Mapping[str, nn.Module] = MappingProxyType({}),
        numbered: bool | None = None,
    ):
        self.recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        self.optimizer = optimizer
        self.example = example
        self.profile = profile
        self.calibration, self.loss_of, self.val = calibration, loss_of, val
        self.epochs = self.recipe.train.epochs if epochs is None else epochs
        self.calendar = Calendar(self.epochs, steps_per_epoch, self.recipe.train.accumulate)
        self.device = _first(example).device
        self.train = _batches(train, self.device)
        self.name = architecture.name if architecture else type(model).__name__

        self.epoch_number, self.batch, self.steps = 0, 0, steps_per_epoch or 0
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: Any = None
        self.labels: Tensor | None = None
        self.samples: Tensor | None = None
        self.numbered = numbered
        self.task_loss: Tensor = torch.zeros(())
        self.terms: dict[str, float] = {}
        self.history: dict[str, list[tuple[float, float]]] = {}
        self.warnings: list[tuple[str, str]] = []
        self.notes: list[Note] = []
        self.refused: list[Refusal] = []  # cuts that failed their proof
        self.changed = False  # what the model computes was changed by a method since last asked
        self.finished = False
        self.judged = False  # whether somebody keeps to the recipe's `accuracy`
        self._masks = Masks()
        self._graph: Graph | None = None
        self._groups: list[ChannelGroup] | None = None
        self._blocks: list[Block] | None = None

        arch = architecture or Architecture(name=self.name)
        arch = arch.model_copy(update={"sha256": arch.sha256 or architecture_sha(model)})
        self.plan = Plan(architecture=arch)
        self.model = model
        self.methods = build_methods(self.recipe)
        check_needs(
            self.methods,
            self.recipe,
            epochs=self.epochs,
            calibration=calibration is not None,
            teacher=True,
            validation=val is not None,
        )
        self.timetables = timetables(self.methods, self.recipe, self.calendar)
        with at_train(self.recipe, "lr"):
            self._rate = LearningRate(optimizer, self.recipe.train.lr, self.calendar)
        self.fired = {m.id: 0 for m in self.methods}
        self.original = _stock(model, self.graph)
        self.teacher: nn.Module | None = None
        if any("teacher" in m.needs and learns_from_original(m) for m in self.methods):
            self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        self.teachers = Teachers(
            self.teacher,
            separate(teachers, model),
            recipe=self.recipe.path,
            example=example,
            classes=_classes(self.graph),
        )
        self.overlays = Overlays(model)
        self._watch = self._watch_forward(model)
        try:
            for m in self.methods:
                with at_entry(self.recipe, m.id):
                    m.on_attach(self)
            check_claims(self.methods, self, self.recipe)
            check_company(self.methods, self, self.recipe)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ the six call-backs

    def on_epoch_begin(self, epoch: int) -> None:
        """Call before the first batch of an epoch, counted from 0."""
        self.epoch_number, self.batch = epoch, 0
        self._fire((epoch, 0))
        self._each("on_epoch_start")

    def on_minibatch_begin(self, epoch: int, batch: int, steps: int) -> None:
        """Call before the forward of each mini-batch."""
        self.epoch_number, self.batch, self.steps = epoch, batch, steps
        if self.calendar.steps is not None and steps != self.calendar.steps:
            raise UserError(
                f"the session was made for {self.calendar.steps} mini-batches per epoch, the loop "
                f"has {steps}; pass steps_per_epoch={steps}."
            )
        if batch > 0:
            self._fire((epoch, batch))
        self._rate.set(epoch, batch)
        self._each("on_batch_start")

    def before_backward_pass(
        self,
        epoch: int,
        batch: int,
        steps: int,
        loss: Tensor,
        *,
        labels: Tensor | None = None,
        samples: Tensor | None = None,
    ) -> Tensor:
        """Return the loss to call `backward()` on: the task's plus the methods' terms.

        Args:
            epoch: where in training, as for the other call-backs.
            batch: of the epoch.
            steps: mini-batches of an epoch.
            loss: the task's.
            labels: (N,) the classes, for losses that ask for them.
            samples: (N,) numbers of the images in the training data, for answers that are kept;
                only where an image is the same picture every time.
        """
        self.task_loss, self.labels, self.samples = loss, labels, samples
        extra: list[Tensor] = []
        self.terms = {"task": float(loss.detach())}
        for m in self.methods:
            for name, term in m.on_loss(self).items():
                self.terms[name] = float(term.detach())
                if name == "task":
                    self.task_loss = term
                else:
                    extra.append(term)
        total = self.task_loss
        for term in extra:
            total = total + term
        return total

    def before_parameter_optimization(self, epoch: int, batch: int, steps: int) -> None:
        """Call when gradients are complete, before `optimizer.step()`."""
        self._each("on_before_step")

    def on_minibatch_end(self, epoch: int, batch: int, steps: int) -> None:
        """Call after the mini-batch, whether or not the optimizer stepped."""
        self._each("on_batch_end")
        self.inputs, self.outputs, self.labels, self.samples = (), None, None, None
        self.teachers.forget()

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float] | None = None) -> None:
        """Call after the epoch; `metrics` (val_top1, val_loss, ...) are kept as curves."""
        self.batch = self.steps
        for name, value in (metrics or {}).items():
            self.track(name, value)
        self._each("on_epoch_end")
        self._rate.end_epoch(metrics or {})

    # ------------------------------------------------------------------ the short forms

    @contextmanager
    def epoch(self) -> Iterator[int]:
        """`with session.epoch(): ...` around one epoch of your loop; needs steps_per_epoch."""
        if self.calendar.steps is None:
            raise UserError("session.epoch() needs steps_per_epoch=len(loader).")
        number = getattr(self, "_next_epoch", 0)
        self.on_epoch_begin(number)
        self._cursor = 0
        self.on_minibatch_begin(number, 0, self.calendar.steps)
        yield number
        self._next_epoch = number + 1
        self.on_epoch_end(number)

    def loss(
        self, loss: Tensor, *, labels: Tensor | None = None, samples: Tensor | None = None
    ) -> Tensor:
        """Short form of `before_backward_pass`; divided by the recipe's `train.accumulate`."""
        total = self.before_backward_pass(
            self.epoch_number, self.batch, self.steps, loss, labels=labels, samples=samples
        )
        return total / self.calendar.accumulate

    def step(self) -> None:
        """Short form: hooks, `optimizer.step()`, hooks, then on to the next mini-batch.

        With `train.accumulate` the optimizer steps when so many mini-batches are together, or the
        epoch ends.
        """
        if self.optimizer is None:
            raise UserError("session.step() needs an optimizer: Session(model, recipe, optimizer).")
        e, b, n = self.epoch_number, self.batch, self.steps
        if (b + 1) % self.calendar.accumulate == 0 or b + 1 == n:
            self.before_parameter_optimization(e, b, n)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.on_minibatch_end(e, b, n)
        if b + 1 < n:
            self.on_minibatch_begin(e, b + 1, n)

    # ------------------------------------------------------------------ the end

    def finish(self, calibration: Iterable[Any] | None = None) -> Result:
        """Fire what is due `at: end`, collect the Edits and return the compressed model.

        Raises:
            GracileError: a method did not fire as often as its timetable says.
        """
        if self.finished:
            raise UserError("finish() was called before; make a new Session for another run.")
        if calibration is not None:
            self.calibration = calibration
        self.epoch_number, self.batch = self.epochs, 0
        self._fire_at_end()
        self._check_fired()
        if self.recipe.accuracy is not None and not self.judged:
            self.warn(
                "accuracy-ignored",
                "the recipe's 'accuracy' was not kept to: a loop of your own trains all its epochs."
                " Use gracile.compress or the command.",
            )
        last = sorted(self.methods, key=lambda m: LAST.get(m.verb, 0))
        edits = in_order([e for m in last for e in m.on_detach(self)])
        check_conflicts(edits, self.recipe.lines)
        self.plan = self.plan.extended(edits)
        tensors = self._collect_tensors()
        ranges = {k: r for m in self.methods for k, r in getattr(m, "ranges", dict)().items()}
        self._bake()
        self.close()
        self.model.eval()
        return Result(
            model=self.model,
            plan=self.plan,
            ledger=self._ledger(),
            tensors=tensors,
            ranges=ranges,
            history=self.history,
            warnings=self.warnings,
            ladder=[row for m in self.methods for row in getattr(m, "climbed", list)()],
        )

    def _fire_at_end(self) -> None:
        """In turns: who fires n times does so in the last n of them."""
        for left in range(max((t.at_end for t in self.timetables.values()), default=0), 0, -1):
            for m in self.methods:
                table = self.timetables.get(m.id)
                if table is not None and table.at_end >= left:
                    self._fire_one(m, table.progress(len(table) - left))

    def close(self) -> None:
        """Take everything off the model that is not part of it; the session is over."""
        self.overlays.detach()
        self._watch.remove()
        self.finished = True

    # ------------------------------------------------------------------ what methods may use

    @property
    def groups(self) -> list[ChannelGroup]:
        """Channels that must be cut together, in the model as it is now."""
        if self._groups is None:
            self._groups = channel_groups(self.model, self.graph)
        return self._groups

    @property
    def blocks(self) -> list[Block]:
        """Residual blocks of the model as it is now, those that cannot be left out included."""
        if self._blocks is None:
            self._blocks = blocks(self.model, self.graph)
        return self._blocks

    @property
    def parameter_names(self) -> frozenset[str]:
        """Plain names of all parameters."""
        return frozenset(n for n, _ in self.model.named_parameters())

    def tensors(self, selector: Selector) -> list[str]:
        """Parameter addresses a selector means.

        Raises:
            BindError: a pattern matches nothing.
        """
        names = [n for n, _ in self.model.named_parameters()]
        return select(selector, names, class_names(self.model), model=self.name)

    def parameter(self, address: str) -> nn.Parameter:
        """The stored parameter (without overlays)."""
        return self.model.get_parameter(address)

    @property
    def now(self) -> int:
        """Mini-batches (epochs, if their length is unknown) since training began."""
        steps = self.calendar.steps
        return self.epoch_number * steps + self.batch if steps else self.epoch_number

    def moment(self, m: Method, which: Literal["first", "last"]) -> tuple[int, ...] | None:
        """When a method fires for the first or last time, to be compared; None if it never does."""
        table = self.timetables.get(m.id)
        if table is None:
            return None
        order = self.methods.index(m)
        if table.instants and (which == "first" or not table.at_end):
            return (*table.instants[0 if which == "first" else -1], order)
        return (self.epochs, -table.at_end if which == "first" else -1, order)

    def active(self, m: Method) -> bool:
        """Whether now lies in the span of a method's `when` (always, if it has none)."""
        when = m.options.timing
        if when is None:
            return True
        start = self.calendar.minibatch(when.start) if when.start else 0
        stop = self.calendar.minibatch(when.stop) if when.stop else self.calendar.total
        return start <= self.now < stop

    def over(self, m: Method) -> bool:
        """Whether the span of a method's `when` lies behind; False for one that fires once."""
        when = m.options.timing
        if when is None or when.stop is None:
            return False
        return self.now >= self.calendar.minibatch(when.stop)

    def set_mask(self, by: str, address: str, keep: Tensor, *, scale: float = 1.0) -> None:
        """Lay a keep-mask of one method on a tensor; masks of several methods intersect.

        Args:
            by: the method's id.
            address: of a parameter.
            keep: True where it stays, of its shape.
            scale: what is kept is multiplied by this, until the mask is replaced or dropped.
        """
        keep = keep.to(device=self.parameter(address).device, dtype=torch.bool)
        self._masks.set(by, address, keep, scale)
        self._lay_masks([address])
        self.changed = True

    def drop_masks(self, by: str) -> None:
        """Take all masks of a method off."""
        self._lay_masks(self._masks.drop(by))

    def unmask(self, address: str) -> None:
        """Take the masks of all methods off a tensor; what they hid is zero from then on."""
        keep = self._masks.lift(address)
        if keep is not None:
            with torch.no_grad():
                self.parameter(address).mul_(keep)
            self._lay_masks([address])

    def train_masked(self, by: str, on: bool) -> None:
        """Whether weights under a method's masks go on getting their gradient."""
        (self._masks.trained.add if on else self._masks.trained.discard)(by)
        self._lay_masks(self._masks.addresses(by))

    def mask(self, address: str) -> Tensor | None:
        """The combined keep-mask of a tensor (on the CPU), or None."""
        keep = self._masks.together(address)
        return None if keep is None else keep.cpu()

    def masked_by(self, by: str) -> list[str]:
        """Addresses of the tensors that a method has masked."""
        return self._masks.addresses(by)

    def own_mask(self, by: str, address: str) -> Tensor:
        """The keep-mask one method laid on a tensor; all True if none."""
        mask = self._masks.of(by, address)
        return torch.ones_like(self.parameter(address), dtype=torch.bool) if mask is None else mask

    def mask_edits(self, by: str) -> list[Mask]:
        """Mask edits for what a method masked and no surgery has cut."""
        return self._masks.edits(by)

    def instrument(
        self,
        after: Mapping[str, nn.Module] = MappingProxyType({}),
        before: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> None:
        """Call modules on what graph nodes give (`before`: on what they read) from now on.

        Replaces `session.model`.
        """
        if self.graph.module is None:
            raise BindError(
                f"the forward of {self.name} cannot be rewritten, so activations cannot be "
                f"quantized: {self.graph.reason}"
            )
        training = self.model.training
        new = instrument(self.graph, after, before).train(training)
        self._replace_model(lambda model: new)
        self.changed = True

    def cut(self, gone: Mapping[str, Iterable[int]], *, by: str, reproduce: bool = True) -> None:
        """Remove units of channel groups: `gone` maps group id -> unit numbers."""
        edits = remove_edits(self.groups, {k: set(v) for k, v in gone.items()}, by)
        self.apply(edits, reproduce=reproduce)

    def skip(self, block: str | Sequence[str], *, by: str) -> None:
        """Leave residual blocks out, by their ids (see `blocks`); replaces `session.model`."""
        ids = [block] if isinstance(block, str) else block
        self.apply(skip_edits(self.model, self.graph, ids, by))

    def apply(
        self,
        edits: Sequence[Any],
        *,
        reproduce: bool = True,
        factors: Factors = MappingProxyType({}),
    ) -> None:
        """Verified surgery in mid-training: optimizer state, masks and methods follow.

        Args:
            edits: put in order by kind.
            reproduce: make what fails small and keep it in `refused`; False for a caller that
                tries parts of it next.
            factors: path of a layer -> its new tensors, for each `factorize` and `replace` edit.

        Raises:
            VerificationError: the cut would change what the model computes; nothing was changed.
        """
        edits = in_order(edits)
        other = [e for e in edits if not isinstance(e, Structural)]
        if other:
            raise GracileError(f"this version cannot apply '{other[0].kind}' edits in training.")
        quantized = any(isinstance(m, ActivationQuantizer) for m in self.model.modules())
        if quantized and any(isinstance(e, (Skip, Factorize, Replace, Exit)) for e in edits):
            raise UserError(
                "activations are quantized already; leave blocks out, factorize, replace and "
                "attach exits before that."
            )
        try:
            self._replace_model(
                lambda model: verified_apply(
                    model,
                    edits,
                    examples=self._examples(),
                    optimizer=self.optimizer,
                    graph=self._graph,
                    reproduce=reproduce,
                    factors=factors,
                )[0]
            )
        except VerificationError as e:
            if reproduce and e.edits:
                self.refused.append(Refusal.of(e, self.plan))
            raise
        self._masks.slice(edits)
        self.plan = self.plan.extended(edits)
        self._lay_masks(self._masks.addresses())
        for m in self.methods:
            m.on_surgery(self, edits)
        self.changed = True

    def settle(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Fill in what edits of the Plan left open: edit id -> fields, as thresholds of exits."""
        self.plan = self.plan.amended(changes)

    def generator(self, *purpose: object) -> torch.Generator:
        """A generator of its own for one purpose, derived from the recipe's seed."""
        return torch.Generator().manual_seed(derive_seed(self.recipe.seed, *purpose))

    def track(self, name: str, value: float) -> None:
        """Add a point to a curve of the report, at the present moment of training."""
        now = self.epoch_number + (self.batch / self.steps if self.steps else 0.0)
        self.history.setdefault(name, []).append((now, float(value)))

    def warn(self, code: str, text: str) -> None:
        """Keep a warning for the user and the report; the same one is kept once."""
        if (code, text) not in self.warnings:
            self.warnings.append((code, text))

    def note(
        self,
        address: str,
        axis: str,
        value: str | float | None,
        reason: str | None,
        why: str = "",
        by: str = "",
    ) -> None:
        """Keep a line of the coverage ledger."""
        self.notes.append((address, axis, value, reason, why, by))

    # ------------------------------------------------------------------ stop and go on

    def state_dict(self) -> dict[str, Any]:
        """All that an identical continuation needs, at an epoch's end: tensors and JSON values."""
        return {
            "plan": self.plan.to_json(),
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "methods": {m.id: m.state_dict() for m in self.methods},
            "masks": self._masks.state_dict(),
            "fired": dict(self.fired),
            "history": self.history,
            "warnings": self.warnings,
            "notes": self.notes,
            "lr": self._rate.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring a fresh Session (same model, recipe and data) to a stored state.

        Raises:
            UserError: the state belongs to another network.
        """
        plan = Plan.model_validate_json(state["plan"])
        if plan.architecture.sha256 != self.plan.architecture.sha256:
            raise UserError("the stored state belongs to another network than this one.")
        edits = structural(plan)
        self._replace_model(
            lambda model: surgery.apply(
                model, edits, example=self.example, optimizer=self.optimizer
            )
        )
        self.plan = plan
        trained, self._masks = self._masks.trained, Masks(state["masks"])
        self._masks.trained = trained
        self._lay_masks(self._masks.addresses())
        for m in self.methods:
            if edits:
                m.on_surgery(self, edits)
            m.load_state_dict(state["methods"][m.id])
        self.model.load_state_dict(state["model"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.fired = {k: int(v) for k, v in state["fired"].items()}
        self.history = {k: [(t, v) for t, v in c] for k, c in state["history"].items()}
        self.warnings = [(c, t) for c, t in state["warnings"]]
        self.notes = [tuple(n) for n in state["notes"]]
        self._rate.load_state_dict(state["lr"])

    # ------------------------------------------------------------------ inside

    def _each(self, hook: str) -> None:
        for m in self.methods:
            getattr(m, hook)(self)

    def _fire(self, instant: Instant) -> None:
        for m in self.methods:
            table = self.timetables.get(m.id)
            k = table.index(instant) if table is not None else None
            if table is not None and k is not None:
                self._fire_one(m, table.progress(k))

    def _fire_one(self, m: Method, progress: float) -> None:
        m.on_fire(self, progress)
        self.fired[m.id] += 1

    def _check_fired(self) -> None:
        for m in self.methods:
            table = self.timetables.get(m.id)
            if table is not None and self.fired[m.id] != len(table):
                raise GracileError(
                    f"'{m.id}' fired {self.fired[m.id]} of {len(table)} times: training ended "
                    f"before its timetable did. It needs {self.epochs} epochs, each begun with "
                    "on_epoch_begin()."
                )

    def _examples(self) -> list[Any]:
        generator = self.generator("surgery")
        inputs = as_inputs(self.example)
        return [inputs, tuple(_another(x, generator) for x in inputs)]

    def _lay_masks(self, addresses: Iterable[str]) -> None:
        for address in addresses:
            laid = self._masks.overlay(address)
            if laid is None:
                self.overlays.remove(address, "mask")
            else:
                self.overlays.set(address, "mask", laid)

    def _replace_model(self, change: Callable[[nn.Module], nn.Module]) -> None:
        """Change the bare model, or put another in its place; then lay the overlays again.

        Overlays of parameters that are gone are not.
        """
        layers = self.overlays.pause()
        self._watch.remove()
        try:
            self.model = change(self.model)
        finally:
            names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
            self.overlays = Overlays(self.model, {a: f for a, f in layers.items() if a in names})
            self._watch = self._watch_forward(self.model)
        self._graph = self._groups = self._blocks = None

    def _watch_forward(self, model: nn.Module) -> Any:
        def keep(_m: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if torch.is_grad_enabled():
                self.inputs, self.outputs = args, output

        return model.register_forward_hook(keep)

    def _collect_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for m in self.methods:
            for key, value in getattr(m, "tensors", dict)().items():
                tensors[key] = value.detach().cpu().clone()
        for edit in self.plan.of_kind("mask"):
            mask = self.mask(edit.at)
            if mask is not None:
                tensors[edit.key] = mask
        return tensors

    def _bake(self) -> None:
        with torch.no_grad():
            values = {a: self.overlays.effective(a).detach() for a in self.overlays.addresses()}
            for address, value in values.items():
                self.parameter(address).data.copy_(value)

    def _ledger(self) -> Ledger:
        after = _stock(self.model, capture(self.model, self.example))
        return build_ledger(self.original, after, self.plan, self.notes)


def _classes(graph: Graph) -> int | None:
    """Width of the network's answer, where that is one row for each image."""
    shapes = [graph[i].shape for n in graph.of_op("output") for i in n.inputs]
    shape = shapes[0] if len(shapes) == 1 else None
    return shape[1] if shape is not None and len(shape) == 2 else None


def _stock(model: nn.Module, graph: Graph) -> Inventory:
    macs = {row.id: row.macs for row in cost(model, graph)}
    return inventory(model.named_parameters(), graph, macs)


def _another(x: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of the same shape; of numbers that may be indices, the same in another order."""
    if not x.is_floating_point():
        return x.roll(1, dims=-1) if x.ndim else x
    return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.device, x.dtype)


def _batches(train: Any, device: torch.device) -> Batches | None:
    return train if train is None or hasattr(train, "batches") else Repeated(train, device)


def _first(example: Tensor | tuple[Tensor, ...]) -> Tensor:
    return example if isinstance(example, Tensor) else example[0]
