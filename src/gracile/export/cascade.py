"""Write a network with early exits: a file for each stage, and `cascade.json`, which joins them.

Whatever a runtime's exporter does with a network it does with each stage, so grids, units and
proofs are the same; runtimes have no operator that stops in the middle.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gracile import registry
from gracile.benchmark.artifact import CASCADE, Artifact, content_sha
from gracile.core.plan import Plan
from gracile.core.state import write_atomic
from gracile.errors import UserError, nearest
from gracile.export.prepare import example_inputs
from gracile.graph.capture import capture
from gracile.graph.stages import Stage, handed_on, input_names, stages
from gracile.nn.exits import choice_of

FORMAT = 1
RUNTIMES = ("onnxruntime", "openvino")


def check_runtime(runtime: str) -> None:
    """Refuse a runtime whose artifacts cannot be the stages of a cascade.

    Raises:
        UserError: names those that can.
    """
    if runtime not in RUNTIMES:
        raise UserError(
            f"a network with early exits runs in {' and '.join(RUNTIMES)}, not in '{runtime}'."
            f"{nearest(runtime, RUNTIMES)} In PyTorch: gracile.early_exit.cascade.Cascade."
        )


def exported(
    runtime: str,
    model: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    *,
    example: Tensor | tuple[Tensor, ...],
    path: Path,
    metadata: Mapping[str, Any],
) -> Artifact:
    """Write a model for a runtime: as one file, or as a cascade if it has exits.

    Args:
        runtime: registered.
        model, plan, tensors: of a Result.
        example: an input batch of at least 2 samples.
        path: folder.
        metadata: written into the files.

    Raises:
        UserError: the runtime takes no cascades, or what its exporter refuses.
    """
    export = registry.get("exporter", runtime).obj
    if choice_of(model) is None:
        return export(  # type: ignore[no-any-return]
            model, plan, tensors, example=example, path=path, metadata=metadata
        )
    check_runtime(runtime)
    model.eval()
    choice, found = choice_of(model), stages(model, example)
    assert choice is not None
    names = input_names(found)
    parts = []
    for k, (stage, (given, _)) in enumerate(
        zip(found, handed_on(found, example, names), strict=True)
    ):
        parts.append(
            export(
                stage.module,
                _of_stage(plan, stage),
                tensors,
                example=given if len(given) > 1 else given[0],
                path=path / f"stage{k}",
                metadata={**metadata, "stage": k},
            )
        )
    every = {part.precision for part in parts}
    left: dict[str, Any] = {}
    for part in parts:
        for key in ("left_float", "left_wider"):
            left.setdefault(key, {}).update(part.metadata.get(key, {}))
    facts: dict[str, Any] = {
        "format": FORMAT,
        "runtime": runtime,
        "precision": every.pop() if len(every) == 1 else "mixed",
        "inputs": example_inputs(capture(model, example), example),
        "stages": [
            {
                "file": part.path.relative_to(path).as_posix(),
                "reads": list(stage.reads),
                "makes": list(stage.makes),
                "threshold": float(choice.thresholds[k]) if k + 1 < len(found) else None,
                "temperature": float(choice.temperatures[k]) if k + 1 < len(found) else 1.0,
            }
            for k, (stage, part) in enumerate(zip(found, parts, strict=True))
        ],
        "metadata": {**metadata, **{k: v for k, v in left.items() if v}},
    }
    file = path / CASCADE
    write_atomic(file, (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode())
    return Artifact(
        path=file,
        runtime=runtime,
        sha=content_sha(file),
        precision=facts["precision"],
        inputs=facts["inputs"],
        metadata=facts["metadata"],
    )


def _of_stage(plan: Plan, stage: Stage) -> Plan:
    """The edits that say how a stage's own tensors are written."""
    here = {n for n, _ in stage.module.named_parameters(remove_duplicate=False)}
    here |= {str(n.meta["id"]) for n in stage.module.graph.nodes}
    edits = [e for e in plan if e.kind in ("bits", "share", "mask") and e.at in here]
    return Plan(architecture=plan.architecture, edits=edits)
