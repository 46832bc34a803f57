"""What a compression run returns: the compressed model and the proof of how it came about."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gracile.core.plan import Plan
from gracile.core.record import Record


@dataclass
class Result:
    """The outcome of `Session.finish()`.

    Attributes:
        model: computes the compressed function, in eval mode: a plain, smaller module, or, where
            activations are quantized, the captured graph with quantizers in it. Weights on a grid
            hold their dequantized values.
        plan: every Edit, in order.
        records: measurements made on the way.
        ledger: status and reason of every tensor and operator.
        tensors: what the Plan's keys name: masks, scales, zero points.
        ranges: operator -> what its output spans (`gracile.quantize.ranges.Range`), where a method
            observed that.
        history: curves over training, name -> [(epoch, value), ...].
        warnings: (code, text) pairs for the report.
        ladder: what each recovery of a `recover: ladder` cost and brought.
    """

    model: nn.Module
    plan: Plan
    records: list[Record] = field(default_factory=list)
    ledger: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranges: dict[str, Any] = field(default_factory=dict)
    history: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    ladder: list[dict[str, Any]] = field(default_factory=list)
