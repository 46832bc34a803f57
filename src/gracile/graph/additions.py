"""Which channels come back: the `add` edits that undo some of a Plan's removals, or a share of all.

The idea is ours: what still is cut takes whole units of the larger network. A head that comes back
lacks the widths that a later cut took from every head there was.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from gracile.core.plan import (
    Add,
    Axis,
    Decompose,
    Exit,
    Factorize,
    Member,
    Plan,
    Remove,
    Replace,
    Skip,
)
from gracile.core.replan import Units, changes, growth, pick, restoring, widths
from gracile.errors import UserError
from gracile.graph.capture import bare_copy, capture
from gracile.graph.dependency import channel_groups
from gracile.graph.depth import covers
from gracile.graph.surgery import Inputs, apply

KEY = "added"  # before the number that the edit will have: names the restored values


def additions(
    plan: Plan,
    what: str | Sequence[str] | float,
    originals: nn.Module,
    example: Inputs,
    *,
    by: str,
) -> list[Add]:
    """The `add` edits `expand` makes after a Plan, in order.

    Args:
        plan: from the original to the model that is expanded.
        what: ids, numbers or recipe entries of `remove` edits; or a share of what is gone.
        originals: the original network.
        example: an input batch, to follow the channels of the original.
        by: stands in the edits.

    Raises:
        UserError: no such edit, one of another kind, a share outside (0, 1], or a Plan that leaves
            blocks out.
    """
    if isinstance(what, (int, float)):
        _check_whole(plan)
        return _share(plan, what, originals, example, by)
    names = [what] if isinstance(what, str) else what
    drop = {k for name in names for k in pick(plan, name)}
    wrong = [plan.edits[k] for k in sorted(drop) if not isinstance(plan.edits[k], Remove)]
    if wrong:
        raise UserError(
            f"edit {wrong[0].id} is of kind '{wrong[0].kind}'; only 'remove' adds back."
        )
    _check_whole(plan)
    return restoring(plan, drop, units_of(originals, example), by=by, key=f"{KEY}{len(plan)}")


def cuts(plan: Plan) -> list[Remove]:
    """`remove` edits that lead from the original to where a Plan leads; one if it has additions."""
    if not plan.of_kind("add"):
        return plan.of_kind("remove")
    whole = widths(changes(plan))
    group = [
        Member(at=at, dim=dim, of=len(whole[at, dim]), keep=tuple(there))
        for (at, dim), there in plan.to_original().items()
        if len(there) < len(whole[at, dim])
    ]
    return [Remove(group=tuple(group))] if group else []


def structural(plan: Plan) -> list[Remove | Skip | Factorize | Replace | Decompose | Exit]:
    """All edits of structure that lead from the original to where a Plan leads.

    As they stand in the Plan; with additions in it the blocks go first, then one cut,
    and layers are taken apart at the end.
    """
    if not plan.of_kind("add"):
        kinds = (Remove, Skip, Factorize, Replace, Decompose, Exit)
        return [e for e in plan if isinstance(e, kinds)]
    skips = plan.of_kind("skip")
    gone = [path for e in skips for path in e.gone]
    groups = [[m for m in cut.group if not covers(gone, m.at)] for cut in cuts(plan)]
    removes = [Remove(group=tuple(group)) for group in groups if group]
    return [*skips, *removes, *plan.of_kind("decompose")]


def units_of(originals: nn.Module, example: Inputs) -> Units:
    """What goes together in the network a Plan leads to, in indices of the original."""

    def units(plan: Plan) -> list[dict[Axis, frozenset[int]]]:
        model = apply(bare_copy(originals), structural(plan), example=example)
        maps = plan.to_original()
        groups = channel_groups(model, capture(model, example))
        return [
            {
                axis: frozenset(maps[axis][i] for i in indices) if axis in maps else indices
                for axis, indices in _indices(unit).items()
            }
            for group in groups
            for unit in group.units
        ]

    return units


def _check_whole(plan: Plan) -> None:
    if left_out := plan.of_kind("skip"):
        raise UserError(
            f"edit {left_out[0].id} leaves a block out; channels are added back only to a network "
            "that has all its blocks."
        )
    if smaller := [*plan.of_kind("factorize"), *plan.of_kind("replace")]:
        raise UserError(
            f"edit {smaller[0].id} {smaller[0].kind}s a layer; channels are added back only to a "
            "network that has all its layers."
        )
    if exits := plan.of_kind("exit"):
        raise UserError(
            f"edit {exits[0].id} attaches an early exit; channels are added back only to a network "
            "without exits."
        )


def _share(plan: Plan, share: float, originals: nn.Module, example: Inputs, by: str) -> list[Add]:
    """One edit that restores a share of each group's removed units, the largest filters first."""
    if not 0 < share <= 1:
        raise UserError(f"the share of removed channels to add must be in (0, 1], got {share}.")
    now, whole = plan.to_original(), widths(changes(plan))
    absent = {axis: set(whole[axis]) - set(there) for axis, there in now.items()}
    tensors = dict(originals.named_parameters())
    back: dict[Axis, set[int]] = {axis: set() for axis in now}
    still: dict[Axis, set[int]] = {axis: set() for axis in now}
    for group in channel_groups(originals, capture(originals, example)):
        gone = [
            u
            for u, unit in enumerate(group.units)
            if unit and all(i <= absent.get(a, set()) for a, i in _indices(unit).items())
        ]
        size = {
            u: sum(
                float(tensors[p.at].detach().index_select(p.dim, torch.tensor(p.index)).abs().sum())
                for p in group.written(u)
            )
            for u in gone
        }
        ranked = sorted(gone, key=lambda u: (-size[u], u))
        first = math.ceil(share * len(ranked) - 1e-9)
        for k, u in enumerate(ranked):
            for axis, indices in _indices(group.units[u]).items():
                (back if k < first else still)[axis] |= indices
    wanted = {a: sorted({*there, *(back[a] - still[a])}) for a, there in now.items()}
    edit = growth(now, wanted, by=by, key=f"{KEY}{len(plan)}")
    return [edit] if edit is not None else []


def _indices(unit: Iterable[Any]) -> dict[Axis, frozenset[int]]:
    out: dict[Axis, frozenset[int]] = {}
    for part in unit:
        axis = part.at, part.dim
        out[axis] = out.get(axis, frozenset()) | frozenset(part.index)
    return out
