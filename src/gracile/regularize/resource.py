"""What one more channel costs, given which others are alive."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gracile.analyze.widths import Axis, Widths
from gracile.graph.dependency import ChannelGroup

Cost = Callable[[Widths], float]
Alive = Mapping[str, npt.NDArray[np.bool_]]  # group id -> (units,)


def marginal_costs(
    groups: Sequence[ChannelGroup], alive: Alive, cost: Cost
) -> dict[str, npt.NDArray[np.float64]]:
    """How much each unit adds to the cost of the network.

    For a unit that is alive, what its loss would save; for one that is not, what its return would
    add. Of a cost that is bilinear in inputs and outputs, such as MACs, that is the factor of
    |gamma| in Gordon et al. 2018: C * (channels alive on the other side). A tensor never goes below
    one index, so the last channel of a layer weighs nothing: it cannot be cut.

    Args:
        groups: whose units do not share an index.
        alive: for each of them.
        cost: widths of the network -> what it costs; should not fall when channels come.

    Returns:
        Group id -> (units,) costs >= 0.
    """
    counts = {g.id: _counts(g) for g in groups}
    kept: dict[Axis, int] = {}
    for g in groups:
        axes, count = counts[g.id]
        gone = count[~alive[g.id]].sum(0)
        for axis, n in zip(axes, gone.tolist(), strict=True):
            kept[axis] = kept.get(axis, g.sizes[axis]) - n

    def at(axes: Sequence[Axis] = (), more: Sequence[int] = ()) -> float:
        changed = {**kept, **{a: kept[a] + n for a, n in zip(axes, more, strict=True)}}
        return float(cost({a: max(n, 1) for a, n in changed.items()}))

    now, out = at(), {}
    for g in groups:
        axes, count = counts[g.id]
        kinds, kind = np.unique(count, axis=0, return_inverse=True)
        less = np.array([now - at(axes, (-n).tolist()) for n in kinds])
        more = np.array([at(axes, n.tolist()) - now for n in kinds])
        kind = kind.reshape(-1)
        out[g.id] = np.maximum(np.where(alive[g.id], less[kind], more[kind]), 0.0)
    return out


def _counts(group: ChannelGroup) -> tuple[list[Axis], npt.NDArray[Any]]:
    """The axes of a group, and (units, axes): how many indices a unit has on each."""
    layouts = {axis: np.asarray(layout) for axis, layout in group.layout.items()}
    columns = [np.bincount(v[v >= 0], minlength=len(group.units)) for v in layouts.values()]
    return list(layouts), np.stack(columns, axis=1)
