"""Ranks of all layers together, step by step: where a saving does the least harm."""

from collections.abc import Sequence
from itertools import permutations

from gracile.core.kinds import rank_rule
from gracile.lowrank.budget import Table, checked_budget

BETTER = 1e-12  # an exchange must gain more than rounding


@rank_rule(
    "sensitivity",
    source="Denton et al. 2014, arXiv:1404.0736 (layers by their effect on the network); greedy "
    "as NetAdapt, Yang et al. 2018, arXiv:1804.03230",
    joint=True,
)
def sensitivity(
    tables: Sequence[Table],
    *,
    ratio: float = 0.5,
    of: str = "macs",
    by: str = "loss",
    candidates: int = 8,
) -> list[int]:
    """Smaller ranks, one layer at a time, until the budget is kept; then exchanges between layers.

    Each step goes to the candidate whose error rises least for each unit of cost it saves. Then,
    as long as the sum of errors falls: one layer becomes better with what is left of the budget, or
    one better while another becomes cheaper. Not the optimum of `knapsack`, but its steps are ones
    a reader can follow.

    Args:
        tables, ratio, of, candidates: see `gracile.lowrank.ranks.knapsack.knapsack`.
        by: loss (how much the network's grows with this layer alone replaced, on labelled
            calibration data) or responses.

    Returns:
        Index into each table.

    Raises:
        UserError: an option is out of range, or even the cheapest candidates cost more.
    """
    limit = checked_budget(tables, ratio, of, by, candidates)
    return exchanged(tables, descended(tables, limit), limit)


def descended(tables: Sequence[Table], limit: float) -> list[int]:
    """From all layers as they are, by the least rise of error for each unit of cost saved.

    Args:
        tables: candidates of each layer.
        limit: for the sum of costs; the cheapest candidates must keep to it.
    """
    picks = [0] * len(tables)
    while _cost(tables, picks) > limit * (1 + 1e-9):
        steps = [
            ((c.error - now.error) / (now.cost - c.cost), i, k)
            for i, table in enumerate(tables)
            for now in [table[picks[i]]]
            for k, c in enumerate(table)
            if c.cost < now.cost
        ]
        _, i, k = min(steps)
        picks[i] = k
    return picks


def exchanged(tables: Sequence[Table], picks: Sequence[int], limit: float) -> list[int]:
    """The best change of one layer or of two, again and again, while the sum of errors falls."""
    picks = list(picks)
    while True:
        room = limit * (1 + 1e-9) - _cost(tables, picks)
        # for each layer, every other candidate: how error and cost change
        moves = [
            [(c.error - t[p].error, c.cost - t[p].cost, k) for k, c in enumerate(t) if k != p]
            for t, p in zip(tables, picks, strict=True)
        ]
        best: tuple[float, list[tuple[int, int]]] = (-BETTER, [])
        for i, mine in enumerate(moves):
            for error, cost, k in mine:
                if cost <= room and error < best[0]:
                    best = error, [(i, k)]
        for i, j in permutations(range(len(moves)), 2):
            for error, cost, k in moves[i]:
                if error >= 0:
                    continue
                for other, saved, n in moves[j]:
                    if error + other < best[0] and cost + saved <= room:
                        best = error + other, [(i, k), (j, n)]
        if not best[1]:
            return picks
        for i, k in best[1]:
            picks[i] = k


def _cost(tables: Sequence[Table], picks: Sequence[int]) -> float:
    return sum(table[k].cost for table, k in zip(tables, picks, strict=True))
