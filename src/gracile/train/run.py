"""One whole compression run: dense, train, export, verify, measure; each stage survives a kill.

Each stage ends by writing its outcome in one step; a resumed run reads what is done and repeats
only the stage that was cut off, from the same seeds, so it ends with the same weights and Records.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gracile import registry
from gracile.analyze.cost import cost, totals
from gracile.analyze.ledger import Ledger
from gracile.benchmark.artifact import Artifact
from gracile.benchmark.runtimes.base import HINTS, parse_target
from gracile.benchmark.runtimes.base import load as load_artifact
from gracile.benchmark.timing import compare as time_side_by_side
from gracile.core.plan import Plan
from gracile.core.record import Record, RecordLog
from gracile.core.result import Result
from gracile.core.state import (
    derive_seed,
    sha256,
    write_atomic_with,
    write_json,
)
from gracile.data.bundle import DataBundle
from gracile.data.loader import Loader, calibration_batches
from gracile.data.sets import open_data
from gracile.errors import UserError
from gracile.export import parity
from gracile.export.onnx import saturation_warning
from gracile.graph.capture import capture
from gracile.models.spec import ModelSpec, load_weights, resolve
from gracile.recipe.load import load as load_recipe
from gracile.recipe.schema import Recipe
from gracile.train.bind import place
from gracile.train.checkpoint import load_model, load_state, read_tensors, save_model, save_state
from gracile.train.evaluate import agreement, predict, predict_module, score
from gracile.train.folder import begun, check_folder, opened, read_begun
from gracile.train.loop import bar, fit, make_optimizer, working
from gracile.train.outcome import kernel_counts, outcome, versions
from gracile.train.session import Session

EVAL_BATCH = 250
CALIBRATION_BATCH = 50
PARITY_SAMPLES = 64
ROUNDS = 9


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


def run(job: Job, *, resume: bool = False) -> dict[str, Any]:
    """Do the whole job and return `result.json` (CONTRACTS: the `--json` object).

    Raises:
        UserError: bad input, or `out` holds another run.
        VerificationError, ParityError: a proof failed.
    """
    work = _Run(job)
    check_folder(job.out, work.identity(), job.recipe, resume=resume)
    if not begun(job.out):
        work.check_runtimes()
    with opened(job.out, work.identity(), job.recipe):
        return work.whole()


def check(jobs: Iterable[Job], *, resume: bool = False) -> None:
    """Refuse what any of several jobs would refuse, before the first one runs.

    Raises:
        UserError: the first job that does not bind, or whose directory it may not write to.
    """
    for job in jobs:
        work = _Run(job)
        check_folder(job.out, work.identity(), job.recipe, resume=resume)


def bind(job: Job) -> Session:
    """Bind a recipe to model and data without running or writing anything."""
    return _Run(job).session


def export_only(
    model: str, runtime: str, out: Path, *, weights: Path | None, data: str
) -> dict[str, Any]:
    """Export a finished run, or a plain model, and prove the artifact."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "result.json").exists():
            raise UserError(f"{folder}: not a finished run (result.json); go on with --resume.")
        if weights is not None:
            raise UserError(f"--weights: the run in {folder} has its own; leave it out.")
        old = read_begun(folder)["identity"]
        job = Job(
            model=old["model"],
            data=old["data"],
            out=folder,
            recipe=load_recipe(folder / "recipe.yaml"),
        )
        done = _Run(job)
        result = done.result()
    else:
        recipe = Recipe.model_validate({"recipe": 1})
        done = _Run(Job(model=model, data=data, recipe=recipe, out=out, weights=weights))
        result = done.dense_result()
    artifact = done._exported(runtime, result, out)
    loaded = done._load(runtime, artifact, result.model)
    report = parity.check(result.model, loaded, done._parity_inputs(), precision=artifact.precision)
    parity.require(report)
    return {"artifact": artifact.to_dict(), "parity": report.to_dict()}


class _Run:
    def __init__(self, job: Job):
        self.job = job
        self.out = job.out
        self.state = job.out / "state"
        for r in job.runtimes:
            parse_target(r)
        if job.hint not in HINTS:
            raise UserError(f"--hint must be one of {', '.join(HINTS)}, got '{job.hint}'.")
        if job.hint not in HINTS:
            raise UserError(f"--hint must be one of {', '.join(HINTS)}, got '{job.hint}'.")
        self.bundle = _open_data(job)
        self.device = _device(job.device)
        self.spec = self._fresh()  # refuses bad models and weights before anything is written
        self.session = self._session()  # refuses recipes that do not bind

    # ------------------------------------------------------------------ stages

    def whole(self) -> dict[str, Any]:
        """All stages, in order; those that are done already are read back."""
        self.records = RecordLog(self.out / "records.jsonl")
        dense = self.stage("dense", self.dense)
        trained = self.stage("finish", self.train_and_finish)
        compressed = self.stage("compressed", self.compressed)
        runtimes = {
            r: {
                "export": self.stage(f"export-{_slug(r)}", partial(self.export, r)),
                "evaluate": self.stage(f"evaluate-{_slug(r)}", partial(self.evaluate, r)),
                "benchmark": self.stage(f"benchmark-{_slug(r)}", partial(self.benchmark, r)),
            }
            for r in self.job.runtimes
        }
        result = outcome(
            self.job.recipe.goal,
            dense=dense,
            trained=trained,
            compressed=compressed,
            runtimes=runtimes,
            facts=self._about(),
        )
        write_json(self.out / "result.json", result)
        return result

    def stage(self, name: str, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a stage once; its outcome on disk marks it done."""
        path = self.state / "stages" / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())  # type: ignore[no-any-return]
        self.job.say(name.replace("-", ": ", 1))
        with working(name, self.job.progress and name.startswith(("export", "benchmark"))):
            value = do()
        write_json(path, value)
        return value

    def dense(self) -> dict[str, Any]:
        """Score the original model."""
        model = self.session.model
        out = self._scores(model, "dense")
        cost_row = totals(model, capture(model, self.session.example))
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        out |= {"macs": cost_row.macs, "params": cost_row.params, "bytes": size}
        self._record("macs", cost_row.macs, "count", model="dense")
        self._record("params", cost_row.params, "count", model="dense")
        return out

    def train_and_finish(self) -> dict[str, Any]:
        """Train from the last saved epoch, finish, and write the compressed model."""
        s, recipe = self.session, self.job.recipe
        at, start = self.state / "session.safetensors", 0
        if at.exists():
            saved = load_state(at, self.device)
            start = int(saved["next_epoch"])
            s.load_state_dict(saved["session"])
        if start < s.epochs:
            fit(
                s,
                self._train_loader(),
                val=lambda: self._batches("val"),
                start=start,
                after_epoch=lambda e: self._save(at, e + 1),
                progress=self.job.progress,
            )
        s.epoch_number, s.batch = s.epochs, 0
        s.changed = False
        result = s.finish()
        if s.changed:
            now = score(*predict_module(result.model, self._batches("val")))
            for key, value in (("top1", now.top1), ("top5", now.top5), ("loss", now.loss)):
                if value is not None:
                    s.track(f"val_{key}_cut", value)
        save_model(self.out, result)
        result.ledger.save(self.out / "ledger.json")
        write_json(self.out / "history.json", {"curves": s.history})
        return {"warnings": result.warnings, "cut": _worst_cut(s.history), "recipe": recipe.sha}

    def compressed(self) -> dict[str, Any]:
        """Score the compressed model in PyTorch, next to the original."""
        result = self.result()
        out = self._scores(result.model, "compressed")
        graph = capture(result.model, self._example())
        row = totals(result.model, graph)
        out |= {"macs": row.macs, "params": row.params}
        out["bytes"] = _stored_bytes(result.model, result.plan)
        self._record("macs", row.macs, "count", model="compressed")
        self._record("params", row.params, "count", model="compressed")
        out["layers"] = self._layers(result)
        dense, _ = read_tensors(self.state / "predictions-dense.safetensors")
        mine, _ = read_tensors(self.state / "predictions-compressed.safetensors")
        out["agreement"] = agreement(dense["test"], mine["test"], dense["labels"]).to_dict()
        return out

    def export(self, runtime: str) -> dict[str, Any]:
        """Export original and compressed model and prove that they compute the same."""
        out: dict[str, Any] = {"warnings": []}
        for which, result in (("dense", self.dense_result()), ("compressed", self.result())):
            folder = self.out / "export" / _slug(runtime) / which
            artifact = self._exported(runtime, result, folder)
            loaded = self._load(runtime, artifact, result.model)
            report = parity.check(
                result.model, loaded, self._parity_inputs(), precision=artifact.precision
            )
            parity.require(report)
            self._record(
                "parity_max_abs", report.max_abs, "logit", model=which, runtime=runtime,
                artifact=artifact,
            )  # fmt: skip
            out[which] = {"artifact": artifact.to_dict(), "parity": report.to_dict()}
            kernels = loaded.kernels()
            out[which]["kernels"] = kernel_counts(kernels)
            out[which]["kernel_rows"] = [vars(k) for k in kernels]
            danger = saturation_warning(artifact.precision)
            if danger is not None:
                out["warnings"].append(["saturation", f"{runtime}: {danger}"])
        return out

    def evaluate(self, runtime: str) -> dict[str, Any]:
        """Accuracy of both artifacts in the runtime itself, on the test split."""
        logits: dict[str, Tensor] = {}
        labels = torch.empty(0)
        out: dict[str, Any] = {}
        for which in ("dense", "compressed"):
            artifact, loaded = self._reload(runtime, which)
            logits[which], labels = predict(
                partial(_first_output, loaded), self._batches("test", show=True)
            )
            result = score(logits[which], labels)
            out[which] = result.to_dict()
            self._score_records(result, which, "test", runtime=runtime, artifact=artifact)
        both = agreement(logits["dense"], logits["compressed"], labels)
        out["agreement"] = both.to_dict()
        self._record("agreement", both.share, "share", model="compressed", runtime=runtime,
                     split="test")  # fmt: skip
        self._record("mcnemar_p", both.mcnemar_p, "p", model="compressed", runtime=runtime,
                     split="test")  # fmt: skip
        return out

    def benchmark(self, runtime: str) -> dict[str, Any]:
        """Time both artifacts side by side."""
        loaded = {which: self._reload(runtime, which)[1] for which in ("dense", "compressed")}
        found = time_side_by_side(loaded, rounds=ROUNDS, batch=self.job.batch)
        found = [r.about(**self._facts(r.subject.get("model", ""))) for r in found]
        self.records.add(*found)
        latency = {r.subject["model"]: r for r in found if r.metric == "latency_ms"}
        ratio = next(r for r in found if r.metric == "speedup")
        size = {w: self._reload(runtime, w)[0].size_bytes for w in ("dense", "compressed")}
        for which, n in size.items():
            self._record("artifact_bytes", n, "bytes", model=which, runtime=runtime)
        return {
            "latency_ms": {k: r.value for k, r in latency.items()},
            "latency": {k: r.to_dict() for k, r in latency.items()},
            "speedup": {"ratio": ratio.value, "ci95": list(ratio.ci95 or ())},
            "bytes": size,
            "warnings": [
                ["drift", f"{runtime}: timings drifted during the measurement; measure again."]
                for r in found
                if r.metric == "drift" and r.value
            ],
        }

    # ------------------------------------------------------------------ pieces

    def result(self) -> Result:
        """The finished compressed model, read back from its files: what ships is what is judged."""
        if not hasattr(self, "_result"):
            loaded = load_model(self.out, self._example(), factory=self._fresh)
            self._result = Result(model=loaded.model, plan=loaded.plan, tensors=loaded.tensors)
        return self._result

    def dense_result(self) -> Result:
        """The original model with an empty Plan."""
        if not hasattr(self, "_dense"):
            spec = self._fresh()
            self._dense = Result(model=spec.model.eval(), plan=Plan(architecture=spec.architecture))
        return self._dense

    def _fresh(self) -> ModelSpec:
        """The original model; without a weights file, initialized from the recipe's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.job.recipe.seed, "init"))
            spec = resolve(self.job.model, num_classes=self.bundle.classes)
        if self.job.weights is not None:
            load_weights(spec.model, self.job.weights)
        return spec

    def _session(self) -> Session:
        recipe = self.job.recipe
        model = self.spec.model.to(self.device)
        train = recipe.train
        loader = self._train_loader()
        return Session(
            model,
            recipe,
            make_optimizer(model, train) if train.epochs else None,
            example=self._example().to(self.device),
            steps_per_epoch=len(loader) if train.epochs else None,
            calibration=_Calibration(self.bundle),
            profile=self._profile(),
            architecture=self.spec.architecture,
        )

    def _profile(self) -> str:
        names = {r.split(":")[0] for r in self.job.runtimes} - {"pytorch"}
        return names.pop() if len(names) == 1 else "portable"

    def _train_loader(self) -> Loader:
        train = self.job.recipe.train
        return self._loader(
            self.bundle.train,
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

    def _batches(self, split: str, show: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        loader = self._loader(getattr(self.bundle, split), EVAL_BATCH)
        with bar(f"scoring {split}", len(loader), show=show and self.job.progress) as advance:
            for batch in loader:
                yield batch
                advance("")

    def _example(self) -> Tensor:
        x, _ = next(iter(self._loader(self.bundle.train, 2)))
        return x.cpu()

    def _parity_inputs(self) -> Tensor:
        x, _ = next(iter(self._loader(self.bundle.test, PARITY_SAMPLES)))
        return x.cpu()

    def _save(self, path: Path, next_epoch: int) -> None:
        save_state(path, {"next_epoch": next_epoch, "session": self.session.state_dict()})

    def _scores(self, model: nn.Module, which: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        kept: dict[str, Tensor] = {}
        model = model.to(self.device)
        for split in ("val", "test"):
            logits, labels = predict_module(model, self._batches(split, show=True))
            result = score(logits, labels)
            out[split] = result.to_dict()
            kept[split] = logits
            kept["labels" if split == "test" else "val_labels"] = labels
            self._score_records(result, which, split)
        write_atomic_with(
            self.state / f"predictions-{which}.safetensors", lambda tmp: save_file(kept, tmp)
        )
        return out

    def _score_records(
        self, result: Any, which: str, split: str, runtime: str | None = None,
        artifact: Artifact | None = None,
    ) -> None:  # fmt: skip
        for metric, value, unit in (
            ("top1", result.top1, "share"), ("top5", result.top5, "share"),
            ("loss", result.loss, "nats"),
        ):  # fmt: skip
            if value is not None:
                self._record(metric, value, unit, model=which, split=split, n=result.n,
                             runtime=runtime, artifact=artifact)  # fmt: skip

    def _record(
        self, metric: str, value: float, unit: str, *, model: str, artifact: Artifact | None = None,
        runtime: str | None = None, **facts: Any,
    ) -> None:  # fmt: skip
        subject = {"model": model} | ({"artifact_sha": artifact.sha} if artifact else {})
        record = Record(
            metric, float(value), unit, subject=subject, runtime=runtime or "pytorch", **facts
        )
        self.records.add(record.about(**self._facts(model)))

    def _facts(self, which: str) -> dict[str, Any]:
        return {
            "seed": self.job.recipe.seed,
            "recipe_sha": self.job.recipe.sha,
            "data_sha": self.bundle.sha,
            "versions": versions(),
        }

    def _about(self) -> dict[str, Any]:
        """What the result says of the run itself."""
        ledger = Ledger.load(self.out / "ledger.json")
        return {
            "out": str(self.out),
            "ledger": {"shares": ledger.shares()},
            "data": {
                "name": self.bundle.name,
                "spec": self.bundle.spec,
                "splits": dict(self.bundle.notes),
            },
            "measurement": {
                "threads": self.job.threads,
                "precision_hint": self.job.hint,
                "batch": self.job.batch,
                "rounds": ROUNDS,
            },
            "versions": versions(),
            "seed": self.job.recipe.seed,
            "command": self.job.command,
            "records": str(self.out / "records.jsonl"),
        }

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

    def _exported(self, runtime: str, result: Result, folder: Path) -> Artifact:
        exporter = registry.get("exporter", parse_target(runtime)[0]).obj
        return exporter(  # type: ignore[no-any-return]
            result.model,
            result.plan,
            result.tensors,
            example=self._example(),
            path=folder,
            metadata=self._metadata(result.plan),
        )

    def _load(self, runtime: str, artifact: Artifact, model: nn.Module) -> Any:
        name, device = parse_target(runtime)
        options: dict[str, Any] = {"module": model} if name == "pytorch" else {}
        return load_artifact(
            artifact, threads=self.job.threads, hint=self.job.hint, device=device, **options
        )

    def _reload(self, runtime: str, which: str) -> tuple[Artifact, Any]:
        path = self.state / "stages" / f"export-{_slug(runtime)}.json"
        artifact = Artifact.from_dict(json.loads(path.read_text())[which]["artifact"])
        result = self.dense_result() if which == "dense" else self.result()
        return artifact, self._load(runtime, artifact, result.model)

    def _layers(self, result: Result) -> list[dict[str, Any]]:
        dense = self.dense_result().model
        before = {r.id: r for r in cost(dense, capture(dense, self._example()))}
        after = {r.id: r for r in cost(result.model, capture(result.model, self._example()))}
        bits = {e.at: e.bits for e in result.plan.of_kind("bits") if e.role == "weight"}
        rows = []
        for id, row in before.items():
            if row.weight is None or row.op not in ("conv", "linear", "conv_transpose"):
                continue
            new = after.get(id)
            weight = result.model.get_parameter(row.weight) if new else None
            rows.append(
                {
                    "id": id,
                    "op": row.op,
                    "channels_before": dense.get_parameter(row.weight).shape[0],
                    "channels_after": weight.shape[0] if weight is not None else 0,
                    "bits": bits.get(row.weight, 32),
                    "sparsity": float((weight == 0).double().mean()) if weight is not None else 1.0,
                    "macs_before": row.macs,
                    "macs_after": new.macs if new else 0,
                }
            )
        return rows

    def check_runtimes(self) -> None:
        """Export the original and load it in every runtime, in a folder that is thrown away.

        What could not be there at the end, a runtime that is not installed, a device it does not
        have, a network it cannot take, is refused before anything is written or trained.
        """
        dense = self.dense_result()
        for runtime in self.job.runtimes:
            self.job.say(f"check: {runtime}")
            with TemporaryDirectory() as folder:
                artifact = self._exported(runtime, dense, Path(folder))
                self._load(runtime, artifact, dense.model)

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
        }


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


def _first_output(loaded: Any, x: Tensor) -> Any:
    return loaded.run(x)[0]


class _Calibration:
    """Calibration batches of the recipe, made anew for each pass."""

    def __init__(self, bundle: DataBundle):
        self.bundle = bundle

    def __iter__(self) -> Iterator[Tensor]:
        return (x for x, _ in calibration_batches(self.bundle, None, CALIBRATION_BATCH).batches(0))


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


def _slug(runtime: str) -> str:
    return runtime.replace(":", "-")


def _worst_cut(history: Mapping[str, list[tuple[float, float]]]) -> dict[str, float] | None:
    """Scores at the deepest point: right after that change which left the lowest top-1."""
    points = history.get("val_top1_cut", [])
    if not points:
        return None
    worst = min(range(len(points)), key=lambda i: points[i][1])
    return {
        k: history[f"val_{k}_cut"][worst][1]
        for k in ("top1", "top5", "loss")
        if f"val_{k}_cut" in history
    }


def _stored_bytes(model: nn.Module, plan: Plan) -> int:
    bits = {e.at: e.bits for e in plan.of_kind("bits") if e.role == "weight"}
    return sum(-(-p.numel() * bits.get(n, 32) // 8) for n, p in model.named_parameters())
