"""What became of each layer: channels, bits, zeros and multiply-adds, before and after."""

import math
from typing import Any

from torch import Tensor, nn

from gracile.analyze.cost import cost
from gracile.core.plan import Plan
from gracile.core.result import Result
from gracile.graph.capture import capture

LAYERS = ("conv", "linear", "conv_transpose")


def layer_rows(
    dense: nn.Module, result: Result, example: Tensor | tuple[Tensor, ...]
) -> list[dict[str, Any]]:
    """One row for each convolution and linear layer of the original, in execution order.

    A layer that is gone has no channels and counts as all zeros.
    """
    before = {r.id: r for r in cost(dense, capture(dense, example))}
    after = {r.id: r for r in cost(result.model, capture(result.model, example))}
    bits = _weight_bits(result.plan)
    rows = []
    for id, row in before.items():
        if row.weight is None or row.op not in LAYERS:
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


def stored_bytes(model: nn.Module, plan: Plan) -> int:
    """Bytes of all parameters at the bits the Plan gives them, with codebooks and groups' scales.

    Codes count with all their bits; how much smaller they are in a file is seen there.
    """
    bits = _weight_bits(plan)
    total = sum(math.ceil(p.numel() * bits.get(n, 32) / 8) for n, p in model.named_parameters())
    for e in plan.of_kind("bits"):
        if e.group is not None:
            each = 32 if e.symmetric else 32 + e.bits  # a scale, and a zero point
            total += math.ceil(model.get_parameter(e.at).numel() / e.group * each / 8)
    for e in plan.of_kind("share"):
        if e.at not in _grids(plan):
            channels = model.get_parameter(e.at).shape[1] if e.block > 1 else 1
            total += 4 * e.levels * channels
            if e.bucket is not None:  # the ends of each
                total += 8 * math.ceil(model.get_parameter(e.at).numel() / e.bucket)
    return total


def _weight_bits(plan: Plan) -> dict[str, float]:
    """Bits of a weight: of its grid, else of the code it shares with `block` - 1 others."""
    code = {e.at: math.ceil(math.log2(e.levels)) for e in plan.of_kind("share")}
    shared = {
        e.at: code[e.at] if e.block == 1 else round(code[e.at] / e.block, 2)
        for e in plan.of_kind("share")
    }
    return {**shared, **_grids(plan)}


def _grids(plan: Plan) -> dict[str, float]:
    return {e.at: e.bits for e in plan.of_kind("bits") if e.role == "weight"}
