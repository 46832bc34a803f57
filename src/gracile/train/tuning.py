"""Training beside the user's: a method trains the network by itself for some mini-batches.

Nothing of the run's own training takes part: no hooks of other methods, no gradients or state of
the user's optimizer, no random numbers. Overlays stay on, so what is masked stays zero and what is
on a grid stays on it.
"""

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from math import ceil
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gracile.core.method import Method
from gracile.core.state import derive_seed
from gracile.distribute.collective import average_gradients
from gracile.errors import BindError, UserError
from gracile.nn.quantized import ActivationQuantizer
from gracile.recipe.schema import Recipe
from gracile.train.looking import own_gradients
from gracile.train.teachers import Teachers
from gracile.train.trying import Trying

Held = list[tuple[Tensor, Tensor]]


class Batches(Protocol):
    """A data loader whose order is a function of the epoch."""

    def __len__(self) -> int: ...

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The mini-batches of one epoch."""
        ...


class Repeated:
    """A plain loader of (input, label) as `Batches`; its order is the loader's own business.

    Args:
        loader: has a length.
        device: where its mini-batches go.

    Raises:
        UserError: it has no length.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device):
        self.length = length_of(loader)
        self.loader = loader
        self.device = device

    def __len__(self) -> int:
        return self.length

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them, whichever epoch it is."""
        for x, y in self.loader:
            yield x.to(self.device), y.to(self.device)


def length_of(loader: Iterable[Any]) -> int:
    """Mini-batches of a loader.

    Raises:
        UserError: it has no length.
    """
    if not isinstance(loader, Sized):
        raise UserError("train must have a length (a DataLoader or a list of batches).")
    return len(loader)


class Tuning(Trying):
    """The part of a Session that trains for one method.

    Attributes:
        train: training mini-batches, or None.
    """

    train: Batches | None
    recipe: Recipe
    teachers: Teachers
    inputs: tuple[Tensor, ...]
    outputs: Any
    labels: Tensor | None
    task_loss: Tensor

    def hold(self) -> Held:
        """A copy of every parameter and buffer of the model, for `put_back`."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return [(t, t.detach().clone()) for t in tensors]

    def put_back(self, held: Held) -> None:
        """Make the model what it was when held; its structure must be the same."""
        with torch.no_grad():
            for tensor, value in held:
                tensor.copy_(value)

    @contextmanager
    def calibrating_on(self, images: int) -> Iterator["Counted"]:
        """Calibration data are the first so many images while this lasts; 0 is all."""
        held = self.calibration
        self.calibration = counted = Counted(held or (), images)
        try:
            yield counted
        finally:
            self.calibration = held

    def refuse_without_training_data(self, m: Method) -> None:
        """For methods that call `tune`.

        Raises:
            BindError: there are no training data, or no loss.
        """
        if self.train is None:
            raise BindError(
                f"'{m.id}' trains by itself and needs the training data: Session(..., "
                "train=<loader of (input, label)>), or compress(..., train=<loader>)."
            )
        if self.loss_of is None:
            raise BindError(
                f"'{m.id}' trains by itself and needs the loss: Session(..., "
                "loss_of=torch.nn.functional.cross_entropy)."
            )

    def tune(
        self, m: Method, learner: Method, *, epochs: float, lr: float, number: int = 0
    ) -> Iterator[int]:
        """Train the model's parameters by one method's loss.

        By Adam, as losses of layers have any scale, without weight decay; the learning rate falls
        in a straight line to 0. Gradients reach parameters of the model alone, not those that other
        methods learn beside it. Statistics of BatchNorm stand still: what `recover: bias` and
        `reconstruct` have put there would be lost.

        Args:
            m: who asks.
            learner: attached; its `on_loss` gives the loss.
            epochs: how long, over the training data; a share is of the mini-batches of one.
            lr: at the start.
            number: of this tuning, so that each has random numbers of its own.

        Yields:
            After each epoch (and what is left of the last): the images it had.

        Raises:
            BindError: there are no training data, or no loss.
        """
        self.refuse_without_training_data(m)
        assert self.train is not None
        length = len(self.train)
        steps = ceil(epochs * length - 1e-9)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        adam = torch.optim.Adam(weights, lr=lr)
        for first in range(0, steps, length):
            epoch, images = first // length, 0
            with self._aside(derive_seed(self.recipe.seed, m.id, learner.id, number, epoch)):
                batches = self.train.batches(self.recipe.train.epochs + epoch)
                for step, (x, y) in enumerate(islice(batches, steps - first), first):
                    adam.param_groups[0]["lr"] = lr * (1 - step / steps)
                    self._step(learner, adam, weights, x, y)
                    images += len(y)
            self.changed = True
            yield images

    def _step(
        self,
        learner: Method,
        adam: torch.optim.Adam,
        weights: list[nn.Parameter],
        x: Any,
        y: Tensor,
    ) -> None:
        assert self.loss_of is not None
        learner.on_batch_start(self)
        loss = self.task_loss = self.loss_of(self.model(x), y)
        self.labels = y
        terms = learner.on_loss(self)
        loss = terms.pop("task", loss)
        for term in terms.values():
            loss = loss + term
        # not backward(): ranges and codebooks that other methods learn would get gradients too
        for p, g in zip(weights, _gradients(loss, weights), strict=True):
            p.grad = g
        average_gradients(self.model)
        adam.step()
        learner.on_batch_end(self)
        self.inputs, self.outputs, self.labels = (), None, None
        self.teachers.forget()

    @contextmanager
    def _aside(self, seed: int) -> Iterator[None]:
        """Train mode, gradients and random numbers of its own; afterwards all is as it was.

        Quantizers of activations do not observe, and batch norms use their running statistics.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, (ActivationQuantizer, _BatchNorm)):
                module.eval()
        try:
            with own_gradients(self.model), torch.random.fork_rng(), torch.enable_grad():
                torch.manual_seed(seed)
                yield
        finally:
            for module, training in modes:
                module.training = training


class Counted:
    """The first images of calibration items, the last item cut; 0 is all.

    Attributes:
        images: of one pass, known after it.
    """

    def __init__(self, items: Iterable[Any], most: int):
        self.items, self.most, self.images = items, most, 0

    def __iter__(self) -> Iterator[Any]:
        self.images = 0
        for item in self.items:
            left = self.most - self.images if self.most else None
            cut = _first(item, left)
            self.images += len(_tensor(cut))
            yield cut
            if 0 < self.most <= self.images:
                return


def _first(item: Any, count: int | None) -> Any:
    if isinstance(item, Tensor):
        return item[:count]
    return type(item)(_first(part, count) for part in item)


def _tensor(item: Any) -> Tensor:
    return item if isinstance(item, Tensor) else _tensor(item[0])


def _gradients(loss: Tensor, weights: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return cast("tuple[Tensor | None, ...]", found)
