"""One network, every family of techniques: which of them bring speed at all?

ResNet-20 (`resnet20-cifar10jpeg`), data `cifar10-jpeg`, each row trained for one epoch from the
same weights and scored on test rows 0 to 4,999; exported to both runtimes by the profile
`portable`, every artifact checked, and timed beside the network that nothing was done to, in the
same rounds. "file" is what the weights take on disk: the ONNX artifact, or the packed file where
zeros or shared values make that smaller. Where a runtime takes no such artifact, the reason stands
below the table.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from benchmarks.cell import Cell
from benchmarks.compressing import by_row, columns, heads, outcome, reasons, templates
from benchmarks.pruning_methods import INT8, START, STRUCTURED, UNSTRUCTURED
from gracile.core.record import Record

NAME = "techniques"
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


def cells() -> Iterator[Cell]:
    """A cell for each row; times of both runtimes in it."""
    for row, (_, methods) in ROWS.items():
        notes: dict[str, Any] = {}
        run = partial(outcome, row, methods, notes)
        yield Cell(NAME, row, "full", templates(NAME, row), run, notes, anywhere=True)


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: one row for each technique, by family."""
    rows = by_row(records)
    lines = heads("family", "technique")
    for name in (n for n in ROWS if n in rows):
        lines.append(f"| {' | '.join((ROWS[name][0], name, *columns(rows[name])))} |")
    return [*lines, *reasons(texts)]
