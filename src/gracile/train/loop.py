"""The training loop for those who do not bring their own: one session, one loader, all hooks."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F

from gracile.benchmark.processor import computes_bf16
from gracile.core.state import derive_seed
from gracile.distribute.collective import average_gradients
from gracile.errors import RecipeError, nearest
from gracile.recipe.schema import Train
from gracile.train.evaluate import predict_module, score
from gracile.train.session import Session
from gracile.train.tuning import Batches

AUTOCAST = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(model: nn.Module, train: Train) -> torch.optim.Optimizer:
    """The recipe's optimizer over all trainable parameters.

    Raises:
        RecipeError: an option the class does not have, named with the nearest.
    """
    spec = train.optimizer
    cls = getattr(torch.optim, spec.class_)
    known = [p for p in inspect.signature(cls).parameters if p != "params"]
    args = spec.arguments
    for key in args:
        if key not in known:
            raise RecipeError(
                f"train.optimizer: {spec.class_} has no '{key}'.{nearest(key, known)}"
            )
    return cls([p for p in model.parameters() if p.requires_grad], **args)  # type: ignore[no-any-return]


def fit(
    session: Session,
    loader: Batches,
    *,
    val: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None = None,
    start: int = 0,
    after_epoch: Callable[[int], bool | None] | None = None,
    progress: bool = True,
) -> None:
    """Train to the recipe's last epoch, driving the session's call-backs.

    Args:
        session: made with `steps_per_epoch=len(loader)` and an optimizer.
        loader: training mini-batches, already on the session's device.
        val: makes the validation batches; scored after each epoch and after each change a method
            makes at an epoch's start (curves `val_top1`, `val_top1_cut`).
        start: first epoch, for a resumed run.
        after_epoch: called with the epoch just ended; where state is saved. True ends training.
        progress: show a progress bar on stderr.
    """
    train, optimizer = session.recipe.train, session.optimizer
    assert optimizer is not None
    steps, accumulate = len(loader), train.accumulate
    if train.autocast == "bf16" and not _computes_bf16(session.device):
        session.warn(
            "autocast",
            "this device has no bfloat16 units, so autocast: bf16 takes several times as long as "
            "float32. Write autocast: auto.",
        )
    scaler = torch.amp.GradScaler(session.device.type, enabled=train.autocast == "fp16")
    with bar("training", session.epochs * steps, start * steps, progress) as advance:
        for epoch in range(start, session.epochs):
            torch.manual_seed(derive_seed(session.recipe.seed, "epoch", epoch))
            session.model.train()
            session.changed = False
            session.on_epoch_begin(epoch)
            if session.changed and val is not None:
                _track_score(session, val(), "_cut")
            totals: dict[str, float] = {}
            optimizer.zero_grad(set_to_none=True)
            samples = _samples(loader, epoch)
            for batch, (x, y) in enumerate(loader.batches(epoch)):
                session.on_minibatch_begin(epoch, batch, steps)
                session.model.train()
                if train.channels_last and x.dim() == 4:
                    x = x.contiguous(memory_format=torch.channels_last)
                with _autocast(session.device, train.autocast):
                    loss = F.cross_entropy(
                        session.model(x), y, label_smoothing=train.label_smoothing
                    )
                    loss = session.before_backward_pass(
                        epoch,
                        batch,
                        steps,
                        loss,
                        labels=y,
                        samples=None if samples is None else samples[batch],
                    )
                scaler.scale(loss / accumulate).backward()
                if (batch + 1) % accumulate == 0 or batch + 1 == steps:
                    scaler.unscale_(optimizer)
                    average_gradients(session.model)
                    session.before_parameter_optimization(epoch, batch, steps)
                    if train.clip_grad_norm is not None:
                        nn.utils.clip_grad_norm_(session.model.parameters(), train.clip_grad_norm)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=True)
                for name, value in {**session.terms, "total": float(loss.detach())}.items():
                    totals[name] = totals.get(name, 0.0) + value / steps
                session.on_minibatch_end(epoch, batch, steps)
                advance(f"epoch {epoch + 1}/{session.epochs} loss {float(loss.detach()):.3f}")
            metrics = {f"loss/{k}": v for k, v in totals.items()}
            metrics["lr"] = optimizer.param_groups[0]["lr"]
            if val is not None:
                result = score(*predict_module(session.model, val()))
                metrics |= {"val_top1": result.top1, "val_loss": result.loss}
            session.on_epoch_end(epoch, metrics)
            if after_epoch is not None and after_epoch(epoch):
                break


def _samples(loader: Batches, epoch: int) -> Sequence[Tensor] | None:
    """Which images each mini-batch has, of a loader that knows and does not change them."""
    known: Sequence[Tensor] | None = getattr(loader, "samples", lambda _: None)(epoch)
    return known


def _track_score(session: Session, batches: Iterable[tuple[Tensor, Tensor]], suffix: str) -> None:
    result = score(*predict_module(session.model, batches))
    for name, value in result.to_dict().items():
        if name != "n" and value is not None:
            session.track(f"val_{name}{suffix}", value)


def _autocast(device: torch.device, kind: str) -> Any:
    if kind == "none" or (kind == "auto" and not _computes_bf16(device)):
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[kind])


def _computes_bf16(device: torch.device) -> bool:
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else computes_bf16()


@contextmanager
def bar(
    title: str, total: int, done: int = 0, show: bool = True
) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr; yields `advance(text)`."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
    )
    show = show and console.is_terminal  # in a log file its frames are empty lines
    with Progress(*columns, console=console, disable=not show, transient=True) as p:
        task = p.add_task(title, total=total, completed=done)
        yield lambda text: p.update(
            task, advance=1, description=f"{title}: {text}" if text else title
        )


@contextmanager
def working(what: str, show: bool = True) -> Iterator[None]:
    """A spinner on stderr, for work whose length is not known beforehand."""
    if not show:
        yield
        return
    with Console(stderr=True).status(what):
        yield
