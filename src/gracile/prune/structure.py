"""Choosing the coupled channels to cut: by rank, to an exact target, at widths a runtime likes."""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from gracile.analyze.widths import Axis, Timeline, Widths, nearest_prefix, shortest_prefix
from gracile.errors import UserError
from gracile.graph.dependency import ChannelGroup, Slice
from gracile.prune.ranking import ranks
from gracile.prune.widths import Limits, steps, stops

KINDS = ("channels", "outer", "inner")  # of overlapping groups the first of these is cut
FAMILIES = ("outermost", "all")
Block = tuple[str, tuple[int, ...]]  # (group id, units that go together)


@dataclass(frozen=True)
class Share:
    """The goal to remove a share of the original units of every pool: floor(share * units)."""

    share: float


@dataclass(frozen=True)
class Budget:
    """The goal to cost no more than `limit`; it is undercut by less than one unit.

    Attributes:
        measure: what is counted, for messages: params, macs, ms.
        limit: what may be left.
        cost: widths after a cut -> what is left. It should not rise when channels go.
    """

    measure: str
    limit: float
    cost: Callable[[Widths], float]


@dataclass(frozen=True)
class Selection:
    """What goes, and what that comes to.

    Attributes:
        gone: group id -> its units that go, sorted.
        measure: channels, params, macs or ms.
        before: how much there is now.
        wanted: how much there should be left.
        reached: how much is left.
    """

    gone: dict[str, list[int]]
    measure: str
    before: float
    wanted: float
    reached: float


def candidates(
    groups: Sequence[ChannelGroup], ignored: Collection[str] = (), families: str = "outermost"
) -> list[ChannelGroup]:
    """Groups that may be cut: not protected, without ignored producers, not inside another one.

    Args:
        groups: of the model as it is.
        ignored: addresses; a group that one of them writes is left alone.
        families: of groups on the same axes (whole heads, and the width in each head) take only the
            "outermost", or "all".
    """
    free = [g for g in groups if g.protected is None and not set(g.producers) & set(ignored)]
    if families == "all":
        return free
    chosen: dict[str, ChannelGroup] = {}
    for g in sorted(free, key=lambda g: KINDS.index(g.kind)):
        if not any(_on_same_indices(g, chosen[id]) for id in g.overlaps if id in chosen):
            chosen[g.id] = g
    return [g for g in free if g.id in chosen]


def select(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    goal: Share | Budget,
    *,
    pool_of: Mapping[str, Hashable],
    limits: Limits | None = None,
    original: Mapping[str, int] | None = None,
) -> Selection:
    """The least important units that bring the model to the goal.

    All pools shrink in step: a unit's turn comes when the share of its pool that is gone has
    reached its rank. With `multiple_of` a group shrinks by whole blocks of units.

    Args:
        groups: those that may be cut, see `candidates`.
        scores: group id -> (units,) importance, comparable within a pool; smaller goes first.
        goal: `Share` of channels, or `Budget` of parameters, MACs or milliseconds.
        pool_of: group id -> pool, see `ranking.pools`.
        limits: default none but that one unit of each group and one index of each tensor stay.
        original: group id -> units at the start, where some are gone already.

    Raises:
        UserError: the budget cannot be met within the limits; says how far it goes.
    """
    first = {g.id: (original or {}).get(g.id, len(g.units)) for g in groups}
    blocks = removal_order(groups, scores, pool_of, limits or Limits(), first)
    if isinstance(goal, Share):
        return _by_share(groups, blocks, goal, pool_of, first)
    by_id = {g.id: g for g in groups}
    sizes = {axis: n for g in groups for axis, n in g.sizes.items()}
    timeline = Timeline(([by_id[id].units[u] for u in units] for id, units in blocks), sizes)
    k = shortest_prefix(len(blocks), lambda k: goal.cost(timeline.kept(k)), goal.limit)
    before = goal.cost(timeline.kept(0))
    if k is None:
        least = goal.cost(timeline.kept(len(blocks)))
        raise UserError(
            f"the target of {amount(goal.limit)} {goal.measure} cannot be reached: the model has "
            f"{amount(before)}, and cutting all that the limits allow leaves {amount(least)}. "
            "Ask for less, or relax ignore, max_ratio, min_keep, min_width or multiple_of."
        )
    return Selection(
        _gone(blocks[:k]), goal.measure, before, goal.limit, goal.cost(timeline.kept(k))
    )


def one_step(
    group: ChannelGroup,
    scores: Tensor,
    share: float,
    *,
    left: Callable[[int, Widths], float],
    limit: float,
    limits: Limits | None = None,
    original: int | None = None,
) -> list[int]:
    """The least important units of one group: a share of them, or what the goal still asks for.

    Args:
        group: that may be cut.
        scores: (units,) importance; smaller goes first.
        share: of the units that are there; rounded down, but at least one unit (with `multiple_of`
            one block).
        left: (how many units go, widths after that) -> what is left of the goal's measure.
        limit: what may be left: of the share only as many go as bring the measure down to it.
        limits: see `select`.
        original: units at the start, if some are gone already.

    Returns:
        Units, sorted; none where the limits allow none to go.
    """
    first = {group.id: original or len(group.units)}
    blocks = removal_order(
        [group], {group.id: scores}, {group.id: group.id}, limits or Limits(), first
    )
    counts = [*accumulate(len(units) for _, units in blocks)]
    most = int(share * len(group.units) + 1e-6)
    n = max(sum(count <= most for count in counts), min(1, len(blocks)))
    timeline = Timeline(([group.units[u] for u in units] for _, units in blocks[:n]), group.sizes)
    k = shortest_prefix(n, lambda k: left([0, *counts][k], timeline.kept(k)), limit)
    return _gone(blocks[: n if k is None else k]).get(group.id, [])


def removal_order(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    pool_of: Mapping[str, Hashable],
    limits: Limits,
    original: Mapping[str, int],
) -> list[Block]:
    """Everything that may go, first things first; any prefix leaves a valid network."""
    by_id = {g.id: g for g in groups}
    allowed = {g.id: stops(g, limits, original[g.id]) for g in groups}
    size: dict[Hashable, int] = {}
    for g in groups:
        size[pool_of[g.id]] = size.get(pool_of[g.id], 0) + original[g.id]
    present: dict[Hashable, int] = {}
    for g in groups:
        present[pool_of[g.id]] = present.get(pool_of[g.id], 0) + len(g.units)

    def timed(order: Iterable[tuple[str, int]]) -> list[tuple[float, str, int]]:
        """When each unit's turn comes: the share of its pool that is then gone."""
        out, gone = [], {pool: size[pool] - present[pool] for pool in size}
        for id, u in order:
            gone[pool_of[id]] += 1
            out.append((gone[pool_of[id]] / size[pool_of[id]], id, u))
        return out

    order = ranks({g.id: scores[g.id] for g in groups}, pool_of)
    possible = _possible(sorted(timed(order), key=lambda t: t[0]), by_id, allowed)
    turns: dict[str, list[tuple[float, int]]] = {g.id: [] for g in groups}
    for time, id, u in timed((id, u) for id, u in order if (id, u) in possible):
        turns[id].append((time, u))
    blocks = [
        (sum(time for time, _ in part) / len(part), (id, tuple(u for _, u in part)))
        for id in turns
        for part in steps(turns[id], allowed[id])
    ]
    return [block for _, block in sorted(blocks, key=lambda b: b[0])]


def _on_same_indices(a: ChannelGroup, b: ChannelGroup) -> bool:
    """Whether two groups that one weight writes meet in it; q and v of a fused qkv do not."""
    made = {(s.at, s.dim, i) for u in range(len(a.units)) for s in a.written(u) for i in s.index}
    return any(
        (s.at, s.dim, i) in made for u in range(len(b.units)) for s in b.written(u) for i in s.index
    )


def _possible(
    order: Iterable[tuple[float, str, int]],
    by_id: Mapping[str, ChannelGroup],
    allowed: Mapping[str, Sequence[int]],
) -> set[tuple[str, int]]:
    """Units that can go together: each group keeps enough, and no tensor its last index.

    Where a narrow layer feeds a wide stream (a padding shortcut, a concatenation), one of its
    channels stays.
    """
    room = {id: len(g.units) - allowed[id][-1] for id, g in by_id.items()}
    left = {axis: n for g in by_id.values() for axis, n in g.sizes.items()}
    gone: dict[Axis, set[int]] = {axis: set() for axis in left}
    out = set()
    for _, id, u in order:
        if room[id] == 0:
            continue
        fresh = _fresh(by_id[id].units[u], gone)
        if any(len(index) >= left[axis] for axis, index in fresh.items()):
            continue
        for axis, index in fresh.items():
            gone[axis].update(index)
            left[axis] -= len(index)
        room[id] -= 1
        out.add((id, u))
    return out


def _fresh(unit: Iterable[Slice], gone: Mapping[Axis, set[int]]) -> dict[Axis, set[int]]:
    """Indices of a unit that are still there."""
    out: dict[Axis, set[int]] = {}
    for part in unit:
        axis = (part.at, part.dim)
        out.setdefault(axis, set()).update(i for i in part.index if i not in gone[axis])
    return out


def _by_share(
    groups: Sequence[ChannelGroup],
    blocks: Sequence[Block],
    goal: Share,
    pool_of: Mapping[str, Hashable],
    original: Mapping[str, int],
) -> Selection:
    had: dict[Hashable, int] = {}
    asked: dict[Hashable, int] = {}
    for g in groups:
        pool = pool_of[g.id]
        had[pool] = had.get(pool, 0) + original[g.id]
        asked[pool] = asked.get(pool, 0) - (original[g.id] - len(g.units))
    possible = dict.fromkeys(had, 0)
    for id, units in blocks:
        possible[pool_of[id]] += len(units)
    for pool, n in had.items():
        asked[pool] = max(asked[pool] + int(goal.share * n + 1e-6), 0)
    # What a pool cannot give is not taken from others.
    wanted = sum(min(asked[pool], possible[pool]) for pool in had)
    k = nearest_prefix([len(units) for _, units in blocks], wanted)
    now = sum(len(g.units) for g in groups)
    gone = _gone(blocks[:k])
    left = now - sum(len(units) for units in gone.values())
    return Selection(gone, "channels", now, now - sum(asked.values()), left)


def _gone(blocks: Iterable[Block]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for id, units in blocks:
        out.setdefault(id, []).extend(units)
    return {id: sorted(units) for id, units in out.items()}


def amount(value: float) -> str:
    """A number for a message, with no more digits than tell something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"
