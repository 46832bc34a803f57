"""Post-training INT8 of four ResNets beside NNCF's: accuracy, latency, seconds to get there.

Weights `resnet{20,32,44,56}-cifar10`, data `cifar10-exact-subset`. Everyone calibrates on the same
300 training images, with his own defaults, and is scored by the runtime itself on the 1,000 exact
test images (f32 hint). "p" is McNemar's, two-sided and exact, against NNCF's answers to the same
images. Latency is of one image on one thread, all variants of a table in interleaved rounds.
Seconds are those from the float PyTorch model to the saved artifact, calibration included: the
median of three calls after one that is thrown away, in turn, with all cores. NNCF quantizes what
the runtime reads (an OpenVINO model, an ONNX model); "NNCF, torch" is its torch backend, converted
to OpenVINO. NNCF sees the images one by one, as its documentation does; we see them in batches.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.cell import MANY_ROUNDS, Cell, Values, latency, once, ratio, template
from benchmarks.pruning import job
from gracile.benchmark.artifact import open_artifact
from gracile.benchmark.runtimes.base import Loaded, load
from gracile.benchmark.timing import measure as measure_rounds
from gracile.core.record import Record
from gracile.train.evaluate import mcnemar, predict
from gracile.train.job import Workplace

NAME = "ptq"
NEEDS: Mapping[str, str] = {"nncf": "nncf"}
DEPTHS = (20, 32, 44, 56)
DATA = "cifar10-exact-subset"
SHAPE = (1, 3, 32, 32)
IMAGES = 300
SPLITS = {"val": "train[6000:7000]", "test": "test", "calibration": IMAGES}
TRAIN = {"epochs": 0, "batch_size": 128}
RECIPE = {"int8": {"quantize": "ptq", "when": {"at": "end"}}}
FLOAT, OURS, PEER, PEER_TORCH = "float", "gracile", "NNCF", "NNCF, torch"
VARIANTS = {
    "openvino": (FLOAT, OURS, PEER, PEER_TORCH),
    "onnxruntime": (FLOAT, OURS, PEER),
}
REPEATS = 3


def cells() -> Iterator[Cell]:
    """A cell for each network and runtime."""
    for depth in DEPTHS:
        for runtime, variants in VARIANTS.items():
            cell = f"ResNet-{depth}, {runtime}"
            facts = {"runtime": runtime, "batch": 1, "shape": SHAPE, "precision_hint": "f32"}
            facts |= {"split": "test", "peers": tuple(NEEDS)}
            records = tuple(
                template(NAME, cell, metric, unit, variant, **facts)
                for variant in variants
                for metric, unit in metrics(variant).items()
            )
            yield Cell(NAME, cell, "full", records, partial(measure, depth, runtime))


def metrics(variant: str) -> dict[str, str]:
    """Metric -> unit of a variant."""
    found = {"top1": "%", "latency_ms": "ms", "artifact_bytes": "bytes"}
    if variant != FLOAT:
        found |= {"speedup": "ratio", "seconds": "s"}
    return found | {"mcnemar_p": "p", "ratio": "ratio"} if variant == OURS else found


def measure(depth: int, runtime: str) -> Values:
    """Quantize with everyone, score and time what comes out.

    Raises:
        UserError: the data or the weights are not there.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network, weights = f"resnet{depth}_cifar_a", f"resnet{depth}-cifar10.safetensors"
        settings = {"train": TRAIN, "splits": SPLITS}
        at = Workplace(job(network, weights, DATA, RECIPE, folder, runtime=runtime, **settings))
        images = torch.cat([x for x, *_ in at.session.calibration])[:IMAGES]
        ways: dict[str, Callable[[], Path]] = {
            v: partial(WAYS[runtime][v], at, images, folder / f"{i}")
            for i, v in enumerate(VARIANTS[runtime])
        }
        files, seconds = made(ways)
        loaded: dict[str, Loaded] = {
            v: load(open_artifact(file), threads=1, hint="f32", batch=1)
            for v, file in files.items()
        }
        right = {v: answers(at, run) for v, run in loaded.items()}
        t = measure_rounds(
            loaded, dict.fromkeys(loaded, 1), rounds=MANY_ROUNDS, warmup=5, min_round_ms=50.0
        )
        sizes = {v: run.size_bytes for v, run in loaded.items()}
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for v in VARIANTS[runtime]:
        found["top1", v] = once(100 * float(right[v].double().mean()))
        found["latency_ms", v] = latency(t[v])
        found["artifact_bytes", v] = once(sizes[v])
        if v != FLOAT:
            found["speedup", v] = ratio(t[FLOAT], t[v])
            found["seconds", v] = once(median(seconds[v]), seconds[v])
    lost = int((right[PEER] & ~right[OURS]).sum())
    gained = int((right[OURS] & ~right[PEER]).sum())
    found["mcnemar_p", OURS] = once(mcnemar(lost, gained))
    found["ratio", OURS] = ratio(t[OURS], t[PEER])
    return found


def made(
    ways: Mapping[str, Callable[[], Path]],
) -> tuple[dict[str, Path], dict[str, list[float]]]:
    """What each way makes, and the seconds of each repetition but the first."""
    seconds: dict[str, list[float]] = {v: [] for v in ways}
    files: dict[str, Path] = {}
    for k in range(REPEATS + 1):
        for v, way in ways.items():
            start = perf_counter()
            files[v] = way()
            if k > 0:
                seconds[v].append(perf_counter() - start)
    return files, seconds


def answers(at: Workplace, loaded: Loaded) -> Tensor:
    """For each test image whether the artifact knows its class."""
    logits, labels = predict(lambda x: loaded.run(x)[0], at.batches("test"))
    return logits.argmax(1) == labels


# ------------------------------------------------------------------ ways to an artifact


def untouched(runtime: str, at: Workplace, images: Tensor, folder: Path) -> Path:
    """The float network."""
    return at.exported(runtime, at.dense_result, folder).path


def by_gracile(runtime: str, at: Workplace, images: Tensor, folder: Path) -> Path:
    """A session, its one method, the export."""
    return at.exported(runtime, at.renewed().finish(), folder).path


def by_nncf_openvino(at: Workplace, images: Tensor, folder: Path) -> Path:
    """The model as OpenVINO's, quantized there."""
    import nncf
    import openvino as ov

    model = ov.convert_model(
        at.fresh().model.eval(), example_input=images[:1], input=[-1, 3, 32, 32]
    )
    data = nncf.Dataset(images.split(1), lambda x: x.numpy())
    return _saved(nncf.quantize(model, data, subset_size=IMAGES), folder)


def by_nncf_torch(at: Workplace, images: Tensor, folder: Path) -> Path:
    """Quantized in PyTorch, then converted."""
    import nncf

    model = nncf.quantize(
        at.fresh().model.eval(), nncf.Dataset(images.split(1)), subset_size=IMAGES
    )
    return _saved(_converted(model, images), folder)


def by_nncf_onnx(at: Workplace, images: Tensor, folder: Path) -> Path:
    """The model as ONNX, quantized there."""
    import nncf
    import onnx

    model = onnx.load(untouched("onnxruntime", at, images, folder))
    name = model.graph.input[0].name
    data = nncf.Dataset(images.split(1), lambda x: {name: x.numpy()})
    file = folder / "quantized.onnx"
    onnx.save(nncf.quantize(model, data, subset_size=IMAGES), file)
    return file


def _converted(model: Any, images: Tensor) -> Any:
    import openvino as ov

    return ov.convert_model(model, example_input=images[:1], input=[-1, *SHAPE[1:]])


def _saved(model: Any, folder: Path) -> Path:
    import openvino as ov

    folder.mkdir(exist_ok=True)
    ov.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return folder / "model.xml"


WAYS: Mapping[str, Mapping[str, Callable[..., Path]]] = {
    "openvino": {
        FLOAT: partial(untouched, "openvino"),
        OURS: partial(by_gracile, "openvino"),
        PEER: by_nncf_openvino,
        PEER_TORCH: by_nncf_torch,
    },
    "onnxruntime": {
        FLOAT: partial(untouched, "onnxruntime"),
        OURS: partial(by_gracile, "onnxruntime"),
        PEER: by_nncf_onnx,
    },
}


TITLES = ("", "top-1 (%)", "p", "ms", "speed-up", "time / NNCF's", "artifact", "seconds")


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: one row for each way."""
    rows: dict[str, dict[str, Record]] = {}
    for r in records:
        rows.setdefault(r.subject["variant"], {})[r.metric] = r
    lines = [f"| {' | '.join(TITLES)} |", f"|---|{'---:|' * (len(TITLES) - 1)}"]
    for variant in (FLOAT, OURS, PEER, PEER_TORCH):
        row = rows.get(variant)
        if row:
            lines.append(
                f"| {variant} | {row['top1'].value:.1f} | {_number(row, 'mcnemar_p', '.2g')} | "
                f"{row['latency_ms'].value:.3f} | {_number(row, 'speedup', '.2f', 'x')} | "
                f"{_number(row, 'ratio', '.2f', 'x')} | "
                f"{row['artifact_bytes'].value / 1024:.0f} KiB | {_number(row, 'seconds', '.2f')} |"
            )
    return lines


def _number(row: Mapping[str, Record], metric: str, form: str, unit: str = "") -> str:
    r = row.get(metric)
    if r is None:
        return ""
    spread = f" [{r.ci95[0]:{form}}, {r.ci95[1]:{form}}]" if r.ci95 else ""
    return f"{r.value:{form}}{unit}{spread}"
