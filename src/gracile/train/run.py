"""One whole compression run: dense, train, export, verify, measure; each stage survives a kill.

Each stage ends by writing its outcome in one step; a resumed run reads what is done and repeats
only the stage that was cut off, from the same seeds, so it ends with the same weights and Records.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gracile.analyze.cost import Totals, totals
from gracile.analyze.layers import layer_rows, stored_bytes
from gracile.analyze.ledger import Ledger
from gracile.benchmark.artifact import Artifact
from gracile.benchmark.runtimes.cascade import Cascade
from gracile.benchmark.timing import compare as time_side_by_side
from gracile.core.record import Record, RecordLog
from gracile.core.result import Result
from gracile.core.state import write_atomic_with, write_json
from gracile.errors import UserError
from gracile.export import parity
from gracile.graph.capture import capture
from gracile.quantize.profile import dynamic_warning
from gracile.quantize.ranges import NAME as RANGES
from gracile.quantize.ranges import save_ranges
from gracile.recipe.load import load as load_recipe
from gracile.recipe.schema import Recipe
from gracile.train.accuracy_aware import AccuracyAware
from gracile.train.checkpoint import (
    PACKED,
    finished_tensors,
    load_model,
    load_state,
    read_tensors,
    save_model,
    save_state,
    write_packed,
)
from gracile.train.evaluate import agreement, predict, predict_module, score
from gracile.train.exits import evaluate_cascade, exit_facts, has_exits, time_on_inputs
from gracile.train.folder import begun, check_folder, opened, read_finished
from gracile.train.job import Job, Workplace
from gracile.train.loop import fit, working
from gracile.train.outcome import kernel_counts, outcome, versions
from gracile.train.session import Session

ROUNDS = 9


def run(job: Job, *, resume: bool = False) -> dict[str, Any]:
    """Do the whole job and return `result.json` (CONTRACTS: the `--json` object).

    Raises:
        UserError: bad input, or `out` holds another run.
        VerificationError, ParityError: a proof failed.
    """
    work = _Run(job)
    identity = work.at.identity()
    check_folder(job.out, identity, job.recipe, resume=resume)
    if not begun(job.out):
        work.at.check_runtimes()
    with opened(job.out, identity, job.recipe):
        return work.whole()


def check(jobs: Iterable[Job], *, resume: bool = False) -> None:
    """Refuse what any of several jobs would refuse, before the first one runs.

    Raises:
        UserError: the first job that does not bind, or whose directory it may not write to.
    """
    for job in jobs:
        check_folder(job.out, Workplace(job).identity(), job.recipe, resume=resume)


def bind(job: Job) -> Session:
    """Bind a recipe to model and data without running or writing anything."""
    return Workplace(job).session


def export_only(
    model: str, runtime: str, out: Path, *, weights: Path | None, data: str
) -> dict[str, Any]:
    """Export a finished run, or a plain model, and prove the artifact."""
    folder = Path(model)
    if folder.is_dir():
        finished = read_finished(folder)
        if weights is not None:
            raise UserError(f"--weights: the run in {folder} has its own; leave it out.")
        old = finished["identity"]
        recipe = load_recipe(folder / "recipe.yaml")
        job = Job(model=old["model"], data=old["data"], out=folder, recipe=recipe)
        at = Workplace(job, bind=False)
        result = _finished(folder, at)
    else:
        recipe = Recipe.model_validate({"recipe": 1})
        at = Workplace(Job(model=model, data=data, recipe=recipe, out=out, weights=weights))
        result = at.dense_result
    artifact = at.exported(runtime, result, out)
    loaded = at.load(runtime, artifact, result.model)
    report = parity.check(result.model, loaded, at.parity_inputs(), precision=artifact.precision)
    parity.require(report, result.plan)
    return {"artifact": artifact.to_dict(), "parity": report.to_dict()}


def _finished(folder: Path, at: Workplace) -> Result:
    loaded = load_model(folder, at.example(), factory=at.fresh)
    return Result(model=loaded.model, plan=loaded.plan, tensors=loaded.tensors)


class _Run:
    def __init__(self, job: Job):
        self.job = job
        self.out = job.out
        self.state = job.out / "state"
        self.at = Workplace(job)

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
        model = self.at.session.model
        out = self._scores(model, "dense")
        cost_row = totals(model, capture(model, self.at.session.example))
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        out |= self._counted(model, cost_row, "dense")
        out["bytes"] = size
        return out

    def _counted(self, model: nn.Module, row: Totals, which: str) -> dict[str, int]:
        """What a model costs by arithmetic, recorded."""
        nonzeros = sum(int(p.count_nonzero()) for p in model.parameters())
        found = {"macs": row.macs, "params": row.params, "nonzeros": nonzeros}
        for metric, value in found.items():
            self._record(metric, value, "count", model=which)
        return found

    def train_and_finish(self) -> dict[str, Any]:
        """Train from the last saved epoch, finish, and write the compressed model."""
        s, recipe = self.at.session, self.job.recipe
        at, start = self.state / "session.safetensors", 0
        if recipe.accuracy is not None:  # begun anew by a resumed run
            s = self._fit_to_accuracy()
            start = s.epochs
        elif at.exists():
            saved = load_state(at, self.at.device)
            start = int(saved["next_epoch"])
            s.load_state_dict(saved["session"])
        try:
            if start < s.epochs:
                fit(
                    s,
                    self.at.train_loader(),
                    val=lambda: self.at.batches("val"),
                    start=start,
                    after_epoch=lambda e: self._save(at, e + 1),
                    progress=self.job.progress,
                )
            s.changed = False
            result = s.finish()
        finally:
            self._save_refused()
        if s.changed:
            now = score(*predict_module(result.model, self.at.batches("val")))
            for key, value in (("top1", now.top1), ("top5", now.top5), ("loss", now.loss)):
                if value is not None:
                    s.track(f"val_{key}_cut", value)
        save_model(self.out, result)
        if result.plan.of_kind("share") or result.plan.of_kind("mask"):
            write_packed(self.out / PACKED, finished_tensors(result), result.plan)
        if result.ranges:
            save_ranges(self.out / RANGES, result.ranges)
        result.ledger.save(self.out / "ledger.json")
        write_json(self.out / "history.json", {"curves": s.history})
        self._record_climbs(result.ladder)
        return {
            "warnings": result.warnings,
            "cut": _worst_cut(s.history),
            "recipe": recipe.sha,
            "ladder": result.ladder,
        }

    def _record_climbs(self, climbs: Iterable[Mapping[str, Any]]) -> None:
        """What each rung of a recovery ladder brought and cost."""
        for k, climbed in enumerate(climbs):
            for row in climbed["rungs"]:
                about = {"rung": f"{climbed['entry']}/{k}/{row['rung']}"}
                if row["after"] is None:
                    continue
                for metric, value, unit in (
                    ("rung_gain", row["gain"], "points"),
                    ("rung_ms", 1000 * row["seconds"], "ms"),
                    ("rung_images", row["images"], "count"),
                ):
                    self._record(metric, value, unit, model="compressed", split="val", about=about)

    def _fit_to_accuracy(self) -> Session:
        aware = AccuracyAware(
            self.at.renewed,
            self.at.train_loader(),
            val=lambda: self.at.batches("val"),
            progress=self.job.progress,
        )
        return aware.fit()

    def compressed(self) -> dict[str, Any]:
        """Score the compressed model in PyTorch, next to the original."""
        result = self.result
        out = self._scores(result.model, "compressed")
        graph = capture(result.model, self.at.example())
        row = totals(result.model, graph)
        out |= self._counted(result.model, row, "compressed")
        out["bytes"] = stored_bytes(result.model, result.plan)
        if (self.out / PACKED).exists():
            out["packed_bytes"] = (self.out / PACKED).stat().st_size
            self._record("packed_bytes", out["packed_bytes"], "bytes", model="compressed")
        if has_exits(result.model):
            out["exits"] = exit_facts(
                result.model, self.at.example(), self.at.batches("val"), self.at.batches("test")
            )
            self._record("mean_macs", out["exits"]["mean_macs"], "count", model="compressed",
                         split="test")  # fmt: skip
        out["layers"] = layer_rows(self.at.dense_result.model, result, self.at.example())
        dense, _ = read_tensors(self.state / "predictions-dense.safetensors")
        mine, _ = read_tensors(self.state / "predictions-compressed.safetensors")
        out["agreement"] = agreement(dense["test"], mine["test"], dense["labels"]).to_dict()
        return out

    def export(self, runtime: str) -> dict[str, Any]:
        """Export original and compressed model and prove that they compute the same."""
        out: dict[str, Any] = {"warnings": []}
        for which, result in (("dense", self.at.dense_result), ("compressed", self.result)):
            folder = self.out / "export" / _slug(runtime) / which
            artifact = self.at.exported(runtime, result, folder)
            loaded = self.at.load(runtime, artifact, result.model)
            report = parity.check(result.model, loaded, self.at.parity_inputs())
            parity.require(report, result.plan)
            self._record(
                "parity_max_abs", report.max_abs, "logit", model=which, runtime=runtime,
                artifact=artifact,
            )  # fmt: skip
            out[which] = {"artifact": artifact.to_dict(), "parity": report.to_dict()}
            kernels = loaded.kernels()
            out[which]["kernels"] = kernel_counts(kernels)
            out[which]["kernel_rows"] = [vars(k) for k in kernels]
            for address, why in artifact.metadata.get("left_float", {}).items():
                out["warnings"].append(
                    ["left-float", f"{runtime}: '{address}' stays float: {why}."]
                )
            wider = artifact.metadata.get("left_wider", {})
            for why in dict.fromkeys(wider.values()):
                first, *more = [a for a in wider if wider[a] == why]
                others = f" and {len(more)} more" if more else ""
                out["warnings"].append(
                    ["one-bit", f"{runtime}: '{first}'{others} of one bit, run with more: {why}."]
                )
            danger = parity.saturation_warning(result.plan)
            if danger is not None:
                out["warnings"].append(["saturation", f"{runtime}: {danger}"])
            name = runtime.split(":")[0]
            slow = None if name == "pytorch" else dynamic_warning(result.plan, name)
            if slow is not None:
                out["warnings"].append(["dynamic", f"{runtime}: {slow}"])
        return out

    def evaluate(self, runtime: str) -> dict[str, Any]:
        """Accuracy of both artifacts in the runtime itself, on the test split."""
        logits: dict[str, Tensor] = {}
        labels = torch.empty(0)
        out: dict[str, Any] = {}
        for which in ("dense", "compressed"):
            artifact, loaded = self._reload(runtime, which)
            batches = self.at.batches("test", show=True)
            if isinstance(loaded, Cascade):
                logits[which], labels, out["exit_rates"] = evaluate_cascade(loaded, batches)
            else:
                logits[which], labels = predict(partial(_first_output, loaded), batches)
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
        """Time both artifacts side by side; with early exits, on real images one by one."""
        loaded = {which: self._reload(runtime, which)[1] for which in ("dense", "compressed")}
        time, speedup = "latency_ms", "speedup"
        if any(isinstance(item, Cascade) for item in loaded.values()):
            time, speedup = "mean_latency_ms", "mean_speedup"
            found = time_on_inputs(loaded, self.at.batches("val"), rounds=ROUNDS)
        else:
            found = time_side_by_side(loaded, rounds=ROUNDS, batch=self.job.batch)
        found = [r.about(**self._facts(r.subject.get("model", ""))) for r in found]
        self.records.add(*found)
        latency = {r.subject["model"]: r for r in found if r.metric == time}
        ratio = next(r for r in found if r.metric == speedup)
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

    @cached_property
    def result(self) -> Result:
        """The finished compressed model, read back from its files: what ships is what is judged."""
        return _finished(self.out, self.at)

    def _save_refused(self) -> None:
        for refusal in self.at.session.refused:
            refusal.save(self.out / "refused")

    def _save(self, path: Path, next_epoch: int) -> None:
        self._save_refused()
        save_state(path, {"next_epoch": next_epoch, "session": self.at.session.state_dict()})

    def _scores(self, model: nn.Module, which: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        kept: dict[str, Tensor] = {}
        model = model.to(self.at.device)
        for split in ("val", "test"):
            logits, labels = predict_module(model, self.at.batches(split, show=True))
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
        runtime: str | None = None, about: Mapping[str, str] = MappingProxyType({}), **facts: Any,
    ) -> None:  # fmt: skip
        subject = {"model": model, **about} | ({"artifact_sha": artifact.sha} if artifact else {})
        record = Record(
            metric, float(value), unit, subject=subject, runtime=runtime or "pytorch", **facts
        )
        self.records.add(record.about(**self._facts(model)))

    def _facts(self, which: str) -> dict[str, Any]:
        return {
            "seed": self.job.recipe.seed,
            "recipe_sha": self.job.recipe.sha,
            "data_sha": self.at.bundle.sha,
            "versions": versions(),
        }

    def _about(self) -> dict[str, Any]:
        """What the result says of the run itself."""
        ledger = Ledger.load(self.out / "ledger.json")
        return {
            "out": str(self.out),
            "ledger": {"shares": ledger.shares()},
            "data": {
                "name": self.at.bundle.name,
                "spec": self.at.bundle.spec,
                "splits": dict(self.at.bundle.notes),
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

    def _reload(self, runtime: str, which: str) -> tuple[Artifact, Any]:
        path = self.state / "stages" / f"export-{_slug(runtime)}.json"
        artifact = Artifact.from_dict(json.loads(path.read_text())[which]["artifact"])
        result = self.at.dense_result if which == "dense" else self.result
        return artifact, self.at.load(runtime, artifact, result.model)


def _first_output(loaded: Any, x: Tensor) -> Any:
    return loaded.run(x)[0]


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
