"""Write a model's weights for PyTorch itself: safetensors, with the units and facts inside."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gracile.benchmark.artifact import KEY, Artifact, artifact_path, content_sha, facts
from gracile.benchmark.runtimes.pytorch import SCALE_OF
from gracile.core.plan import Plan
from gracile.core.state import write_atomic_with
from gracile.export.integers import CONTAINER_BITS, integers
from gracile.export.prepare import activation_grids, example_inputs
from gracile.export.units import choose_units
from gracile.graph.capture import capture
from gracile.registry import register


@register("exporter", "pytorch", source="safetensors, https://github.com/huggingface/safetensors")
def export_pytorch(
    model: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    example: Tensor | tuple[Tensor, ...],
    path: str | Path,
    metadata: Mapping[str, Any],
) -> Artifact:
    """Write the state of the model; loading it again needs the model (``module=...``).

    PyTorch computes in floats, so the precision is "f32" whatever the plan says. Weights of up to 8
    bits with a zero point of 0 are written as integers, with their scales.
    """
    from safetensors.torch import save_file

    path = artifact_path(path, "pytorch")
    graph = capture(model, example)
    units = choose_units(graph, activation_grids(graph)) if graph.module is not None else ()
    inputs = example_inputs(graph, example)
    state = {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
    stored = facts("f32", inputs, units, metadata)
    scales = _to_integers(state, plan, tensors)
    if scales:
        stored[f"{KEY}.scales"] = json.dumps(sorted(scales))
        state |= {SCALE_OF + address: scale for address, scale in scales.items()}
    write_atomic_with(path, lambda tmp: save_file(state, tmp, metadata=stored))
    return Artifact(
        path=path,
        runtime="pytorch",
        sha=content_sha(path),
        precision="f32",
        inputs=inputs,
        units=units,
        metadata=dict(metadata),
        module=model,
    )


def _to_integers(
    state: dict[str, Tensor], plan: Plan, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Replace weights by their integers, where these give the very same floats; their scales."""
    out: dict[str, Tensor] = {}
    for edit in plan.of_kind("bits"):
        weight = state.get(edit.at)
        if edit.role != "weight" or weight is None or edit.group or edit.axis not in (None, 0):
            continue
        if not 1 < edit.bits <= CONTAINER_BITS or not edit.signed:
            continue
        grid = integers(weight, edit, tensors)
        if not grid.zero_point.any() and torch.equal(grid.floats(), weight):
            state[edit.at], out[edit.at] = grid.q.to(torch.int8), grid.scale.float().contiguous()
    return out
