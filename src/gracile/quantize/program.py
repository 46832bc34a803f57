"""The integer program of mixed precision: the best choice for each unit that all limits allow."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gracile.errors import MissingExtra

LARGEST = 1e3  # what the largest loss is scaled to, far above the solver's absolute gap of 1e-6
SLACK = 1e-9  # rounding of sums; the solver's own tolerance is 1e-6

Table = Sequence[Sequence[float]]  # [unit][choice]


@dataclass(frozen=True)
class Resource:
    """What a limit is on.

    Attributes:
        name: for messages.
        costs: of each choice of each unit, >= 0.
        limit: for the sum over all units.
    """

    name: str
    costs: Table
    limit: float

    def of(self, chosen: Sequence[int]) -> float:
        """What these choices cost together."""
        return sum(row[c] for row, c in zip(self.costs, chosen, strict=True))


def assign(
    losses: Table,
    resources: Sequence[Resource],
    kinds: Sequence[Sequence[int]] = (),
    ties: Sequence[Sequence[int]] = (),
) -> list[int] | None:
    """One choice for each unit, with the least sum of losses within all limits.

    min sum_i loss[i][c_i]  subject to  sum_i cost_r[i][c_i] <= limit_r for every resource r and
    kind[i][c_i] = kind[j][c_j] for all i, j that are tied; by HiGHS' branch and bound, to the end.

    Args:
        losses: of each choice of each unit; units may have different numbers of choices.
        resources: with costs of the same shape.
        kinds: of each choice of each unit; only needed for ties.
        ties: units whose choices must be of one kind.

    Returns:
        Index of each unit's choice; None where no assignment keeps to all limits.

    Raises:
        MissingExtra: SciPy is not installed.

    Source:
        Yao et al. 2021, arXiv:2011.10680, eq. 8-9 (HAWQ-v3).

    >>> assign([[3, 0], [1, 0]], [Resource("size", [[1, 2], [1, 2]], 3)])
    [1, 0]
    """
    over: list[list[int]] = []  # within the solver's tolerance of a limit, but beyond it
    while True:
        chosen = _solve(losses, resources, kinds, ties, over)
        if chosen is None or all(r.of(chosen) <= r.limit * (1 + SLACK) for r in resources):
            return chosen
        over.append(chosen)


def least(
    resource: Resource, kinds: Sequence[Sequence[int]] = (), ties: Sequence[Sequence[int]] = ()
) -> float:
    """The smallest sum of one resource that ties allow; infinite where they allow nothing."""
    chosen = assign(resource.costs, [], kinds, ties)
    return float("inf") if chosen is None else resource.of(chosen)


def _solve(
    losses: Table,
    resources: Sequence[Resource],
    kinds: Sequence[Sequence[int]],
    ties: Sequence[Sequence[int]],
    forbidden: Sequence[Sequence[int]],
) -> list[int] | None:
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise MissingExtra("choosing bits within a limit", "solver") from None
    ends = np.cumsum([0, *(len(row) for row in losses)])
    size = int(ends[-1])
    rows: list[NDArray[np.float64]] = []
    low: list[float] = []
    high: list[float] = []

    def add(row: NDArray[np.float64], lower: float, upper: float) -> None:
        rows.append(row)
        low.append(lower)
        high.append(upper)

    for i in range(len(losses)):
        one = np.zeros(size)
        one[ends[i] : ends[i + 1]] = 1
        add(one, 1, 1)
    for r in resources:
        costs = np.concatenate([np.asarray(row, float) for row in r.costs])
        scale = costs.max() or 1.0
        add(costs / scale, -np.inf, r.limit / scale)
    for chosen in forbidden:
        row = np.zeros(size)
        row[ends[:-1] + chosen] = 1
        add(row, -np.inf, len(chosen) - 1)
    for first, *others in ties:
        for other in others:
            for kind in dict.fromkeys([*kinds[first], *kinds[other]]):
                row = np.zeros(size)
                row[ends[first] : ends[first + 1]] = [k == kind for k in kinds[first]]
                row[ends[other] : ends[other + 1]] -= [k == kind for k in kinds[other]]
                add(row, 0, 0)
    goal = np.concatenate([np.asarray(row, float) for row in losses])
    goal = goal * (LARGEST / (np.abs(goal).max() or 1.0))
    found = milp(
        goal,
        integrality=np.ones(size),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(np.stack(rows), low, high),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    return [int(np.argmax(found.x[a:b])) for a, b in pairwise(ends)]
