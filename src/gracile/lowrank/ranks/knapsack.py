"""Ranks of all layers together: the least summed error within a budget, exactly."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gracile.core.kinds import rank_rule
from gracile.lowrank.budget import Table, checked_budget

BISECTIONS = 60
ROUNDING = 1e-9  # relative; sums in another order


@rank_rule(
    "knapsack",
    source="multiple-choice knapsack: Sinha & Zoltners 1979; states without dominated ones: "
    "Nemhauser & Ullmann 1969; for ranks Idelbayev & Carreira-Perpinan 2020, CVPR",
    joint=True,
)
def knapsack(
    tables: Sequence[Table],
    *,
    ratio: float = 0.5,
    of: str = "macs",
    by: str = "responses",
    candidates: int = 8,
) -> list[int]:
    """The candidate of each layer with the least sum of errors whose costs keep to the budget.

    Args:
        tables: candidates of each layer, the first one the layer as it is.
        ratio: of the sum of the layers' own costs, in (0, 1].
        of: macs, params, or latency of a table (option `latency` of the method).
        by: responses (relative squared error of what each layer gives on calibration data) or loss
            (how much the network's grows with this layer alone replaced).
        candidates: ranks tried for each layer.

    Returns:
        Index into each table.

    Raises:
        UserError: an option is out of range, or even the cheapest candidates cost more.
    """
    limit = checked_budget(tables, ratio, of, by, candidates)
    errors = [[c.error for c in table] for table in tables]
    return least_error(errors, [[c.cost for c in table] for table in tables], limit)


def least_error(
    errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], limit: float
) -> list[int]:
    """One choice for each row, with the least sum of errors and a sum of costs within the limit.

    Dynamic programming over rows. A state is a sum of costs and one of errors; of those with no
    smaller cost only ones with a smaller error go on, and only if the Lagrangian bound on what is
    left lets them beat the best choice known. Costs may be any numbers >= 0.

    Args:
        errors, costs: of each choice of each row, in the same shape.
        limit: at least the sum of the smallest costs.

    Returns:
        Index of the choice in each row; of equal errors the cheaper sum.

    >>> least_error([[0, 1, 4], [0, 2]], [[5, 3, 1], [5, 1]], 6)
    [0, 1]
    """
    e = [np.asarray(row, float) for row in errors]
    c = [np.asarray(row, float) for row in costs]
    price, best = _dual(e, c, limit)
    # what the rows behind cost at least, and the least of error + price x cost they can have
    left = np.cumsum([0.0, *(row.min() for row in reversed(c))])[::-1]
    bound = np.cumsum([0.0, *((a + price * b).min() for a, b in zip(e[::-1], c[::-1]))])[::-1]  # noqa: B905
    room = limit * (1 + ROUNDING)
    slack = ROUNDING * (abs(best) + sum(np.abs(row).max() for row in e))
    cost, error = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], int]] = []
    for i, (a, b) in enumerate(zip(e, c, strict=True), 1):
        cost, error = (cost[:, None] + b).ravel(), (error[:, None] + a).ravel()
        fits = cost + left[i] <= room
        fits &= error + bound[i] - price * (limit - cost) <= best + slack
        kept = np.flatnonzero(fits)
        kept = kept[np.lexsort((error[kept], cost[kept]))]
        lowest = np.minimum.accumulate(error[kept])
        fresh = np.ones(len(kept), bool)
        fresh[1:] = lowest[1:] < lowest[:-1]
        kept = kept[fresh]
        cost, error = cost[kept], error[kept]
        trail.append((kept, len(a)))
    at, picks = int(error.argmin()), []
    for kept, width in reversed(trail):
        at, pick = divmod(int(kept[at]), width)
        picks.append(pick)
    return picks[::-1]


def _dual(
    errors: Sequence[NDArray[np.float64]], costs: Sequence[NDArray[np.float64]], limit: float
) -> tuple[float, float]:
    """The smallest price of cost whose best choices keep to the limit, and their summed error."""

    def at(price: float) -> tuple[float, float]:
        picks = [np.lexsort((b, a + price * b))[0] for a, b in zip(errors, costs, strict=True)]
        chosen = list(zip(errors, costs, picks, strict=True))
        return sum(float(a[k]) for a, _, k in chosen), sum(float(b[k]) for _, b, k in chosen)

    if at(0.0)[1] <= limit:
        return 0.0, at(0.0)[0]
    high = 1.0
    while at(high)[1] > limit and high < 1e300:
        high *= 16
    low = 0.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] > limit else (low, middle)
    return high, at(high)[0]
