"""Ramps: how a level moves from `initial` to `final` while progress goes from 0 to 1."""

from gracile.core.kinds import ramp


@ramp("constant", source="one-shot")
def constant(progress: float, initial: float, final: float) -> float:
    """The final level at once.

    >>> constant(0.0, 0.1, 0.5)
    0.5
    """
    return final


@ramp("linear", source="Distiller, linear schedule")
def linear(progress: float, initial: float, final: float) -> float:
    """Equal steps.

    >>> linear(0.5, 0.0, 0.5)
    0.25
    """
    return initial + (final - initial) * progress


@ramp("cubic", source="Zhu & Gupta 2017, arXiv:1710.01878, eq. 1 (automated gradual pruning)")
def cubic(progress: float, initial: float, final: float) -> float:
    """Fast at first, slow towards the end, when little is left to prune.

    s = final + (initial - final) (1 - progress)^3

    >>> cubic(0.5, 0.0, 0.8)
    0.7
    """
    return final + (initial - final) * (1.0 - progress) ** 3


agp = ramp("agp", source="Zhu & Gupta 2017, arXiv:1710.01878, eq. 1; the name Distiller uses")(
    cubic
)
