"""Ways to prune ResNet-20 at equal budget, and what they leave of its accuracy.

Baseline weights `resnet20-cifar10jpeg`, data `cifar10-jpeg`: trained on its 50,000 images, scored
on test rows 0 to 4,999. Every method gets one epoch (391 steps of SGD, batch 128, bf16 where the
processor has units for it) in which to prune and recover: half of the MACs (whole channels), or
85 % of the weights of all convolutions but the first. "Right after pruning" is the accuracy on rows
5,000 to 9,999 before any training, told where all pruning comes before it. Referees are random
pruning and a network of half the MACs in every layer, trained from scratch for as long. Times are
of one image in OpenVINO, f32, one thread, next to the baseline in interleaved rounds; since a table
takes hours, its rows may come from several machines, and only "times faster" compares them; a star:
the machine had other work at that time, the ratio is good to 15 %.
"""

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.cell import MANY_ROUNDS, Cell, Values, once, template
from benchmarks.pruning_methods import (
    EPOCHS,
    MACS,
    REFEREES,
    START,
    STRUCTURED,
    UNSTRUCTURED,
    ZEROS,
    Methods,
    cut,
)
from gracile import Recipe, Session
from gracile.analyze.cost import totals
from gracile.benchmark.timing import compare
from gracile.core.record import Record
from gracile.core.result import Result
from gracile.errors import UserError
from gracile.graph.capture import capture
from gracile.train.evaluate import predict_module, score
from gracile.train.job import Job, Workplace
from gracile.train.loop import fit, make_optimizer

NAME = "pruning"
NETWORK = "resnet20_cifar_a"
WEIGHTS, DATA = "resnet20-cifar10jpeg.safetensors", "cifar10-jpeg"
RUNTIME = "openvino"
SHAPE = (1, 3, 32, 32)
TRAIN = {
    "epochs": EPOCHS,
    "batch_size": 128,
    "autocast": "auto",
    "channels_last": True,
    "optimizer": {
        "class": "SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True,
    },
    "lr": {"class": "CosineAnnealingLR", "interval": "step"},
}  # fmt: skip
SPLITS = {"val": "test[5000:]", "test": "test[:5000]", "calibration": 300}
EVERY = {**STRUCTURED, **UNSTRUCTURED}
TABLES = {"half of the MACs": STRUCTURED, "85 % of the weights": UNSTRUCTURED}
METRICS = {
    "top1": "%", "top1_cut": "%", "asked": "share", "reached": "share", "macs": "count",
    "nonzeros": "count", "latency_ms": "ms", "speedup": "ratio",
}  # fmt: skip
SMALL, HALVED = "small network", cut("l1", scope="layer")
GATES, MAGNITUDE = "gates (RB, L0)", "AGP, LAMP"
SEEDS = (0, 1, 2)
BUSY = 2.0  # load, with one process measuring
# Seeds 1 and 2: of the referees, of the methods that were best with seed 0, and of what the verdict
# on gates compares.
REPEATED = {
    "half of the MACs": (
        *REFEREES, "greedy", "Taylor, distillation", "Taylor in steps", "L1, layer by layer",
    ),
    "85 % of the weights": (
        "random", "AGP, LAMP, distillation", "AGP, masked weights trained", "magnitude, global",
        "LAMP, global", MAGNITUDE, f"{MAGNITUDE}, INT8", GATES, f"{GATES}, INT8",
    ),
}  # fmt: skip


def cells() -> Iterator[Cell]:
    """One cell a method and seed; seed 0 of all of them first."""
    for seed in SEEDS:
        for table, methods in TABLES.items():
            names = [*methods, *([SMALL] if methods is STRUCTURED else ())]
            for name in names:
                if seed == 0 or name in REPEATED[table]:
                    yield _cell(table, name, methods.get(name, HALVED), seed)


def _cell(table: str, name: str, methods: Mapping[str, Any], seed: int) -> Cell:
    records = tuple(
        template(
            NAME, table, metric, unit, name, seed=seed, batch=1, shape=SHAPE, runtime=RUNTIME,
            precision_hint="f32", split="test[:5000]",
        )
        for metric, unit in METRICS.items()
    )  # fmt: skip
    run = partial(measure, table, name, methods, seed)
    return Cell(NAME, f"{table}/{name}/{seed}", "full", records, run, anywhere=True)


def measure(table: str, name: str, methods: Mapping[str, Any], seed: int) -> Values:
    """Prune, train, score, export and time one of them.

    Raises:
        UserError: the data or the weights are not there.
    """
    with tempfile.TemporaryDirectory() as folder:
        at = Workplace(job(NETWORK, WEIGHTS, DATA, methods, Path(folder), seed=seed))
        dense = capture(at.dense_result.model, at.example())
        base = totals(at.dense_result.model, dense)
        cuts: list[float] = []
        result = small(at) if name == SMALL else pruned(at, cuts)
        row = totals(result.model, capture(result.model, at.example()))
        top1 = 100 * score(*predict_module(result.model, at.batches("test"))).top1
        nonzeros = sum(int((p != 0).sum()) for p in result.model.parameters() if p.dim() > 1)
        whole = sum(p.numel() for p in at.dense_result.model.parameters() if p.dim() > 1)
        structured = TABLES[table] is STRUCTURED
        reached = 1 - row.macs / base.macs if structured else 1 - nonzeros / whole
        found = {
            "top1": top1,
            "top1_cut": cuts[-1] if cuts and at_once(methods) else math.nan,
            "asked": MACS if structured else ZEROS,
            "reached": reached,
            "macs": row.macs,
            "nonzeros": nonzeros,
        }
        times = _times(at, result, Path(folder))
    return {(k, name): once(float(v)) for k, v in {**found, **times}.items()}


def at_once(methods: Methods) -> bool:
    """Whether everything is pruned before the training."""
    return all(m.get("when") == START for m in methods.values() if "prune" in m)


def job(
    network: str, weights: str | None, data: str, methods: Mapping[str, Any], folder: Path, *,
    seed: int = 0, train: Mapping[str, Any] = TRAIN, splits: Mapping[str, Any] = SPLITS,
    runtime: str = RUNTIME,
) -> Job:  # fmt: skip
    """A network with its weights and data, and a recipe with these methods.

    Raises:
        UserError: the environment does not say where data and weights are.
    """
    roots = {k: os.environ.get(k) for k in ("GRACILE_DATA", "GRACILE_MODELS")}
    for key, root in roots.items():
        if root is None:
            raise UserError(f"this benchmark needs {key}: the folder of data or weights.")
    return Job(
        model=network,
        data=f"parquet:{roots['GRACILE_DATA']}/{data}",
        recipe=Recipe.build(seed=seed, train=train, data=splits, methods=methods),
        out=folder,
        weights=None if weights is None else Path(str(roots["GRACILE_MODELS"])) / weights,
        runtimes=(runtime,),
        progress=False,
    )


def pruned(at: Workplace, cuts: list[float]) -> Result:
    """Train as the recipe says; what is scored right after a change goes into `cuts`."""
    session = at.session
    fit(session, at.train_loader(), val=lambda: at.batches("val"), progress=False)
    result = session.finish()
    cuts += [100 * v for _, v in session.history.get("val_top1_cut", [])]
    return result


def small(at: Workplace) -> Result:
    """A network with half of the MACs in every layer, from scratch, trained for as long."""
    at.session.on_epoch_begin(0)
    model = at.session.finish().model
    generator = torch.Generator().manual_seed(at.job.recipe.seed)
    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight, mode="fan_out", generator=generator)
        elif hasattr(m, "reset_parameters"):
            m.reset_parameters()
    recipe = at.job.recipe.model_copy(update={"methods": {}})
    session = Session(
        model,
        recipe,
        make_optimizer(model, recipe.train),
        example=at.example(),
        steps_per_epoch=len(at.train_loader()),
    )
    for group in session.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 0.1  # from scratch: the rate of the baseline's own
    fit(session, at.train_loader(), progress=False)
    return session.finish()


def _times(at: Workplace, result: Result, folder: Path) -> dict[str, float]:
    loaded = {}
    for which, r in (("dense", at.dense_result), ("pruned", result)):
        artifact = at.exported(RUNTIME, r, folder / which)
        loaded[which] = at.load(RUNTIME, artifact, r.model)
    rows = {(r.subject["model"], r.metric): r.value for r in compare(loaded, rounds=MANY_ROUNDS)}
    return {
        "latency_ms": rows["pruned", "latency_ms"],
        "speedup": rows["pruned", "speedup"],
    }


TITLES = (
    "method", "top-1 (%)", "over seeds", "right after pruning (%)", "reached", "MACs",
    "weights left", "ms", "of", "times faster", "processor",
)  # fmt: skip


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: one row for each method, the best first; a mean where there are several seeds.

    Below it what gates reach against magnitude, where both are there.

    Times are those of the seed that was timed with the least load, with the baseline's own in the
    same rounds behind "of".
    """
    rows: dict[str, dict[str, list[Record]]] = {}
    for r in sorted(records, key=lambda r: r.seed or 0):
        rows.setdefault(r.subject["variant"], {}).setdefault(r.metric, []).append(r)
    means = {n: {m: mean(r.value for r in rs) for m, rs in row.items()} for n, row in rows.items()}
    lines = [f"| {' | '.join(TITLES)} |", f"|---|{'---:|' * (len(TITLES) - 2)}---|"]
    for name, row in sorted(means.items(), key=lambda item: -item[1]["top1"]):
        top1 = [r.value for r in rows[name]["top1"]]
        spread = f"{len(top1)}, ± {stdev(top1):.2f}" if len(top1) > 1 else "1"
        ratio = min(rows[name]["speedup"], key=lambda r: r.load_avg or 0)
        busy = "*" if (ratio.load_avg or 0) > BUSY else ""
        time = next(r for r in rows[name]["latency_ms"] if r.seed == ratio.seed)
        known = row["top1_cut"] == row["top1_cut"] and at_once(EVERY.get(name, {}))
        lines.append(
            f"| {name} | {row['top1']:.2f} | {spread} | "
            f"{format(row['top1_cut'], '.1f') if known else ''} | "
            f"{row['reached']:.1%} | {row['macs'] / 1e6:.1f} M | {row['nonzeros'] / 1e3:.0f} k | "
            f"{time.value:.3f} | {time.value * ratio.value:.3f} | {ratio.value:.2f}{busy} | "
            f"{str(time.device).partition('(R) Processor')[0].replace('(R)', '')} |"
        )
    return [*lines, *verdict({n: row["top1"] for n, row in rows.items()})]


def verdict(top1: Mapping[str, Sequence[Record]]) -> list[str]:
    """Learned gates against magnitude at equal sparsity, in 32 and in 8 bits: points, seed by seed.

    Args:
        top1: method -> its Records.
    """
    lines = []
    for what, after in (("in float", ""), ("in INT8", ", INT8")):
        ours, theirs = (
            {r.seed: r.value for r in top1.get(f"{name}{after}", ())} for name in (GATES, MAGNITUDE)
        )
        gained = [ours[s] - theirs[s] for s in sorted(ours.keys() & theirs.keys(), key=str)]
        if gained:
            better = sum(g > 0 for g in gained)
            each = ", ".join(f"{g:+.2f}" for g in gained)
            lines.append(
                f"- {GATES} against {MAGNITUDE}, {what}: {mean(gained):+.2f} points ({each}); "
                f"better in {better} of {len(gained)} seeds."
            )
    return ["", "Verdict:", "", *lines] if lines else []
