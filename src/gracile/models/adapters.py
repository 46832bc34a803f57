"""Networks of other libraries: `torchvision:NAME`, `timm:NAME`, `hf:DIR`, where they are installed.

The libraries are imported when such a model is asked for. torchvision's wheel for CUDA fails beside
a CPU build of torch and takes timm and transformers, which import it, down with it; that is mended.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gracile.errors import MissingExtra, UserError, nearest

# What torchvision describes at import even if its C++ half, which defines it, could not be loaded.
UNDEFINED = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_mended: list[torch.library.Library] = []  # a Library undoes its definitions when it is freed


def from_torchvision(name: str) -> Callable[..., nn.Module]:
    """A factory of torchvision's model `name`, without pretrained weights, also in its backbone.

    Raises:
        MissingExtra: torchvision is not installed.
        UserError: it cannot be imported, or has no such model.
    """
    torchvision = _import("torchvision", f"torchvision:{name}", "torchvision")
    known = torchvision.models.list_models()
    if name not in known:
        raise UserError(f"torchvision has no model '{name}'.{nearest(name, known)}")
    builder = torchvision.models.get_model_builder(name)
    untrained: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        untrained["weights_backbone"] = None  # detection and segmentation would download it

    def factory(*, num_classes: int | None = None, **options: Any) -> nn.Module:
        chosen = {} if num_classes is None else {"num_classes": num_classes}
        model: nn.Module = builder(**untrained, **chosen, **options)
        return model

    return factory


def from_timm(name: str) -> Callable[..., nn.Module]:
    """A factory of timm's model `name`, without pretrained weights.

    Raises:
        MissingExtra: timm is not installed.
        UserError: it cannot be imported, or has no such model.
    """
    timm = _import("timm", f"timm:{name}", "timm")
    if not timm.is_model(name):
        raise UserError(f"timm has no model '{name}'.{nearest(name, timm.list_models())}")

    def factory(*, num_classes: int | None = None, **options: Any) -> nn.Module:
        chosen = {} if num_classes is None else {"num_classes": num_classes}
        model: nn.Module = timm.create_model(name, pretrained=False, **chosen, **options)
        return model

    return factory


def from_hf(folder: str) -> Callable[..., nn.Module]:
    """A factory of an image classifier that transformers saved in a local folder, with its weights.

    Only safetensors are read, no code from the folder is run and nothing is downloaded.

    Raises:
        MissingExtra: transformers is not installed.
        UserError: it cannot be imported, or no such folder.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"hf:{folder}: must be a local folder with config.json and model.safetensors."
        )
    transformers = _import("transformers", f"hf:{folder}", "hf")

    def factory(*, num_classes: int | None = None) -> nn.Module:
        network = transformers.AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        if num_classes not in (None, network.config.num_labels):
            raise UserError(
                f"hf:{folder} was saved with {network.config.num_labels} classes, the data has "
                f"{num_classes}; fine-tune it on this data first."
            )
        return Logits(network)

    return factory


class Logits(nn.Module):
    """Make a transformers classifier map a tensor to a tensor.

    Args:
        network: called with `pixel_values`, returns an object with `logits`.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, classes)."""
        logits: Tensor = self.network(pixel_values=x).logits
        return logits


def _import(package: str, what: str, extra: str) -> ModuleType:
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(f"'{what}'", extra)
    try:
        if importlib.util.find_spec("torchvision") is not None:
            _import_torchvision()  # first: the other two import it and break with it
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as e:
        reason = str(e).strip().split("\n", 1)[0]
        raise UserError(
            f"'{what}': {package} is installed but cannot be imported "
            f"({type(e).__name__}: {reason}). "
            f"Install a {package} that fits torch {torch.__version__}."
        ) from e


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as e:
        if (
            not any(f"torchvision::{name} does not exist" in str(e) for name in UNDEFINED)
            or _mended
        ):
            raise
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]  # half imported
        library = torch.library.Library("torchvision", "DEF")
        for name in UNDEFINED:
            library.define(name + SCHEMA)
        _mended.append(library)
        importlib.import_module("torchvision")
