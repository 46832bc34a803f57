"""One network, every family of techniques: which of them bring speed at all?

ResNet-20 (`resnet20-cifar10jpeg`), data `cifar10-jpeg`, each row trained for one epoch from the
same weights and scored on test rows 0 to 4,999; exported to both runtimes by the profile
`portable`, every artifact checked, and timed beside the network that nothing was done to, in the
same rounds. "file" is what the weights take on disk: the ONNX artifact, or the packed file where
zeros or shared values make that smaller. Where a runtime takes no such artifact, the reason stands
below the table.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

from benchmarks.cell import MANY_ROUNDS, Cell, Values, once, template, value_fields
from benchmarks.pruning import DATA, NETWORK, SHAPE, WEIGHTS, job
from benchmarks.pruning_methods import INT8, START, STRUCTURED, UNSTRUCTURED
from gracile.benchmark.timing import compare
from gracile.core.record import Record
from gracile.core.result import Result
from gracile.errors import GracileError
from gracile.export import parity
from gracile.train.evaluate import predict_module, score
from gracile.train.job import Workplace
from gracile.train.loop import fit
from gracile.train.packing import packed
from gracile.units import human_bytes

NAME = "techniques"
RUNTIMES = ("openvino", "onnxruntime")
AT_END = {"at": "end"}
EVERY_CONV = ["type:Conv2d", "!conv1.weight"]
LSQ = {"quantize": "lsq", "edges_bits": 8, "when": {"start": "0ep"}}
RANK = {
    scheme: {"lowrank": "factorize", "weights": EVERY_CONV, "scheme": scheme,
             "rank": {"name": "macs", "ratio": 0.5}, "when": START}
    for scheme in ("tucker2", "scheme2")
}  # fmt: skip
ROWS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "trained on": ("nothing", {}),
    "85 % of the weights (AGP, LAMP)": ("zeros", UNSTRUCTURED["AGP, LAMP"]),
    "85 % of the weights (learned gates)": ("zeros", UNSTRUCTURED["gates (RB, L0)"]),
    "2 of 4 weights": ("zeros", {"z": {"prune": "n_m", "weights": EVERY_CONV, "when": START}}),
    "half of the 3x3 kernels": (
        "zeros",
        {"z": {"prune": "gradual", "weights": EVERY_CONV, "granularity": "kernel",
               "criterion": "l1", "sparsity": 0.5, "when": START}},
    ),
    "half of the MACs (L1)": ("channels", STRUCTURED["L1, layer by layer"]),
    "half of the MACs (Taylor, distillation)": ("channels", STRUCTURED["Taylor, distillation"]),
    "3 blocks fewer": ("depth", {"d": {"prune": "depth", "count": 3, "when": START}}),
    "INT8 after training": ("bits", {"q": {"quantize": "ptq", "when": AT_END}}),
    "INT8 while training": ("bits", INT8),
    "4 bits (LSQ)": ("bits", {"q": {**LSQ, "bits": 4}}),
    "2 bits (LSQ)": ("bits", {"q": {**LSQ, "bits": 2}}),
    "4 bits, weights alone": (
        "bits", {"q": {"quantize": "ptq", "weight_bits": 4, "activations": False, "when": AT_END}},
    ),
    "4 and 8 bits (HAWQ)": (
        "bits",
        {"q": {"quantize": "ptq", "precision": {"bits": [4, 8], "limit": {"size": 0.6}},
               "when": AT_END}},
    ),
    "1 bit (XNOR)": ("bits", {"q": {"quantize": "binary", "when": {"start": "0ep"}}}),
    "16 values a layer (k-means)": (
        "sharing", {"s": {"quantize": "share", "bits": 4, "when": {"start": "0ep"}}},
    ),
    "product quantization": ("sharing", {"s": {"quantize": "product", "correct": True,
                                               "when": AT_END}}),
    "half of the MACs (Tucker-2)": ("rank", {"r": RANK["tucker2"]}),
    "half of the MACs (3x1, then 1x3)": ("rank", {"r": RANK["scheme2"]}),
    "half of the MACs (Tucker-2), then INT8": ("together", {"r": RANK["tucker2"], **INT8}),
    "half of the MACs, then INT8": (
        "together", {**STRUCTURED["L1, layer by layer"], **INT8},
    ),
}  # fmt: skip
METRICS = {"top1": "%", "file_bytes": "bytes"}
TIMES = {"latency_ms": "ms", "speedup": "ratio"}


def cells() -> Iterator[Cell]:
    """A cell for each row; times of both runtimes in it."""
    facts = {"batch": 1, "shape": SHAPE, "split": "test[:5000]", "precision_hint": "f32"}
    for row in ROWS:
        records = [template(NAME, NETWORK, metric, unit, row, **facts)
                   for metric, unit in METRICS.items()]  # fmt: skip
        for runtime in RUNTIMES:
            records += [
                template(NAME, NETWORK, f"{metric} {runtime}", unit, row, runtime=runtime, **facts)
                for metric, unit in TIMES.items()
            ]
        notes: dict[str, Any] = {}
        run = partial(measure, row, notes)
        yield Cell(NAME, row, "full", tuple(records), run, notes, anywhere=True)


def measure(row: str, notes: dict[str, Any]) -> Values:
    """Compress, score, export to each runtime and time beside the dense network.

    Raises:
        UserError: the data or the weights are not there.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        asked = replace(job(NETWORK, WEIGHTS, DATA, ROWS[row][1], Path(folder)), runtimes=RUNTIMES)
        at = Workplace(asked)
        fit(at.session, at.train_loader(), val=lambda: at.batches("val"), progress=False)
        result = at.session.finish()
        top1 = 100 * score(*predict_module(result.model, at.batches("test"))).top1
        found["top1", row] = once(top1)
        tensors = {**result.model.state_dict(), **result.tensors}
        sizes = [sum(t.nbytes for t in packed(tensors, result.plan).tensors.values())]
        for runtime in RUNTIMES:
            times = {metric: once(nan) for metric in TIMES}
            try:
                size, times = _timed(at, result, runtime, Path(folder) / runtime)
                sizes += [size] if runtime == "onnxruntime" else []
            except GracileError as e:
                notes[runtime] = str(e)
            found |= {(f"{metric} {runtime}", row): v for metric, v in times.items()}
        found["file_bytes", row] = once(min(sizes))
    return found


def _timed(
    at: Workplace, result: Result, runtime: str, folder: Path
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Size of the artifact, and its times beside the dense network's."""
    loaded = {}
    for which, r in (("dense", at.dense_result), ("compressed", result)):
        artifact = at.exported(runtime, r, folder / which)
        loaded[which] = at.load(runtime, artifact, r.model)
        report = parity.check(r.model, loaded[which], at.parity_inputs())
        parity.require(report, r.plan)
    rows = {(r.subject["model"], r.metric): r for r in compare(loaded, rounds=MANY_ROUNDS)}
    times = {metric: value_fields(rows["compressed", metric]) for metric in TIMES}
    return artifact.size_bytes, times


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: one row for each technique, by family."""
    rows: dict[str, dict[str, Record]] = {}
    for r in records:
        rows.setdefault(r.subject["variant"], {})[r.metric] = r
    heads = ("family", "technique", "top-1 (%)", "file", *(f"{r} (ms)" for r in RUNTIMES),
             *(f"{r}, times faster" for r in RUNTIMES))  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"|---|---|{'---:|' * (len(heads) - 2)}"]
    for name in (n for n in ROWS if n in rows):
        row = rows[name]
        cells = (
            ROWS[name][0], name, f"{row['top1'].value:.2f}", human_bytes(row["file_bytes"].value),
            *(_ms(row[f"latency_ms {r}"]) for r in RUNTIMES),
            *(_ratio(row[f"speedup {r}"]) for r in RUNTIMES),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    for name, why in texts.items():
        lines += ["", *(f"{name}, {runtime}: {text}" for runtime, text in why.items())]
    return lines


def _ms(r: Record) -> str:
    return "" if r.value != r.value else f"{r.value:.3f}"


def _ratio(r: Record) -> str:
    if r.value != r.value:
        return "not taken"
    return f"{r.value:.2f} [{r.ci95[0]:.2f}, {r.ci95[1]:.2f}]" if r.ci95 else f"{r.value:.2f}"
