"""Weights from a file into a network, and the fingerprint of the network a Plan was made for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gracile.core.state import sha256
from gracile.errors import UserError, nearest

SHOWN = 3  # names listed per kind of misfit
NESTED = ("state_dict", "model", "model_state_dict")  # where training scripts keep the weights


def architecture_sha(model: nn.Module) -> str:
    """Hash of the parameters' names and shapes; values and order do not matter.

    Args:
        model: the bare network, before overlays.

    Returns:
        64 hexadecimal digits.
    """
    shapes = sorted([name, list(p.shape)] for name, p in model.named_parameters())
    return sha256(json.dumps(shapes))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy all weights of a file into the model, in place. Nothing may be missing or left over.

    BatchNorm's `num_batches_tracked` may be missing. A `module.` before every name, which
    DataParallel leaves behind, is dropped.

    Args:
        model: the bare network.
        path: `.safetensors`; or `.pt`, `.pth`, `.bin`, read without running code from the file: a
            state dict, or a dict that holds one as `state_dict`, `model` or `model_state_dict`.

    Raises:
        UserError: no such file, another format, or names and shapes that do not fit; the first of
            each are listed with the nearest.
    """
    path = Path(path)
    tensors = _plain_names(_read(path))
    problems = _misfits(model.state_dict(), tensors)
    if problems:
        kind = type(model).__name__
        raise UserError(f"{path} does not fit {kind}: {'; '.join(problems)}.")
    model.load_state_dict(tensors, strict=False)  # proved complete above


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        what = "is a folder, not a weights file" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return _read_torch(path)
    raise UserError(f"{path}: weights must be a .safetensors, .pt, .pth or .bin file.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as e:
        raise UserError(f"{path}: not a safetensors file ({e}).") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a broken stream can fail in any way
        raise UserError(
            f"{path}: not a file of tensors that can be read without running code from it "
            f"({type(e).__name__}). Save torch.save(model.state_dict(), ...) or safetensors."
        ) from None
    for candidate in (value, *(value.get(k) for k in NESTED if isinstance(value, Mapping))):
        if _is_state(candidate):
            return dict(candidate)
    raise UserError(f"{path}: no state dict in it: expected a dict of tensors by name.")


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if tensors and all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): t for name, t in tensors.items()}
    return tensors


def _misfits(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    missing = [n for n in wanted if n not in given and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in given if n not in wanted]
    shapes = [
        f"'{n}' is {tuple(given[n].shape)} in the file, {tuple(wanted[n].shape)} in the model"
        for n in wanted
        if n in given and given[n].shape != wanted[n].shape
    ]
    out = []
    if missing:
        hint = nearest(missing[0], unexpected).rstrip(".") if unexpected else ""
        hint = hint.replace(" Nearest:", ", nearest in the file:") if "Nearest" in hint else ""
        out.append(f"{len(missing)} missing ({_some(missing)}{hint})")
    if unexpected:
        out.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    if shapes:
        more = ", ..." if len(shapes) > SHOWN else ""
        out.append(f"{len(shapes)} of another shape ({', '.join(shapes[:SHOWN])}{more})")
    return out


def _some(names: list[str]) -> str:
    return ", ".join(f"'{n}'" for n in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
