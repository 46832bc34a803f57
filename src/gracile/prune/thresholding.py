"""What methods that set a threshold, and not a share, measure before it and tell after it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def spread(values: Tensor) -> float:
    """Standard deviation (n - 1), 0 for a single value."""
    return float(values.std()) if values.numel() > 1 else 0.0


def tell_share(s: Any, id: str, masks: Mapping[str, Tensor]) -> None:
    """Track the share of weights a method has masked; warn of a tensor it leaves nothing of."""
    kept = sum(int(keep.sum()) for keep in masks.values())
    total = sum(keep.numel() for keep in masks.values())
    s.track(f"sparsity/{id}", 1 - kept / total if total else 0.0)
    for address, keep in masks.items():
        if not keep.any():
            s.warn("nothing-left", f"'{id}' leaves nothing of '{address}': all of it is masked.")
