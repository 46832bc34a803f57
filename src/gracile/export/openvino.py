"""Write a model as OpenVINO IR (`.xml` and `.bin`), by way of its ONNX form; names are kept."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from gracile.benchmark.artifact import Artifact, Unit, artifact_path, content_sha, facts
from gracile.core.plan import Plan
from gracile.core.state import write_atomic
from gracile.errors import MissingExtra, UserError
from gracile.export.one_bit import with_kernels_of_one_bit
from gracile.export.onnx import to_onnx
from gracile.export.prepare import described, with_wider
from gracile.registry import register

_NUMBERED = re.compile(r"[A-Z]\w*_\d+")  # a name that OpenVINO made up


@register("exporter", "openvino", source="https://docs.openvino.ai, OpenVINO IR")
def export_openvino(
    model: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    example: Tensor | tuple[Tensor, ...],
    path: str | Path,
    metadata: Mapping[str, Any],
) -> Artifact:
    """Write `path` (`.xml`, or a folder) and its `.bin`; floats stay f32, never f16.

    Raises:
        UserError: the model cannot be captured or exported, or OpenVINO refuses it.
        MissingExtra: openvino or onnx is not installed.
    """
    try:
        import openvino as ov
    except ImportError:
        raise MissingExtra("exporting to OpenVINO", "openvino") from None
    import onnx

    prepared, proto = to_onnx(model, plan, tensors, example)
    path = artifact_path(path, "openvino")
    metadata = described(metadata, prepared)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.{os.getpid()}.") as folder:
        source, target = Path(folder) / "model.onnx", Path(folder) / path.name
        onnx.save(proto, source)
        try:
            converted = ov.convert_model(source)
        except RuntimeError as e:
            raise UserError(f"OpenVINO cannot convert the model: {e}") from e
        left = with_kernels_of_one_bit(converted, prepared)
        metadata = with_wider(metadata, left)
        units = visible(prepared.units, _names(converted))
        stored = facts(prepared.precision, prepared.inputs, units, metadata)
        for key, value in stored.items():
            converted.set_rt_info(value, key.split("."))
        _name_steadily(converted)
        ov.save_model(converted, target, compress_to_fp16=False)
        # The graph names its weights' file by its own name only: weights first, then the graph.
        for suffix in (".bin", ".xml"):
            write_atomic(path.with_suffix(suffix), target.with_suffix(suffix).read_bytes())
    return Artifact(
        path=path,
        runtime="openvino",
        sha=content_sha(path),
        precision=prepared.precision,
        inputs=prepared.inputs,
        units=units,
        metadata=metadata,
    )


def visible(units: Sequence[Unit], names: Collection[str]) -> tuple[Unit, ...]:
    """The units whose tensors a converted model still has.

    OpenVINO joins some operators for good (attention becomes one); a unit that is gone counts as
    part of the next one that is there.
    """
    out: list[Unit] = []
    waiting: tuple[str, ...] = ()
    for unit in units:
        if unit.id in names:
            out.append(Unit(unit.id, (*waiting, *unit.layers)))
            waiting = ()
        else:
            waiting = (*waiting, *unit.layers)
    return tuple(out)


def _name_steadily(model: Any) -> None:
    # OpenVINO numbers its own operators over the life of the process; the same model must give the
    # same file, whatever was converted before.
    for i, op in enumerate(model.get_ordered_ops()):
        if _NUMBERED.fullmatch(op.get_friendly_name()):
            op.set_friendly_name(f"{op.get_type_name()}_{i}")


def _names(model: Any) -> set[str]:
    return {n for op in model.get_ops() for port in op.outputs() for n in port.get_names()}
