"""Few bits by training: LSQ, PACT and DoReFa on ResNet-20; symmetric or not on MobileNetV2.

ResNet-20: weights `resnet20-cifar10jpeg`, data `cifar10-jpeg`; every row trains for one epoch from
the same weights (SGD, batch 128, cosine), first and last layer with 8 bits, and is scored on test
rows 0 to 4,999. "float" trains for as long without quantization; "lost" is against it, in points.
Published beside it: a PACT reproduction that began with weights like ours, on the original pixels
and trained for hundreds of epochs, lost 0.8, 1.6 and 4.7 points with 4, 3 and 2 bits
(github.com/KwangHoonAn/PACT).

MobileNetV2: the question of NNCF's Table 2 (arXiv:2002.08679; there CIFAR-100), whether zero points
matter. The float network is trained here from scratch for five epochs, then for one more in float
or with learned ranges: symmetric (no zero points, activations behind a ReLU6 unsigned) or
asymmetric (weights and activations), one scale for a tensor.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from benchmarks.cell import Cell, Values, once, template
from benchmarks.pruning import DATA, TRAIN, WEIGHTS, job
from gracile.core.record import Record
from gracile.train.evaluate import predict_module, score
from gracile.train.job import Workplace
from gracile.train.loop import fit

NAME = "qat"
START = {"start": "0ep"}
EDGES = {"edges_bits": 8, "when": START}
FLOAT = "float"
RESNET, MOBILE = "ResNet-20", "MobileNetV2"
NETWORKS = {RESNET: "resnet20_cifar_a", MOBILE: "mobilenet_v2"}
EPOCHS = 1
SCRATCH = {"epochs": 5, "optimizer": {**TRAIN["optimizer"], "lr": 0.1}}


def _few(quantize: str, bits: int, **options: Any) -> Mapping[str, Any]:
    return {"q": {"quantize": quantize, "bits": bits, **EDGES, **options}}


def _learned(weights: int, activations: int, *, symmetric: bool) -> Mapping[str, Any]:
    return {
        "q": {
            "quantize": "learned",
            "bits": activations,
            "weight_bits": weights,
            "symmetric": symmetric,
            "weight_symmetric": symmetric,
            "per_channel": False,
            "when": START,
        }
    }


ROWS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    RESNET: {
        FLOAT: {},
        **{f"LSQ, W{b}A{b}": _few("lsq", b) for b in (4, 3, 2)},
        **{f"PACT, W{b}A{b}": _few("pact", b, clip_init="observed") for b in (4, 3, 2)},
        **{f"DoReFa, W{b}A{b}": _few("dorefa", b) for b in (4, 3, 2)},
        "binary (XNOR), W1A1": {"q": {"quantize": "binary", "when": START}},
    },
    MOBILE: {
        FLOAT: {},
        **{
            f"{name}, W{w}A{a}": _learned(w, a, symmetric=name == "symmetric")
            for w, a in ((8, 8), (4, 8), (4, 4))
            for name in ("symmetric", "asymmetric")
        },
    },
}


def cells() -> Iterator[Cell]:
    """A cell for each row: what it loses is worked out in the table."""
    for network, rows in ROWS.items():
        for row in rows:
            records = (template(NAME, network, "top1", "%", row, batch=128, split="test[:5000]"),)
            run = partial(measure, network, row)
            yield Cell(NAME, f"{network}/{row}", "full", records, run, anywhere=True)


def measure(network: str, row: str) -> Values:
    """Train one row and score it.

    Raises:
        UserError: the data or the weights are not there.
    """
    weights = WEIGHTS if network == RESNET else str(scratch())
    train = {**TRAIN, "epochs": EPOCHS}
    with tempfile.TemporaryDirectory() as folder:
        top1 = _trained(network, weights, ROWS[network][row], train, Path(folder))[1]
    return {("top1", row): once(top1)}


def scratch() -> Path:
    """Weights of MobileNetV2 after five epochs from scratch; kept until the machine is cleaned."""
    file = Path(tempfile.gettempdir()) / "gracile-benchmarks" / "mobilenet_v2.safetensors"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            at, _ = _trained(MOBILE, None, {}, {**TRAIN, **SCRATCH}, Path(folder))
            made = file.with_suffix(".new")
            save_file(at.session.model.state_dict(), made)
        made.rename(file)
    return file


def _trained(
    network: str,
    weights: str | None,
    methods: Mapping[str, Any],
    train: Mapping[str, Any],
    folder: Path,
) -> tuple[Workplace, float]:
    at = Workplace(job(NETWORKS[network], weights, DATA, methods, folder, train=train))
    fit(at.session, at.train_loader(), progress=False)
    result = at.session.finish()
    return at, 100 * score(*predict_module(result.model, at.batches("test"))).top1


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: one row for each way, with what it loses against the float row."""
    top1 = {r.subject["variant"]: r.value for r in records}
    lines = ["| | top-1 (%) | lost (points) |", "|---|---:|---:|"]
    for row, value in top1.items():
        lost = f"{top1[FLOAT] - value:.2f}" if FLOAT in top1 and row != FLOAT else ""
        lines.append(f"| {row} | {value:.2f} | {lost} |")
    return lines
