"""A job, and what it works with from start to end: data, network, loaders, targets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gracile.benchmark.artifact import Artifact
from gracile.benchmark.runtimes.base import HINTS, parse_target
from gracile.benchmark.runtimes.base import load as load_artifact
from gracile.core.plan import Plan
from gracile.core.result import Result
from gracile.core.state import derive_seed, sha256
from gracile.data.bundle import DataBundle
from gracile.data.loader import Loader, calibration_batches
from gracile.data.sets import open_data
from gracile.errors import UserError
from gracile.export.cascade import check_runtime, exported
from gracile.models.spec import ModelSpec, load_weights, resolve
from gracile.recipe.schema import Recipe
from gracile.recipe.teachers import ORIGINAL, comes_trained
from gracile.train.bind import check_transfer, place
from gracile.train.loop import bar, make_optimizer
from gracile.train.outcome import versions
from gracile.train.session import Session

EVAL_BATCH = 250
CALIBRATION_BATCH = 50
PARITY_SAMPLES = 64


@dataclass(frozen=True)
class Job:
    """What the user asked for on the command line.

    Attributes:
        model: model spec; weights: file or None; data: data spec.
        runtimes: names, optionally `name:DEVICE`.
        threads: threads of the measured runtimes; hint: their precision hint, for both sides.
        device: where training runs.
    """

    model: str
    data: str
    recipe: Recipe
    out: Path
    weights: Path | None = None
    runtimes: tuple[str, ...] = ()
    threads: int = 1
    hint: str = "f32"
    batch: int = 1
    device: str = "cpu"
    progress: bool = True
    command: str = ""
    say: Callable[[str], None] = field(default=lambda text: None)


class Workplace:
    """What a job works with; making one refuses bad data, models, weights and recipes.

    Args:
        job: what was asked for.
        bind: have a session; a finished run needs none, nor the teachers it had.

    Raises:
        UserError: before anything is written.
    """

    def __init__(self, job: Job, *, bind: bool = True):
        self.job = job
        for r in job.runtimes:
            parse_target(r)
        if job.hint not in HINTS:
            raise UserError(f"--hint must be one of {', '.join(HINTS)}, got '{job.hint}'.")
        check_transfer(job.recipe)
        self.bundle = _open_data(job)
        self.device = _device(job.device)
        self.spec = self.fresh()
        self._bound = self._session() if bind else None
        if self._bound is not None:
            self._warn_of_an_untrained_teacher(self._bound)

    # ------------------------------------------------------------------ the network

    @property
    def session(self) -> Session:
        """The recipe, bound to the network and the data."""
        if self._bound is None:
            self._bound = self._session()
        return self._bound

    def fresh(self) -> ModelSpec:
        """The original model; without a weights file, initialized from the recipe's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.job.recipe.seed, "init"))
            spec = resolve(self.job.model, num_classes=self.bundle.classes)
        if self.job.weights is not None:
            load_weights(spec.model, self.job.weights)
        return spec

    @cached_property
    def dense_result(self) -> Result:
        """The original model with an empty Plan."""
        spec = self.fresh()
        return Result(model=spec.model.eval(), plan=Plan(architecture=spec.architecture))

    def renewed(self) -> Session:
        """A new session on the original network, in the place of the one before."""
        self.spec = self.fresh()
        self._bound = self._session()
        return self._bound

    def _warn_of_an_untrained_teacher(self, session: Session) -> None:
        entries = self.job.recipe.methods.values()
        learns = any(e.verb == "distill" and ORIGINAL in e.options.teacher for e in entries)
        if learns and self.job.weights is None and not comes_trained(self.job.model):
            session.warn(
                "untrained-teacher",
                "distillation learns from the original network, which has random weights: give "
                "--weights, or another teacher: {model: ..., weights: ...}.",
            )

    def _session(self) -> Session:
        recipe = self.job.recipe
        model = self.spec.model.to(self.device)
        train = recipe.train
        loader = self.train_loader()
        return Session(
            model,
            recipe,
            make_optimizer(model, train) if train.epochs else None,
            example=self.example().to(self.device),
            steps_per_epoch=len(loader) if train.epochs else None,
            calibration=_Calibration(self.bundle),
            profile=self._profile(),
            architecture=self.spec.architecture,
            loss_of=cross_entropy,
            val=partial(self.batches, "val"),
            train=loader,
            numbered=loader.augment == "none",
        )

    def _profile(self) -> str:
        names = {r.split(":")[0] for r in self.job.runtimes} - {"pytorch"}
        return names.pop() if len(names) == 1 else "portable"

    # ------------------------------------------------------------------ the data

    def train_loader(self) -> Loader:
        train = self.job.recipe.train
        return self._loader(
            self.bundle.transfer or self.bundle.train,
            train.batch_size,
            seed=self.job.recipe.seed,
            shuffle=True,
            augment=self.bundle.augmentation if train.augment == "auto" else train.augment,
        )

    def _loader(self, images: Any, batch_size: int, **options: Any) -> Loader:
        return Loader(
            images,
            batch_size,
            mean=self.bundle.mean,
            std=self.bundle.std,
            device=str(self.device),
            **options,
        )

    def batches(self, split: str, show: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        loader = self._loader(getattr(self.bundle, split), EVAL_BATCH)
        with bar(f"scoring {split}", len(loader), show=show and self.job.progress) as advance:
            for batch in loader:
                yield batch
                advance("")

    def example(self) -> Tensor:
        x, _ = next(iter(self._loader(self.bundle.train, 2)))
        return x.cpu()

    def parity_inputs(self) -> Tensor:
        x, _ = next(iter(self._loader(self.bundle.test, PARITY_SAMPLES)))
        return x.cpu()

    # ------------------------------------------------------------------ the targets

    def exported(self, runtime: str, result: Result, folder: Path) -> Artifact:
        return exported(
            parse_target(runtime)[0],
            result.model,
            result.plan,
            result.tensors,
            example=self.example(),
            path=folder,
            metadata=self._metadata(result.plan),
        )

    def load(self, runtime: str, artifact: Artifact, model: nn.Module) -> Any:
        name, device = parse_target(runtime)
        options: dict[str, Any] = {"module": model} if name == "pytorch" else {}
        return load_artifact(
            artifact, threads=self.job.threads, hint=self.job.hint, device=device, **options
        )

    def check_runtimes(self) -> None:
        """Export the original and load it in every runtime, in a folder that is thrown away.

        What could not be there at the end, a runtime that is not installed, a device it does not
        have, a network it cannot take, is refused before anything is written or trained.
        """
        dense = self.dense_result
        exits = any(e.verb == "early_exit" for e in self.job.recipe.methods.values())
        for runtime in self.job.runtimes if exits else ():
            check_runtime(parse_target(runtime)[0])
        for runtime in self.job.runtimes:
            self.job.say(f"check: {runtime}")
            with TemporaryDirectory() as folder:
                artifact = self.exported(runtime, dense, Path(folder))
                self.load(runtime, artifact, dense.model)

    def _metadata(self, plan: Plan) -> dict[str, str]:
        return {
            "gracile": versions()["gracile"],
            "model": self.job.model,
            "recipe_sha": self.job.recipe.sha,
            "plan_sha": sha256(plan.to_json()),
            "data": self.job.data,
            "data_sha": self.bundle.sha,
            "seed": str(self.job.recipe.seed),
            "torch": torch.__version__,
        }

    def identity(self) -> dict[str, Any]:
        """What the outcome depends on: a resumed run must have the same."""
        job = self.job
        return {
            "model": job.model,
            "model_code": _code_sha(job.model),
            "weights": sha256(job.weights.read_bytes()) if job.weights else None,
            "data": job.data,
            "recipe_sha": job.recipe.sha,
            "data_sha": self.bundle.sha,
            "runtimes": list(job.runtimes),
            "device": job.device,
            "threads": job.threads,
            "hint": job.hint,
            "batch": job.batch,
            **({"teachers": files} if (files := self._teachers()) else {}),
        }

    def _teachers(self) -> dict[str, str]:
        return self._bound.teachers.files if self._bound is not None else {}


def _open_data(job: Job) -> DataBundle:
    try:
        return open_data(job.data, recipe_data=job.recipe.data.model_dump(), seed=job.recipe.seed)
    except UserError as e:
        text = str(e)
        if not text.startswith("recipe: data."):
            raise
        key = text.removeprefix("recipe: data.").split(" ")[0].rstrip(":")
        where = place(job.recipe, "data", key)
        raise type(e)(f"{where}: {text.removeprefix('recipe: ')}") from None


def _code_sha(model: str) -> str | None:
    """Hash of the user's own file, where the model is from one (`net.py:factory`)."""
    path = Path(model.partition("?")[0].rpartition(":")[0])
    return sha256(path.read_bytes()) if path.suffix == ".py" else None


class _Calibration:
    """Calibration batches of the recipe, made anew for each pass."""

    def __init__(self, bundle: DataBundle):
        self.bundle = bundle

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return calibration_batches(self.bundle, None, CALIBRATION_BATCH).batches(0)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device must be cpu or cuda:i, got '{name}'.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: this machine (or this torch) has no CUDA device; use cpu."
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda:i, got '{name}'.")
    return device
