"""Loss-aware post-training quantization: all scales together, by the loss on calibration data.

Nahshan et al. 2019, arXiv:1911.07190. At few bits what one tensor should clip depends on what the
others do; the loss is searched over all scales by Powell's method. Different from the paper, which
begins on a curve of Lp norms: here the scales begin where the observers put them, and go first all
of the activations together, then all of the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gracile.quantize.engine import Quantizer
from gracile.quantize.powell import Vector, powell

WIDEST, NARROWEST = 1.0, -4.0  # of a factor, as powers of two


@dataclass(frozen=True)
class _Scale:
    """A scale that is searched: the tensors that hold it, and its value at the start."""

    held: tuple[Tensor, ...]
    start: Tensor

    def set(self, power: float) -> None:
        for scale in self.held:
            scale.copy_(self.start * 2.0**power)


def tune(
    quantizer: Quantizer, loss: Callable[[], float], evaluations: int
) -> tuple[float, float, dict[str, float]]:
    """Set all scales of a quantizer so that a loss is low. Zero points stay.

    A weight with one scale per channel keeps their ratios.

    Args:
        quantizer: laid, its grids fixed.
        loss: of the network as it is.
        evaluations: how often it may be asked for, 1 or more.

    Returns:
        The loss before and after, and id of each activation -> factor of its scale.
    """
    assert quantizer.placement is not None
    groups = list(quantizer.sharing().values())
    holders = [tuple(quantizer.quantizers[a.id] for a in members) for members in groups]
    scales = [_Scale(tuple(q.scale for q in held), held[0].scale.clone()) for held in holders]
    kinds = [0] * len(scales)
    for grid in quantizer.grids.values():
        assert grid.scale is not None
        grid.scale = grid.scale.clone()
        scales.append(_Scale((grid.scale,), grid.scale.clone()))
        kinds.append(1)
    asked: dict[bytes, float] = {}

    def at(powers: Vector) -> float:
        for scale, power in zip(scales, powers, strict=True):
            scale.set(float(power))
        key = powers.tobytes()
        if key not in asked:
            asked[key] = loss()
        return asked[key]

    start = np.zeros(len(scales))
    whole = [np.array(kinds) == k for k in (0, 1) if k in kinds]
    best, after = powell(
        at, start, first=whole, low=NARROWEST, high=WIDEST, evaluations=evaluations
    )  # fmt: skip
    for scale, power in zip(scales, best, strict=True):
        scale.set(float(power))
    factors = dict(zip([tuple(a.id for a in members) for members in groups], best, strict=False))
    return asked[start.tobytes()], after, {id: 2.0**p for ids, p in factors.items() for id in ids}
