"""A Plan without some of its edits: the others counted again in the model that they then meet.

The idea is ours: an edit is told by the *original* indices it takes or gives back, and these do not
move when another edit is left out. Sets only, no tensors.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from gracile.core.plan import Add, Axis, Member, Plan, Remove, composed
from gracile.errors import UserError

Maps = dict[Axis, list[int]]  # axis -> original index of every index that is there
Unit = Mapping[Axis, AbstractSet[int]]  # original indices that go together
Units = Callable[[Plan], Sequence[Unit]]  # the units of the network a Plan leads to


def no_units(plan: Plan) -> Sequence[Unit]:
    """Nothing is known to go together: edits take exactly the indices they took."""
    return ()


@dataclass(frozen=True)
class Change:
    """One `remove` or `add` edit in indices of the original.

    Attributes:
        edit: as it stands in the Plan.
        before: what is there before it, for each axis it or an earlier edit touches.
        after: what is there after it, for each axis it touches.
    """

    edit: Remove | Add
    before: Maps
    after: Maps

    def gone(self, axis: Axis) -> set[int]:
        """Original indices this edit takes along an axis."""
        return set(self.before[axis]) - set(self.after.get(axis, self.before[axis]))

    def back(self, axis: Axis) -> set[int]:
        """Original indices this edit gives back."""
        return set(self.after[axis]) - set(self.before[axis])


def pick(plan: Plan, step: str) -> list[int]:
    """Positions of the edits a user means: a number, an id (`e3`), or a recipe entry (all of its).

    Raises:
        UserError: none such; says what there is.
    """
    ids = [e.id for e in plan]
    if step in ids:
        return [ids.index(step)]
    if step.isdecimal() and int(step) < len(plan):
        return [int(step)]
    by = [k for k, e in enumerate(plan) if e.by == step]
    if by:
        return by
    if not len(plan):
        raise UserError(f"no step '{step}': the plan has no edits.")
    entries = ", ".join(f"'{n}'" for n in dict.fromkeys(e.by for e in plan) if n)
    raise UserError(
        f"no step '{step}': the plan has the edits 0 to {len(plan) - 1}"
        + (f", made by {entries}." if entries else ".")
    )


def changes(plan: Plan) -> list[Change | None]:
    """For each edit of a Plan what it does to indices, None where it leaves them alone."""
    maps: Maps = {}
    out: list[Change | None] = []
    for edit in plan:
        if not isinstance(edit, (Remove, Add)):
            out.append(None)
            continue
        before = dict(maps)
        for m in edit.group:
            had = m.of if isinstance(edit, Remove) else len(m.keep)
            before.setdefault((m.at, m.dim), list(range(had)))
        after = composed(before, edit)
        out.append(Change(edit, before, after))
        maps = before | after
    return out


def without(plan: Plan, drop: Collection[int], units: Units = no_units) -> Plan:
    """The Plan without the edits at these positions, numbered anew.

    An edit that has nothing left to do (it removed what an undone `add` gave back) is left out too.

    Args:
        plan: any; other kinds of edits stay as they are.
        drop: positions.
        units: what goes together in the network a Plan leads to. Where units overlap (whole heads,
            and width within every head), an edit that took a unit takes all of it, also in what an
            undone edit gives back. Asked only where an edit meets other indices than it did.

    Raises:
        UserError: without the dropped edits another would leave nothing of a tensor.
    """
    known = changes(plan)
    whole = widths(known)
    maps: Maps = {}
    edits = []
    for k, (edit, change) in enumerate(zip(plan, known, strict=True)):
        if k in drop:
            continue
        if change is None:
            edits.append(edit)
            continue
        here = {**whole, **maps}
        same = all(here[axis] == change.before[axis] for axis in change.after)
        found = () if same else units(Plan(architecture=plan.architecture).extended(edits))
        again = _again(change, here, found)
        if again is not None:
            maps.update(composed(here, again))
            edits.append(again)
    return Plan(architecture=plan.architecture).extended(edits)


def restoring(
    plan: Plan, drop: Collection[int], units: Units = no_units, *, by: str, key: str
) -> list[Add]:
    """`add` edits that lead from the end of a Plan to the end of the Plan without some removals.

    One for each dropped edit, the last one first; one that gives nothing back is left out.
    """
    whole = widths(changes(plan))
    maps, dropped, out = plan.to_original(), set[int](), []
    for k in sorted(drop, reverse=True):
        dropped.add(k)
        wanted = without(plan, dropped, units).to_original()
        target = {a: wanted.get(a, whole[a]) for a in maps}
        edit = growth(maps, target, by=by, key=f"{key}.e{k}")
        if edit is not None:
            maps.update(composed(maps, edit))
            out.append(edit)
    return out


def growth(now: Maps, wanted: Maps, *, by: str, key: str) -> Add | None:
    """The `add` edit from some indices to more; None if there is nothing to add."""
    group, origin = [], []
    for (at, dim), there in now.items():
        target = wanted[at, dim]
        if target == there:
            continue
        keep = tuple(k for k, i in enumerate(target) if i in set(there))
        group.append(Member(at=at, dim=dim, of=len(target), keep=keep))
        origin.append(tuple(i for i in target if i not in set(there)))
    return Add(by=by, key=key, group=tuple(group), origin=tuple(origin)) if group else None


def widths(known: Iterable[Change | None]) -> Maps:
    """All original indices of each axis that a Plan touches."""
    out: Maps = {}
    for change in known:
        if change is not None:
            for axis in change.after:
                out.setdefault(axis, change.before[axis])  # nothing touched it before
    return out


def _again(change: Change, maps: Maps, units: Sequence[Unit]) -> Remove | Add | None:
    if isinstance(change.edit, Add):
        wanted = {a: sorted({*maps[a], *change.back(a)}) for a in change.after}
        now = {a: maps[a] for a in change.after}
        return growth(now, wanted, by=change.edit.by, key=change.edit.key)
    gone = _completed(change, units)
    group = []
    for m in change.edit.group:
        here = maps[m.at, m.dim]
        keep = tuple(k for k, i in enumerate(here) if i not in gone[m.at, m.dim])
        if not keep:
            raise UserError(
                f"without the dropped edits, {change.edit.id} would leave nothing of '{m.at}' "
                f"along dim {m.dim}; drop it as well."
            )
        if len(keep) < len(here):
            group.append(Member(at=m.at, dim=m.dim, of=len(here), keep=keep))
    return change.edit.model_copy(update={"group": tuple(group)}) if group else None


def _completed(change: Change, units: Sequence[Unit]) -> dict[Axis, set[int]]:
    """What an edit takes, and all there ever was of the units of which it took the last."""
    gone = {axis: change.gone(axis) for axis in change.after}
    out = {axis: set(indices) for axis, indices in gone.items()}
    for unit in units:
        here = {a: i & set(change.before[a]) if a in change.before else i for a, i in unit.items()}
        if any(here.values()) and all(i <= gone.get(a, set()) for a, i in here.items()):
            for axis in unit.keys() & out.keys():
                out[axis] |= unit[axis]
    return out
