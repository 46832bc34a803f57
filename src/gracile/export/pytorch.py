"""Write a model's weights for PyTorch itself: safetensors, with the units and facts inside."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gracile.benchmark.artifact import KEY, Artifact, artifact_path, content_sha, facts
from gracile.benchmark.csr import packed_rows
from gracile.core.plan import Plan
from gracile.core.state import write_atomic_with
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

    PyTorch computes in floats, so the precision is "f32" whatever the plan says. Tensors with so
    many zeros that it makes them smaller are written by rows, see `packed_rows`.
    """
    from safetensors.torch import save_file

    path = artifact_path(path, "pytorch")
    graph = capture(model, example)
    units = choose_units(graph, activation_grids(graph)) if graph.module is not None else ()
    inputs = example_inputs(graph, example)
    state = {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
    stored = facts("f32", inputs, units, metadata)
    written, shapes = packed_rows(state)
    if shapes:
        stored[f"{KEY}.rows"] = json.dumps(shapes)
    write_atomic_with(path, lambda tmp: save_file(written, tmp, metadata=stored))
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
