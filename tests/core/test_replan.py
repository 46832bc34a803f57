"""Plans without some edits: the others mean the same original indices, and units stay whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gracile.core.plan import Add, Architecture, Member, Plan, Remove, Skip
from gracile.core.replan import changes, growth, pick, restoring, without
from gracile.errors import UserError

ARCH = Architecture(name="net")
A = ("a", 0)


def plan(*edits) -> Plan:
    return Plan(architecture=ARCH).extended(edits)


def removal(of: int, *keep: int, at: str = "a", by: str = "") -> Remove:
    return Remove(group=(Member(at=at, dim=0, of=of, keep=keep),), by=by)


@st.composite
def removals(draw, width=10):
    """A plan of up to four removals on two axes, and a random subset of their positions."""
    left = {"a": list(range(width)), "b": list(range(width))}
    edits = []
    for _ in range(draw(st.integers(1, 4))):
        members = []
        for at in draw(st.sampled_from([("a",), ("b",), ("a", "b")])):
            keep = sorted(draw(st.sets(st.integers(0, len(left[at]) - 1), min_size=1)))
            members.append(Member(at=at, dim=0, of=len(left[at]), keep=tuple(keep)))
            left[at] = [left[at][i] for i in keep]
        edits.append(Remove(group=tuple(members)))
    return plan(*edits), draw(st.sets(st.integers(0, len(edits) - 1)))


def test_a_later_edit_is_counted_again_by_hand():
    # 6 filters: e0 takes 1 and 4, e1 then the third of what is left, which is original 3
    both = plan(removal(6, 0, 2, 3, 5), removal(4, 0, 1, 3))
    assert [c.gone(A) for c in changes(both)] == [{1, 4}, {3}]
    assert without(both, {0}).edits[0].group[0].keep == (0, 1, 2, 4, 5)
    assert without(both, {1}).edits == both.edits[:1]
    assert without(both, {0, 1}).edits == []


@given(case=removals())
def test_what_stays_takes_the_same_original_indices(case):
    old, drop = case
    taken = {axis: set() for axis in (A, ("b", 0))}
    for k, change in enumerate(changes(old)):
        for axis in change.after if k not in drop else ():
            taken[axis] |= change.gone(axis)
    new = without(old, drop).to_original()
    for axis, gone in taken.items():
        assert new.get(axis, list(range(10))) == [i for i in range(10) if i not in gone]


@given(case=removals())
def test_adding_back_leads_to_the_plan_without(case):
    old, drop = case
    there = old.extended(restoring(old, drop, by="x", key="k")).to_original()
    new = without(old, drop).to_original()
    assert there == {axis: new.get(axis, list(range(10))) for axis in there}


def test_whole_units_go_although_an_undone_edit_had_taken_a_part():
    # 2 heads x 3 wide: rows 0..5. e0 takes head 1 (3, 4, 5), e1 width 1 of what is left (row 1)
    old = plan(removal(6, 0, 1, 2), removal(3, 0, 2))
    heads = [{A: frozenset({0, 1, 2})}, {A: frozenset({3, 4, 5})}]
    width = [{A: frozenset({w, 3 + w})} for w in range(3)]
    assert without(old, {0}).to_original() == {A: [0, 2, 3, 4, 5]}  # heads of unequal width
    assert without(old, {0}, lambda plan: heads + width).to_original() == {A: [0, 2, 3, 5]}
    back = restoring(old, {0}, lambda plan: heads + width, by="x", key="k")
    assert [e.origin for e in back] == [((3, 5),)]


def test_units_are_asked_for_only_where_an_edit_meets_other_indices():
    asked = []
    old = plan(removal(4, 0, 1), removal(4, 1, 2, at="b"), removal(2, 1), removal(2, 0, at="b"))
    without(old, {0}, lambda so_far: asked.append(so_far.to_original()) or ())
    assert asked == [{("b", 0): [1, 2]}]


def test_an_addition_whose_removal_is_undone_goes_too():
    member = Member(at="a", dim=0, of=4, keep=(0, 2))
    old = plan(
        removal(4, 0, 2),
        Add(group=(member,), origin=((1, 3),), key="k"),
        Skip(block="b"),
        removal(4, 0, 1, 2),
    )
    assert [e.kind for e in without(old, {0})] == ["skip", "remove"]
    assert without(old, {1}).to_original() == {A: [0, 2]}
    assert [e.kind for e in without(old, {1})] == ["remove", "skip"]  # e3 took what came back
    assert without(old, {0, 3}).to_original() == {}


def test_nothing_left_without_an_addition_is_refused():
    member = Member(at="a", dim=0, of=2, keep=(0,))
    back = Add(group=(member,), origin=((1,),), key="k")
    old = plan(removal(2, 0), back, removal(2, 1))
    with pytest.raises(UserError, match="e2 would leave nothing of 'a' along dim 0; drop it"):
        without(old, {1})


def test_growth_of_nothing_is_no_edit():
    assert growth({A: [0, 2]}, {A: [0, 2]}, by="x", key="k") is None
    edit = growth({A: [0, 2]}, {A: [0, 1, 2]}, by="x", key="k")
    assert (edit.group[0].of, edit.group[0].keep, edit.origin) == (3, (0, 2), ((1,),))


def test_a_step_is_a_number_an_id_or_a_recipe_entry():
    old = plan(removal(4, 0, 1, 2, by="thin"), removal(3, 0, by="thin"), removal(1, 0, by="more"))
    assert pick(old, "1") == pick(old, "e1") == [1]
    assert pick(old, "thin") == [0, 1]
    for wrong in ("3", "e3", "-1", "thni", ""):
        with pytest.raises(UserError, match=f"no step '{wrong}': .* edits 0 to 2, made by 'thin'"):
            pick(old, wrong)
    with pytest.raises(UserError, match="the plan has no edits"):
        pick(plan(), "0")
