"""Make the CUDA-built torchvision importable beside CPU torch; for benchmarks and tests only.

torchvision's extension needs libraries of the CUDA build and does not load; torchvision swallows
that, then raises because the operators it describes were never defined. Defining their schemas
first is enough for everything but post-processing, and `nms` gets a kernel in plain torch.
"""

import sys
from types import ModuleType

import torch
from torch import Tensor

_SCHEMAS = (
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def torchvision() -> ModuleType:
    """The torchvision package, with the operators of its extension declared where it has none.

    Raises:
        ImportError: torchvision is not installed.
    """
    global _library
    if _library is None and torch.version.cuda is None and "torchvision" not in sys.modules:
        _library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            _library.define(schema)
        _library.impl("nms", _nms, "CPU")
    import torchvision
    import torchvision.models

    if _library is not None:
        torchvision.extension._has_ops = lambda: True
    package: ModuleType = torchvision
    return package


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes (N, 4) that no better box overlaps by more than the threshold."""
    order = scores.argsort(descending=True)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while order.numel():
        best, rest = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[rest, :2])
        high = torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        both = (high - low).clamp(min=0).prod(1)
        order = rest[both / (area[best] + area[rest] - both) <= threshold]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.long)
