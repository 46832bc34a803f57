"""Loss-aware post-training quantization: all scales together, by the loss on calibration data.

Nahshan et al. 2019, arXiv:1911.07190. At few bits what one tensor should clip depends on what the
others do; the loss is searched over all scales by Powell's method. Different from the paper, which
begins on a curve of Lp norms: here the scales begin where the observers put them, and go first all
of the activations together, then all of the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gracile.errors import MissingExtra
from gracile.quantize.engine import Quantizer

Vector = NDArray[np.float64]
WIDEST, NARROWEST = 1.0, -4.0  # of a factor, as powers of two
FINE = {"xtol": 0.1, "ftol": 1e-3}  # a finer line search would spend the passes on one scale


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

    def at(powers: Vector) -> float:
        for scale, power in zip(scales, powers, strict=True):
            scale.set(float(power))
        return loss()

    trials = _Trials(at, evaluations)
    _search(trials, np.array([[k == kind for k in kinds] for kind in dict.fromkeys(kinds)], float))
    assert trials.best is not None
    for scale, power in zip(scales, trials.best, strict=True):
        scale.set(float(power))
    best = trials.best
    factors = dict(zip([tuple(a.id for a in members) for members in groups], best, strict=False))
    return trials.before, trials.after, {id: 2.0**p for ids, p in factors.items() for id in ids}


class _Spent(Exception):
    """All trials are used up."""


class _Trials:
    """The function that is searched: counts, remembers, and stops when all is spent.

    Attributes:
        best: where it was lowest.
        before, after: its first and its lowest value.
    """

    def __init__(self, f: Callable[[Vector], float], evaluations: int):
        self.f, self.left = f, evaluations
        self.best: Vector | None = None
        self.before = self.after = float("nan")
        self._asked: dict[bytes, float] = {}

    def __call__(self, x: Vector) -> float:
        x = np.asarray(x, np.float64)
        key = x.tobytes()
        if key not in self._asked:
            if self.left == 0:
                raise _Spent
            self.left -= 1
            value = float(self.f(x))
            self._asked[key] = value if np.isfinite(value) else float("inf")
        value = self._asked[key]
        if self.best is None:
            self.before = value
        if self.best is None or value < self.after:
            self.best, self.after = x.copy(), value
        return value


def _search(trials: _Trials, kinds: Vector) -> None:
    """Powell's method along whole kinds of scales, (kinds, scales), then along each scale."""
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise MissingExtra("tune: lapq", "solver") from None
    few, many = kinds.shape
    ends = (NARROWEST, WIDEST)
    try:
        trials(np.zeros(many))
        minimize(
            lambda t: trials(t @ kinds), np.zeros(few), method="Powell", bounds=[ends] * few,
            options=FINE,
        )  # fmt: skip
        minimize(trials, trials.best, method="Powell", bounds=[ends] * many, options=FINE)
    except _Spent:
        pass
