"""Ramps: how a level moves from `initial` to `final` while progress goes from 0 to 1."""

from bisect import bisect_right
from collections.abc import Sequence
from math import pow

from gracile.core.kinds import ramp
from gracile.core.rules import is_number
from gracile.errors import UserError

_NEAR = 1e-9  # a step at 0.3 is reached by 0.7 - 0.4 as well


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


@ramp("exponential", source="NNCF, exponential schedule")
def exponential(progress: float, initial: float, final: float) -> float:
    """What is left shrinks by the same factor at every step: fast at first, then slower.

    1 - s = (1 - initial) ((1 - final) / (1 - initial))^progress

    Raises:
        UserError: a level is not below 1.

    >>> exponential(0.5, 0.0, 0.75)
    0.5
    """
    if max(initial, final) >= 1:
        raise UserError(
            f"exponential needs levels below 1, got {initial} and {final}. Take another ramp."
        )
    return 1.0 - (1.0 - initial) * pow((1.0 - final) / (1.0 - initial), progress)


@ramp("polynomial", source="NNCF, polynomial schedule")
def polynomial(
    progress: float, initial: float, final: float, *, power: float = 0.9, concave: bool = True
) -> float:
    """A power of the progress; concave with power 3 is `cubic`.

    Args:
        progress, initial, final: as everywhere.
        power: 1 is linear; larger bends more.
        concave: the power is of what is still to go, (1 - progress)^power, so that with power > 1
            the level moves fast at first; otherwise of progress itself, and it moves fast at last.

    Raises:
        UserError: the power is not positive.

    >>> polynomial(0.5, 0.0, 0.8, power=2, concave=False)
    0.2
    """
    if power <= 0:
        raise UserError(f"polynomial needs a power of more than 0, got {power}. 1 is linear.")
    if concave:
        return final + (initial - final) * pow(1.0 - progress, power)
    return initial + (final - initial) * pow(progress, power)


@ramp("exponential_with_bias", source="He et al. 2018, arXiv:1808.07471; NNCF")
def exponential_with_bias(
    progress: float, initial: float, final: float, *, early: float = 0.125, reach: float = 0.75
) -> float:
    """a exp(-k progress) + b through both ends and one point: most of the way at its beginning.

    Args:
        progress, initial, final: as everywhere.
        early: a progress near the beginning.
        reach: the share of the way that is gone there. The sources ask for three quarters of
            `final` itself: with `initial` 0 that is the default, otherwise
            (0.75 final - initial) / (final - initial).

    Raises:
        UserError: not 0 < early < reach < 1.

    >>> exponential_with_bias(0.125, 0.0, 0.4)
    0.3
    """
    if not 0 < early < reach < 1:
        raise UserError(
            f"exponential_with_bias needs 0 < early < reach < 1, got {early} and {reach}."
        )
    # With z = exp(-k early): share of the way = (1 - z^(progress / early)) / (1 - z^(1 / early)).
    low, high = 0.0, 1.0
    for _ in range(60):  # the share at `early` falls from 1 to `early` while z goes from 0 to 1
        z = (low + high) / 2
        if (1 - z) > reach * (1 - pow(z, 1 / early)):
            low = z
        else:
            high = z
    way = (1 - pow(low, progress / early)) / (1 - pow(low, 1 / early))
    return initial + (final - initial) * way


@ramp("multistep", source="NNCF, multistep schedule")
def multistep(
    progress: float,
    initial: float,
    final: float,
    *,
    steps: Sequence[float] = (0.5,),
    levels: Sequence[float] | None = None,
) -> float:
    """Stairs: `initial` until the first step, `final` from the last one on.

    Args:
        progress, initial, final: as everywhere.
        steps: where the level changes, as shares of the way in (0, 1], rising.
        levels: the levels between, one fewer than steps; default equally far apart.

    Raises:
        UserError: steps that do not rise, or levels of another number or out of order.

    >>> multistep(0.5, 0.1, 0.7, steps=[0.25, 0.75])
    0.4
    """
    if not steps or not _rises(steps) or steps[0] <= 0 or steps[-1] > 1:
        raise UserError(
            f"multistep needs steps that rise in (0, 1], got {steps!r}. Write steps: [0.3, 0.6]."
        )
    n = len(steps)
    if levels is None:
        return linear(bisect_right(steps, progress + _NEAR) / n, initial, final)
    stairs = (initial, *levels, final) if isinstance(levels, (list, tuple)) else ()
    if len(stairs) != n + 1 or not (_rises(stairs) or _rises(stairs[::-1])):
        raise UserError(
            f"multistep needs {n - 1} level(s) from {initial} to {final} in order, one fewer than "
            f"steps, got {levels!r}."
        )
    return float(stairs[bisect_right(steps, progress + _NEAR)])


def _rises(values: object) -> bool:
    return (
        isinstance(values, (list, tuple))
        and all(is_number(v) for v in values)
        and list(values) == sorted(values)
    )
