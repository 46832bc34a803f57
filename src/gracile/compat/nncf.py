"""The call-backs of the NNCF paper, so that a script written for them runs on gracile.

    from gracile.compat.nncf import create_compression_algorithm, patch_torch_operators

    patch_torch_operators()
    algorithm = create_compression_algorithm(model, config)
    model = algorithm.model
    algorithm.initialize(train_loader)
    for epoch in range(epochs):
        for x, y in train_loader:
            loss = cross_entropy(model(x), y) + algorithm.loss()
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            algorithm.scheduler.step()
        algorithm.scheduler.epoch_step()
    algorithm.export_model("model.onnx")

Kozlov et al. 2020, arXiv:2002.08679, appendix A. What each call does to the Session behind it:

- `initialize(loader)` makes it; `on_epoch_begin(0)`, `on_minibatch_begin(0, 0)`.
- `loss()`: the terms that `before_backward_pass` would add.
- `scheduler.step()`: `before_parameter_optimization`, `on_minibatch_end`, and unless the epoch is
  over `on_minibatch_begin` of the next.
- `scheduler.epoch_step()`: `on_epoch_end`, then `on_epoch_begin` and `on_minibatch_begin` of the
  next epoch.
- `export_model(path)`: `finish`.

`before_parameter_optimization` thus comes after `optimizer.step()`: the gates of RB sparsity, which
have an optimizer of their own, step right after the network, on gradients of the same mini-batch.
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from gracile import registry
from gracile.benchmark.runtimes.base import load as load_artifact
from gracile.core.result import Result
from gracile.errors import UserError
from gracile.export import parity
from gracile.recipe.build import build
from gracile.recipe.document import Document
from gracile.recipe.nncf import convert_document
from gracile.recipe.nncf.grammar import InputInfo, read
from gracile.train.session import Session

NAME = "<nncf config>"


@functools.cache
def patch_torch_operators() -> None:
    """Do nothing, and say so once: gracile follows the network without changing torch."""
    warnings.warn(
        "patch_torch_operators() does nothing here: torch stays as it is, and the call may go.",
        stacklevel=2,
    )


def create_compression_algorithm(
    model: nn.Module, config: Mapping[str, Any], *, epochs: int | None = None
) -> "CompressionAlgorithm":
    """What compresses a model as a configuration of NNCF says.

    Args:
        model: the network, weights loaded; it is trained in place.
        config: the legacy configuration, as a dict; of the keys at its root that are a script's
            own only `epochs` is used, rates and optimizer stay the script's.
        epochs: length of training, where the configuration does not say; default the shortest in
            which all schedules end.

    Warns:
        UserWarning: for each thing that is different from NNCF.

    Raises:
        RecipeError: an unknown name, or something that this version has not.
    """
    return CompressionAlgorithm(model, config, epochs)


class CompressedModel(nn.Module):
    """The network under one name, whatever stands behind it (`module`) at the time.

    Quantization puts a captured graph in the network's place; parameters stay the same objects, so
    optimizers and wrappers made before stay valid. Names in a state_dict begin with `module.`.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network computes now."""
        return self.module(*args, **kwargs)


class Scheduler:
    """Where the script says how far it is; both calls come after what they are named for."""

    def __init__(self, algorithm: "CompressionAlgorithm"):
        self._of = algorithm

    def step(self) -> None:
        """Call after each iteration.

        Raises:
            UserError: more iterations than the loader has batches.
        """
        s = self._of.session
        epoch, batch, steps = s.epoch_number, s.batch, s.steps
        if batch >= steps:
            raise UserError(
                f"scheduler.step() was called for a mini-batch {batch + 1} of an epoch of {steps}: "
                "call scheduler.epoch_step() after each epoch."
            )
        s.before_parameter_optimization(epoch, batch, steps)
        s.on_minibatch_end(epoch, batch, steps)
        if batch + 1 < steps:
            s.on_minibatch_begin(epoch, batch + 1, steps)
        else:
            s.batch = steps
        self._of.follow()

    def epoch_step(self) -> None:
        """Call after each epoch."""
        s = self._of.session
        s.on_epoch_end(s.epoch_number)
        self._of.begin(s.epoch_number + 1)


class CompressionAlgorithm:
    """Method, loss and scheduler of all algorithms of one configuration.

    Attributes:
        model: to be trained and called; the same object all the time.
        scheduler: to be told of each iteration and epoch.
        optimizer: of the script. Set it before `initialize` where channels are cut in training
            (`pruning_flops_target`, `learned_ranking`); everything else works without it.
        loss_of: (outputs, labels) -> the task's loss. Set it before `initialize` for
            `learned_ranking`, which judges candidates by it.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any], epochs: int | None):
        data = _plain(config)
        aware = data.pop("accuracy_aware_training", None)
        document = Document(NAME, data)
        plain, told = convert_document(document, epochs=epochs, model_names=model)
        if plain["train"]["epochs"] == 0:  # the script has a loop
            plain, told = convert_document(document, epochs=1, model_names=model)
        if aware is not None:
            told.append(f"{NAME}: accuracy_aware_training is left out: the loop is the script's.")
        for text in told:
            warnings.warn(text, stacklevel=3)
        self.recipe = build(
            train={"epochs": plain["train"]["epochs"]},
            data=plain.get("data"),
            methods=plain["methods"],
        )
        self.inputs = read(document).input_info
        self.model = CompressedModel(model)
        self.scheduler = Scheduler(self)
        self.optimizer: torch.optim.Optimizer | None = None
        self.loss_of: Callable[[Any, Tensor], Tensor] | None = None
        self._session: Session | None = None
        self._result: Result | None = None
        self._real: Tensor | None = None  # a batch to prove the exported file on

    @property
    def session(self) -> Session:
        """The Session behind it.

        Raises:
            UserError: before `initialize`.
        """
        if self._session is None:
            raise UserError("call initialize(train_loader) before the training loop.")
        return self._session

    def distributed(self) -> None:
        """Do nothing: ranks that train together are found by torch.distributed."""

    def initialize(self, loader: Iterable[Any]) -> None:
        """Bind the algorithms and begin the first epoch.

        Args:
            loader: training batches, (inputs, labels), whose length is that of an epoch; the first
                ones set ranges and statistics.

        Raises:
            BindError: the configuration does not fit the network.
        """
        used = {e.method for e in self.recipe.methods.values()}
        if used & {"structure", "legr"} and self.optimizer is None:
            what = "learned_ranking" if "legr" in used else "pruning_flops_target"
            raise UserError(
                f"{what} cuts channels in training, and the optimizer's state with "
                "them: set algorithm.optimizer = optimizer before initialize()."
            )
        if "legr" in used and self.loss_of is None:
            raise UserError(
                "learned_ranking judges candidates by the task's loss: set algorithm.loss_of = "
                "torch.nn.functional.cross_entropy before initialize()."
            )
        if not isinstance(loader, Sized):
            raise UserError("initialize() needs a loader with a length, one epoch of training.")
        first = next(iter(loader))
        self._real = first[0] if isinstance(first, (tuple, list)) else first
        device = next(self.model.parameters()).device
        made = tuple(_filled(info).to(device) for info in self.inputs) or (
            self._real[:2].to(device),
        )
        self._session = Session(
            self.model.module,
            self.recipe,
            self.optimizer,
            example=made if len(made) > 1 else made[0],
            steps_per_epoch=len(loader),
            calibration=_Samples(loader, int(self.recipe.data.calibration)),
            loss_of=self.loss_of,
        )
        self.begin(0)

    def loss(self) -> Tensor:
        """What to add to the task's loss, for the mini-batch that was computed last.

        A scalar; 0 if nothing is to be added.
        """
        s = self.session
        total = torch.zeros((), device=s.device)
        for m in s.methods:
            for name, term in m.on_loss(s).items():
                s.terms[name] = float(term.detach())
                total = total + term
        return total

    def export_model(self, path: str | Path) -> None:
        """Finish, and write the compressed network as ONNX, proven to compute the same.

        The first call ends the compression; `model` is then the finished network.

        Raises:
            GracileError: training ended before the schedules did.
            ParityError: the file does not compute what the network does.
        """
        result, path, example = self.result, Path(path), self.session.example
        inputs = example if isinstance(example, tuple) or self._real is None else self._real
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as folder:
            artifact = registry.get("exporter", "onnxruntime").obj(
                result.model,
                result.plan,
                result.tensors,
                example=example,
                path=Path(folder),
                metadata={},
            )
            report = parity.check(
                result.model, load_artifact(artifact), inputs, precision=artifact.precision
            )
            parity.require(report, result.plan)
            os.replace(artifact.path, path)

    @property
    def result(self) -> Result:
        """Model, Plan, ledger and tensors; asking for it ends the compression."""
        if self._result is None:
            self._result = self.session.finish()
            self.model.module = self._result.model
        return self._result

    def statistics(self) -> dict[str, Any]:
        """How far the compression is.

        Returns:
            `epoch`; `sparsity`: share of zeros of each weight, as the network sees it right now;
            `levels`: the last value of each curve; `loss`: the terms of the last `loss()`.
        """
        s = self.session
        names = [name for name, p in s.model.named_parameters() if p.dim() > 1]
        with torch.no_grad():
            zero = {name: s.overlays.effective(name) == 0 for name in names}
        return {
            "epoch": s.epoch_number,
            "sparsity": {name: float(z.float().mean()) for name, z in zero.items()},
            "levels": {name: curve[-1][1] for name, curve in s.history.items()},
            "loss": dict(s.terms),
        }

    def begin(self, epoch: int) -> None:
        """Begin an epoch and its first mini-batch."""
        s = self.session
        s.on_epoch_begin(epoch)
        s.on_minibatch_begin(epoch, 0, s.calendar.steps or 0)
        self.follow()

    def follow(self) -> None:
        """Put the Session's network behind `model`."""
        self.model.module = self.session.model


class _Samples:
    """The first batches of a loader, as many as so many samples need."""

    def __init__(self, loader: Iterable[Any], count: int):
        self.loader, self.count = loader, count

    def __iter__(self) -> Iterator[Any]:
        left = self.count
        for item in self.loader:
            yield item
            left -= len(item[0] if isinstance(item, (tuple, list)) else item)
            if left <= 0:
                return


def _filled(info: InputInfo) -> Tensor:
    """An input as `input_info` describes it, two samples at least."""
    shape = (max(2, info.sample_size[0]), *info.sample_size[1:])
    dtype = torch.long if info.type == "long" else torch.float32
    if info.filler == "random" and dtype == torch.float32:
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return (
        torch.zeros(shape, dtype=dtype)
        if info.filler == "zeros"
        else torch.ones(shape, dtype=dtype)
    )


def _plain(value: Any) -> Any:
    """Dictionaries and lists of their own kinds (a configuration object's) as plain ones."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
