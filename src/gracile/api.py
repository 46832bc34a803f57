"""The public names: few verbs, plain types in, one result out.

result = gracile.compress(model, "recipe.yaml", train=loader, example=torch.zeros(2, 3, 32, 32))
result.plan.save("plan.json")
artifact = gracile.export(result, "onnxruntime", "out/", example=x)
records = gracile.benchmark({"dense": dense_artifact, "small": artifact}, threads=1)
"""

import argparse
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gracile.analyze.comparison import compare_models
from gracile.benchmark.artifact import Artifact
from gracile.benchmark.runtimes.base import load as load_artifact
from gracile.benchmark.side_by_side import side_by_side
from gracile.core.plan import Architecture, Plan
from gracile.core.record import Record
from gracile.core.result import Result
from gracile.data.sets import open_data
from gracile.errors import GracileError, UserError
from gracile.export import parity
from gracile.export.cascade import exported
from gracile.graph.capture import capture
from gracile.graph.dependency import channel_groups
from gracile.models.spec import architecture_sha
from gracile.models.spec import resolve as resolve_model
from gracile.recipe.load import load as load_recipe
from gracile.recipe.patch import with_overrides
from gracile.recipe.schema import Recipe
from gracile.train.accuracy_aware import AccuracyAware
from gracile.train.activations import activations
from gracile.train.applied import apply_plan
from gracile.train.checkpoint import load_model, save_model
from gracile.train.loop import fit, make_optimizer
from gracile.train.preflight import preflight
from gracile.train.sensitivity import sensitivity
from gracile.train.session import Session
from gracile.train.structure import prune_channels
from gracile.train.tuning import Repeated, length_of

__all__ = [
    "Artifact",
    "GracileError",
    "Plan",
    "Recipe",
    "Record",
    "Result",
    "Session",
    "activations",
    "add_arguments",
    "apply_plan",
    "benchmark",
    "capture",
    "channel_groups",
    "compare_models",
    "compress",
    "export",
    "finish",
    "load_model",
    "load_recipe",
    "open_data",
    "preflight",
    "prune_channels",
    "recipe_from",
    "resolve_model",
    "save_model",
    "sensitivity",
    "session_from",
]


def compress(
    model: nn.Module,
    recipe: Recipe | str | Path,
    *,
    example: Tensor,
    train: Iterable[Any] | None = None,
    val: Iterable[Any] | None = None,
    calibration: Iterable[Any] | None = None,
    profile: str = "portable",
    progress: bool = False,
    teachers: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Result:
    """Compress a model as a recipe says, with your own data loaders.

    Args:
        model: trained further in place (a copy of it, if the recipe has `accuracy`); the result
            holds the compressed one.
        recipe: a Recipe or the path of one.
        example: an input batch of at least 2 samples, on the model's device.
        train: sized loader of (input, label); needed if the recipe trains.
        val: loader of (input, label) for the curves, and for what in the recipe goes by accuracy.
        calibration: batches of inputs, or of (input, label), all of them used; default so many
            images of `train` as the recipe's `data.calibration` says.
        profile: the quantizer profile of the target runtime.
        progress: show a progress bar on stderr.
        teachers: name -> network that `distill` entries may learn from by this name; frozen.

    Returns:
        Model, Plan, ledger and tensors; save them with `save_model(folder, result)`.

    Raises:
        UserError: the recipe needs data that is not given.
        RecipeError, BindError, PlanConflict: before any training.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if recipe.train.epochs and train is None:
        raise UserError(f"the recipe trains {recipe.train.epochs} epochs: pass train=<loader>.")
    batches = Repeated(train, example.device) if train is not None else None
    if calibration is None and train is not None:
        calibration = _First(train, recipe.data.calibration)

    validation = (lambda: val) if val is not None else None

    def started(model: nn.Module) -> Session:
        return Session(
            model,
            recipe,
            make_optimizer(model, recipe.train) if recipe.train.epochs else None,
            example=example,
            steps_per_epoch=len(batches) if batches is not None and recipe.train.epochs else None,
            calibration=calibration,
            profile=profile,
            architecture=Architecture(name=type(model).__name__, sha256=architecture_sha(model)),
            loss_of=cross_entropy,
            val=validation,
            train=batches,
            teachers=teachers,
            numbered=False,
        )

    if not recipe.train.epochs or batches is None:
        return started(model).finish()
    if recipe.accuracy is not None:
        session = AccuracyAware(
            lambda: started(copy.deepcopy(model)), batches, val=validation, progress=progress
        ).fit()
    else:
        session = started(model)
        fit(session, batches, val=validation, progress=progress)
    return session.finish()


def export(
    result: Result | nn.Module,
    runtime: str,
    path: str | Path,
    *,
    example: Tensor | tuple[Tensor, ...],
    inputs: Tensor | tuple[Tensor, ...] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Artifact:
    """Write an artifact for a runtime and prove that it computes what the model computes.

    Args:
        result: what `compress` or `Session.finish` returned, or a plain module.
        runtime: a registered runtime, see `gracile list runtime`; ``NAME:DEVICE`` checks it there.
        path: folder for the files.
        example: an input batch (or tuple of inputs) of at least 2 samples.
        inputs: real inputs for the parity check; default `example`.
        metadata: written into the file and given back by its Artifact.

    Raises:
        ParityError: names the first layer that differs.
    """
    if isinstance(result, nn.Module):
        result = Result(result.eval(), Plan(architecture=Architecture(name=type(result).__name__)))
    name, _, device = runtime.partition(":")
    artifact = exported(
        name, result.model, result.plan, result.tensors, example=example, path=Path(path),
        metadata=dict(metadata or {}),
    )  # fmt: skip
    options: dict[str, Any] = {"module": result.model} if name == "pytorch" else {}
    loaded = load_artifact(artifact, device=device or "CPU", **options)
    parity.require(
        parity.check(result.model, loaded, example if inputs is None else inputs), result.plan
    )
    return artifact


def benchmark(
    artifacts: Artifact | Sequence[Artifact] | Mapping[str, Artifact],
    *,
    threads: int = 1,
    hint: str = "f32",
    batch: int = 1,
    rounds: int = 9,
    layers: bool = False,
    streams: int | None = None,
    memory: bool = False,
    device: str = "CPU",
) -> list[Record]:
    """Measure artifacts side by side; ratios are to the first.

    Args:
        artifacts: one, several, or name -> artifact.
        threads: computing threads of the runtime.
        hint: precision hint for all: f32, bf16 or f16.
        batch: images per inference.
        rounds: interleaved rounds, at least 5.
        layers: also the time of each layer, by the runtime's own counters.
        streams: also the throughput of so many inferences at once; None: not.
        memory: also the peak of memory; artifacts that are whole files only.
        device: of the runtime, or for "pytorch" a form: "compile", "sparse", "x86", "qnnpack".

    Returns:
        Records: `latency_ms` and `artifact_bytes` of each, `drift`, `speedup` of all but the first;
        with `layers` `operators_ms`, and `unit_ms` and `unit_speedup` of each unit; with `streams`
        `throughput` and `throughput_ratio`; with `memory` `peak_memory` and `added_memory`.
    """
    if isinstance(artifacts, Artifact):
        artifacts = [artifacts]
    if not isinstance(artifacts, Mapping):
        artifacts = {f"{i}:{a.path.name}": a for i, a in enumerate(artifacts)}
    loaded = {
        k: load_artifact(a, threads=threads, hint=hint, device=device) for k, a in artifacts.items()
    }
    return side_by_side(
        loaded, rounds=rounds, batch=batch, layers=layers, streams=streams, memory=memory
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a training script of your own gracile's options: --recipe, --set, --runtime, --out."""
    group = parser.add_argument_group("gracile")
    group.add_argument("--recipe", metavar="FILE", required=True, help="compression recipe (YAML)")
    group.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a recipe value"
    )
    group.add_argument("--runtime", metavar="NAME", action="append", default=[])
    group.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/own"))


def recipe_from(args: argparse.Namespace) -> Recipe:
    """The recipe that the options of `add_arguments` name, overrides applied."""
    recipe = load_recipe(args.recipe)
    return with_overrides(recipe, args.set) if args.set else recipe


def session_from(
    args: argparse.Namespace,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    train: Iterable[Any],
    *,
    epochs: int | None = None,
) -> Session:
    """A Session for a training script of your own, from its options and its loader.

    Args:
        args: with the options of `add_arguments`.
        model: on the device it trains on; use `session.model` from here on.
        optimizer: the script's.
        train: sized loader of (input, label): gives the steps per epoch, the example batch and so
            many calibration images as the recipe's `data.calibration` says.
        epochs: how many the script will train; default the recipe's `train.epochs`.

    Raises:
        UserError: the loader has no length or no batch of two.
        RecipeError, BindError, PlanConflict: before any training.
    """
    recipe = recipe_from(args)
    profiles = {name.split(":")[0] for name in args.runtime} - {"pytorch"}
    return Session(
        model,
        recipe,
        optimizer,
        example=_example(train, next(model.parameters()).device),
        steps_per_epoch=length_of(train),
        epochs=epochs,
        calibration=_First(train, recipe.data.calibration),
        profile=profiles.pop() if len(profiles) == 1 else "portable",
        loss_of=cross_entropy,
        train=train,
    )


def finish(args: argparse.Namespace, session: Session, *, inputs: Tensor | None = None) -> Result:
    """Finish a session as a script's options say: saved in `--out`, exported for every `--runtime`.

    Args:
        args: with the options of `add_arguments`.
        session: trained to its end.
        inputs: real inputs for the parity checks; default the session's example batch.

    Returns:
        The result; its artifacts are in `--out`/export/RUNTIME.

    Raises:
        ParityError: an artifact does not compute what the model computes.
    """
    result = session.finish()
    save_model(args.out, result)
    for name in dict.fromkeys(name.split(":")[0] for name in args.runtime):
        export(result, name, args.out / "export" / name, example=session.example, inputs=inputs)
    return result


class _First:
    """The first images of a loader, in its batches, the last one cut to the count."""

    def __init__(self, loader: Iterable[Any], count: int | str):
        if isinstance(count, str):
            raise UserError(
                f"data.calibration: '{count}' names rows of a data set, and this one is your own "
                "loader: give a count in the recipe, or calibration=<batches>."
            )
        self.loader, self.count = loader, count

    def __iter__(self) -> Iterator[Tensor]:
        left = self.count
        for item in self.loader:
            x = item[0] if isinstance(item, (tuple, list)) else item
            yield x[:left]
            left -= len(x)
            if left <= 0:
                return


def _example(loader: Iterable[Any], device: torch.device) -> Tensor:
    x: Tensor = next(iter(loader))[0]
    if len(x) < 2:
        raise UserError(f"an example batch needs at least 2 samples, the loader gives {len(x)}.")
    return x[:2].to(device)
