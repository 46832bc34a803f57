"""Checkpoints without pickle: nested state as JSON with its tensors in safetensors.

Two kinds: the state of a running session (`save_state`, `load_state`), and the finished model
(`save_model`, `load_model`): architecture + Plan + weights, loaded without code from the file.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gracile.core.plan import Plan
from gracile.core.result import Result
from gracile.core.state import write_atomic_with, write_json
from gracile.errors import UserError
from gracile.graph import surgery
from gracile.graph.additions import structural
from gracile.models.spec import ModelSpec, architecture_sha, registered
from gracile.quantize.restore import simulate
from gracile.train.packing import PARTS, Line, lines, unpacked
from gracile.train.packing import packed as packed_tensors

FORMAT = 1
WEIGHTS, PACKED = "model.safetensors", "packed.safetensors"
REPLAYED = ("add", "remove", "skip", "factorize", "decompose", "mask", "bits")  # kinds of edits
REBUILT = (*REPLAYED, "share", "replace", "exit")  # masks, grids, codebooks: in the weights
_SKELETON = "gracile.skeleton"


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts, lists and tuples of JSON values and tensors as one safetensors file."""
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_pack(state, tensors))
    write_atomic_with(
        path, lambda tmp: save_file(tensors, tmp, metadata={_SKELETON: skeleton, "format": "pt"})
    )


def load_state(path: Path, device: torch.device | str = "cpu") -> Any:
    """Inverse of `save_state`.

    Raises:
        UserError: the file is missing or not such a file.
    """
    tensors, metadata = read_tensors(path, device)
    try:
        return _unpack(json.loads(metadata[_SKELETON]), tensors)
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: not a gracile state file.") from None


def read_tensors(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        UserError: the file is missing, torn or of another format.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            return {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except SafetensorError as e:
        raise UserError(f"{path}: not a safetensors file ({e}).") from None


def save_model(folder: str | Path, result: Result, *, packed: bool = False) -> None:
    """Write `model.safetensors`, `model.json` and `plan.json` of a finished compression.

    Args:
        folder: made if needed.
        result: of the compression.
        packed: write `packed.safetensors` in the place of `model.safetensors`: the same tensors in
            fewer bytes (see `gracile.export.packed`), which `load_model` reads as well.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = finished_tensors(result)
    if packed:
        write_packed(folder / PACKED, weights, result.plan)
    else:
        write_atomic_with(
            folder / WEIGHTS, lambda tmp: save_file(weights, tmp, metadata={"format": "pt"})
        )
    write_json(
        folder / "model.json",
        {"format": FORMAT, "architecture": result.plan.architecture.model_dump()},
    )
    result.plan.save(folder / "plan.json")


def finished_tensors(result: Result) -> dict[str, Tensor]:
    """All tensors of a finished model, on the CPU: its state, and what the Plan's keys name."""
    state = {k: v.detach().cpu().contiguous().clone() for k, v in result.model.state_dict().items()}
    extra = {k: v.contiguous() for k, v in result.tensors.items() if k not in state}
    return {**{k: v for k, v in state.items() if not k.startswith("_quantizers.")}, **extra}


def write_packed(path: Path, tensors: Mapping[str, Tensor], plan: Plan) -> int:
    """Write the tensors of a finished model in few bytes; returns the bytes of the file."""
    found = packed_tensors(tensors, plan)
    metadata = {"format": "pt", **found.metadata()}
    write_atomic_with(path, lambda tmp: save_file(found.tensors, tmp, metadata=metadata))
    return path.stat().st_size


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder: of `model.safetensors`, else of `packed.safetensors`.

    Raises:
        UserError: neither is there, or it is damaged.
    """
    path = folder / WEIGHTS
    if not path.exists() and (folder / PACKED).exists():
        path = folder / PACKED
    tensors, metadata = read_tensors(path)
    return unpacked(tensors, metadata, path)


@dataclass(frozen=True)
class Inspected:
    """What a file of tensors holds.

    Attributes:
        path: of the file.
        file_bytes: all of it.
        weight_bytes: of the weights in their own types, as a plain file would hold them.
        lines: one for each tensor.
    """

    path: Path
    file_bytes: int
    weight_bytes: int
    lines: list[Line]


def inspected(path: Path) -> Inspected:
    """Look into a model's folder (its `packed.safetensors`, if there is one) or a file of tensors.

    Raises:
        UserError: no such file, or a damaged one.
    """
    if path.is_dir():
        path = path / PACKED if (path / PACKED).exists() else path / WEIGHTS
    stored, metadata = read_tensors(path)
    whole = unpacked(stored, metadata, path)
    found = lines(stored, whole, metadata)
    keyed = _keyed(path.parent / "plan.json")
    weights = sum(line.plain_bytes for line in found if line.name not in keyed)
    return Inspected(path, path.stat().st_size, weights, found)


def _keyed(path: Path) -> set[str]:
    """Names of the tensors that only the edits of a Plan name; none without a Plan."""
    if not path.exists():
        return set()
    parts = {
        "mask": ("",),
        "share": tuple(f".{part}" for part in PARTS),
        "bits": (".scale", ".zero_point", ".threshold"),
    }
    return {f"{e.key}{p}" for e in Plan.load(path) for p in parts.get(e.kind, ())}


@dataclass(frozen=True)
class LoadedModel:
    """A compressed model read back: what computes, and what it was made from."""

    model: nn.Module
    plan: Plan
    tensors: dict[str, Tensor]


def load_model(
    folder: str | Path, example: Tensor, *, factory: Callable[[], ModelSpec] | None = None
) -> LoadedModel:
    """Rebuild a finished model from its folder: architecture, then Plan, then weights.

    Args:
        folder: a run directory, or any folder with the three files of `save_model`, packed or not.
        example: an input batch, to capture the graph that carries activation quantizers.
        factory: makes the original network; default by the registered name in plan.json. Needed
            for a network from the user's own file: a file names no code to run.

    Raises:
        UserError: a file is missing or does not fit the architecture.
    """
    folder = Path(folder)
    plan = Plan.load(folder / "plan.json")
    arch = plan.architecture
    model = (factory() if factory is not None else registered(arch)).model
    if architecture_sha(model) != arch.sha256:
        raise UserError(
            f"{folder}: the plan was made for another '{arch.name}' (parameter shapes differ)."
        )
    check_kinds(plan, "rebuild", f"{folder / 'plan.json'}: ")
    model = surgery.apply(model, structural(plan), example=example)
    tensors = stored_tensors(folder)
    names = set(model.state_dict())
    extra = {k: v for k, v in tensors.items() if k not in names}
    missing = sorted(names - set(tensors))
    if missing:
        raise UserError(f"{folder / 'model.safetensors'}: lacks '{missing[0]}' of {arch.name}.")
    try:
        model.load_state_dict({k: v for k, v in tensors.items() if k in names})
    except RuntimeError as e:
        raise UserError(f"{folder / 'model.safetensors'} does not fit plan.json: {e}") from None
    model.eval()
    if any(e.role in ("input", "output") for e in plan.of_kind("bits")):
        return LoadedModel(simulate(model, plan, extra, example).eval(), plan, extra)
    return LoadedModel(model, plan, extra)


def check_kinds(plan: Plan, verb: str, where: str = "", known: tuple[str, ...] = REBUILT) -> None:
    """Refuse a Plan with an edit of a kind that only another version knows.

    Raises:
        UserError: names the edit, behind `where`; `verb` is what was to be done with it.
    """
    for edit in plan:
        if edit.kind not in known:
            way = "Run the recipe without it" if edit.kind in REBUILT else "Use a newer gracile"
            raise UserError(
                f"{where}edit {edit.id} is of kind '{edit.kind}', which this version cannot {verb} "
                f"(it can: {', '.join(known)}). {way}."
            )


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = f"t{len(tensors)}"
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"@": "tensor", "key": key}
    if isinstance(value, Mapping):
        return {
            "@": "map",
            "items": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()],
        }
    if isinstance(value, tuple):
        return {"@": "tuple", "items": [_pack(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_pack(v, tensors) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot store a {type(value).__name__} in a checkpoint")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    match value["@"]:
        case "tensor":
            return tensors[value["key"]]
        case "map":
            return {_unpack(k, tensors): _unpack(v, tensors) for k, v in value["items"]}
        case "tuple":
            return tuple(_unpack(v, tensors) for v in value["items"])
    raise ValueError("unknown container")
