"""What a run finds out about early exits: the curve on validation data, rates, real times."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gracile.benchmark.inputs import measure_inputs
from gracile.benchmark.runtimes.base import Loaded
from gracile.benchmark.runtimes.cascade import Cascade
from gracile.core.record import Record
from gracile.early_exit.cascade import exit_macs
from gracile.early_exit.thresholds import as_arrays, curve, operate
from gracile.nn.exits import all_exits, choice_of
from gracile.train.evaluate import predict

INPUTS = 200  # validation images that artifacts are timed on
Batches = Iterable[tuple[Tensor, Tensor]]


def has_exits(model: nn.Module) -> bool:
    """Whether a model answers some inputs early."""
    return choice_of(model) is not None


def exit_facts(model: nn.Module, example: Tensor, val: Batches, test: Batches) -> dict[str, Any]:
    """What a network with exits does, in PyTorch.

    Args:
        model: of a Result, in eval mode.
        example: an input batch.
        val: labelled batches that the curve is of.
        test: those that the rates and accuracies are of.

    Returns:
        thresholds, temperatures; `macs` of an input that leaves at each exit, and at the end;
        `whole_macs` of the network without exits; on test data `rates`, `accuracy` of each exit if
        all inputs left there, and `mean_macs`; `curve`: what other thresholds would do on
        validation data, with the mean cost as a share of `whole_macs`.
    """
    choice = choice_of(model)
    assert choice is not None
    until, whole = exit_macs(model, example)
    costs = [macs / whole for macs in until]
    heats, at = choice.temperatures.tolist(), choice.thresholds.tolist()
    answers, labels = all_answers(model, test)
    entropies, right = as_arrays(answers, labels, heats)
    here = operate(entropies, right, costs, at)
    answers, labels = all_answers(model, val)
    found = curve(*as_arrays(answers, labels, heats), costs)
    return {
        "thresholds": at,
        "temperatures": heats,
        "macs": until,
        "whole_macs": whole,
        "rates": list(here.rates),
        "accuracy": right.mean(1).tolist(),
        "mean_macs": here.mean_cost * whole,
        "curve": [vars(point) for point in found],
    }


def all_answers(model: nn.Module, batches: Batches) -> tuple[list[Tensor], Tensor]:
    """Logits (N, C) of every exit, the final ones last, and labels (N,); on the CPU."""
    found: list[list[Tensor]] = []
    labels = []
    with torch.no_grad():
        for x, y in batches:
            found.append([a.float().cpu() for a in all_exits(model, x)])
            labels.append(y.cpu())
    return [torch.cat(parts) for parts in zip(*found, strict=True)], torch.cat(labels)


def evaluate_cascade(loaded: Cascade, batches: Batches) -> tuple[Tensor, Tensor, list[float]]:
    """Logits and labels in the runtime, and which share of the inputs left at each exit."""
    taken: list[Any] = []

    def answer(x: Tensor) -> Any:
        logits, where = loaded.answer(x)
        taken.append(where)
        return logits

    logits, labels = predict(answer, batches)
    every = np.concatenate(taken)
    return logits, labels, [float((every == k).mean()) for k in range(len(loaded.steps))]


def time_on_inputs(
    loaded: Mapping[str, Loaded], batches: Batches, *, rounds: int, count: int = INPUTS
) -> list[Record]:
    """Time artifacts on the first images of a data split, one by one; see `measure_inputs`."""
    images = (image[None] for x, _ in batches for image in x.cpu().numpy())
    return measure_inputs(loaded, list(islice(images, count)), rounds=rounds)
