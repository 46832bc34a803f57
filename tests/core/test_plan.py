import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gracile.core.plan import (
    KIND_ORDER,
    Add,
    Architecture,
    Bits,
    Decompose,
    Exit,
    Factorize,
    Mask,
    Member,
    Plan,
    Remove,
    Replace,
    Share,
    Skip,
    check_conflicts,
    in_order,
)
from gracile.errors import PlanConflict, UserError

ARCH = Architecture(name="resnet20_cifar", args={"classes": 10}, sha256="ab")


def member(at: str, of: int, *keep: int, dim: int = 0) -> Member:
    return Member(at=at, dim=dim, of=of, keep=keep)


def bits(at: str = "fc.weight", by: str = "ptq", role: str = "weight", **more) -> Bits:
    given = {"bits": 8, "signed": True, "symmetric": True, "key": f"{at}.{role}", **more}
    return Bits(at=at, by=by, role=role, **given)


EDITS = [
    Add(group=(member("a", 4, 0, 2),), origin=((1, 3),), key="a.new"),
    Remove(group=(member("a", 4, 0, 3), member("b", 8, 0, 1, 6, 7, dim=1))),
    Skip(block="layer1.1"),
    Factorize(at="fc", scheme="svd", ranks=(3, 4)),
    Replace.model_validate({"at": "act", "with": "relu", "args": {"inplace": False}}),
    Decompose(at="rnn", steps=5),
    Exit(after="layer2", head="linear", threshold=0.5),
    Mask(at="a", key="a.mask", sparsity=0.25),
    Share(at="a", key="a.codes", levels=16),
    bits(axis=0, narrow=True),
]


def test_every_kind_survives_its_json(tmp_path):
    plan = Plan(architecture=ARCH).extended(EDITS)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert [e.id for e in again] == [f"e{i}" for i in range(len(EDITS))]
    assert sorted({e.kind for e in again}) == sorted(KIND_ORDER)
    raw = json.loads((tmp_path / "plan.json").read_text())
    assert raw["format"] == 1
    assert raw["edits"][4]["with"] == "relu"
    assert list(raw) == ["format", "architecture", "edits"]


def test_an_empty_plan_survives_its_json(tmp_path):
    Plan(architecture=ARCH).save(tmp_path / "new" / "plan.json")
    assert len(Plan.load(tmp_path / "new" / "plan.json")) == 0


def test_extending_makes_a_new_plan_and_goes_on_counting():
    one = Plan(architecture=ARCH).extended(EDITS[:2])
    two = one.extended(EDITS[2:4])
    assert [e.id for e in two] == ["e0", "e1", "e2", "e3"]
    assert len(one) == 2
    assert two.of_kind("skip") == [two.edits[2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON file"),
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("[]", "not a valid plan"),
        ("{}", "not a valid plan at 'architecture'"),
        ('{"architecture": {"name": "x"}, "edits": [{"kind": "melt"}]}', r"at 'edits\.0'"),
        ('{"architecture": {"name": "x"}, "format": 2}', "at 'format'"),
        ('{"architecture": {"name": "x"}, "extra": 2}', "at 'extra'"),
        ('{"architecture": {"name": "x"}, "edits": [{"kind": "skip"}]}', r"edits\.0\.skip\.block"),
    ],
    ids=lambda x: x[:30],
)
def test_a_broken_plan_file_is_one_message(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"plan\.json: .*{message}"):
        Plan.load(path)


def test_a_plan_that_is_not_text_or_not_there(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(UserError, match="cannot read the plan"):
        Plan.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not a JSON file"):
        Plan.load(path)
    with pytest.raises(UserError, match="cannot read the plan"):
        Plan.load(tmp_path)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ((), "at least one"),
        ((1, 0), "increasing"),
        ((0, 0), "without doubles"),
        ((-1, 0), r"0\.\.3"),
        ((0, 4), r"0\.\.3"),
    ],
)
def test_a_member_keeps_some_of_what_there_is(keep, message):
    with pytest.raises(ValidationError, match=message):
        member("a", 4, *keep)


@pytest.mark.parametrize(
    ("signed", "width", "narrow", "ends"),
    [
        (True, 8, False, (-128, 127)),
        (True, 8, True, (-127, 127)),
        (False, 8, False, (0, 255)),
        (True, 4, True, (-7, 7)),
        (False, 4, False, (0, 15)),
        (True, 2, True, (-1, 1)),
        (True, 32, False, (-(2**31), 2**31 - 1)),
    ],
)
def test_ends_of_the_integer_grid(signed, width, narrow, ends):
    edit = bits(signed=signed, bits=width, narrow=narrow)
    assert (edit.qmin, edit.qmax) == ends


def removal(at: str, of: int, *keep: int) -> Remove:
    return Remove(group=(member(at, of, *keep),))


def test_removals_compose_by_hand():
    # 6 filters; 1 and 4 go, then the third of what is left (original 3)
    plan = Plan(architecture=ARCH).extended([removal("a", 6, 0, 2, 3, 5), removal("a", 4, 0, 1, 3)])
    assert plan.to_original() == {("a", 0): [0, 2, 5]}


@given(st.data())
def test_composed_removals_equal_slicing_in_turn(data):
    left, edits = list(range(12)), []
    for _ in range(data.draw(st.integers(1, 4))):
        picked = data.draw(st.sets(st.integers(0, len(left) - 1), min_size=1))
        edits.append(removal("a", len(left), *sorted(picked)))
        left = [left[i] for i in sorted(picked)]
    assert Plan(architecture=ARCH).extended(edits).to_original() == {("a", 0): left}


def test_a_removal_made_for_another_width_is_refused():
    plan = Plan(architecture=ARCH).extended([removal("a", 6, 0, 1), removal("a", 6, 0)])
    with pytest.raises(UserError, match=r"edit e1: 'a' has 2 indices along dim 0.*made for 6"):
        plan.to_original()


def addition(at: str, of: int, keep: list[int], origin: list[int]) -> Add:
    return Add(group=(member(at, of, *keep),), origin=(tuple(origin),), key="back")


def test_an_addition_restores_its_places_by_hand():
    # 6 filters; 1 and 4 go, then the third of what is left (original 3); 4 comes back last
    edits = [
        removal("a", 6, 0, 2, 3, 5),
        removal("a", 4, 0, 1, 3),
        addition("a", 4, [0, 1, 3], [4]),
    ]
    assert Plan(architecture=ARCH).extended(edits).to_original() == {("a", 0): [0, 2, 4, 5]}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (addition("a", 3, [0, 1], [2]), r"e1: 'a' would have the original indices \[0, 3, 2\]"),
        (addition("a", 3, [0, 1], [3]), r"indices \[0, 3, 3\] along dim 0; an `add` restores"),
        (addition("a", 4, [0, 1, 2], [5]), "e1: 'a' has 2 indices along dim 0.*made for 3"),
    ],
    ids=["wrong place", "there already", "another width"],
)
def test_an_addition_that_does_not_fit_is_refused(edit, message):
    plan = Plan(architecture=ARCH).extended([removal("a", 4, 0, 3), edit])
    with pytest.raises(UserError, match=message):
        plan.to_original()


def test_an_addition_says_what_each_place_restores():
    with pytest.raises(ValidationError, match="one original index for each place"):
        addition("a", 4, [0, 1], [2])


@given(st.permutations(EDITS))
def test_edits_sort_by_kind_and_keep_their_order_within_it(edits):
    got = in_order(edits)
    assert [e.kind for e in got] == list(KIND_ORDER)
    assert in_order([*got, EDITS[3]])[3:5] == [EDITS[3], EDITS[3]]


def test_two_entries_deciding_bits_of_one_tensor_conflict():
    with pytest.raises(
        PlanConflict, match=r"'ptq' \(line 31\) and 'qat' \(line 22\) both set bits of 'fc\.weight'"
    ):
        check_conflicts([bits(by="ptq"), bits(by="qat")], {"ptq": 31, "qat": 22})


def test_what_does_not_conflict():
    check_conflicts([bits(by="ptq"), bits(by="ptq")])  # one entry may refine itself
    check_conflicts([bits(by="ptq"), bits(by="qat", role="output")])
    check_conflicts([bits(by="ptq"), bits(at="conv1.weight", by="qat")])
    mask = Mask(at="a", key="a.mask", sparsity=0.5, by="x")
    check_conflicts([mask, mask.model_copy(update={"by": "y"})])  # masks intersect
    check_conflicts([])


@pytest.mark.parametrize(
    "edit", [EDITS[2], EDITS[3], EDITS[4], EDITS[5], EDITS[6], EDITS[8]], ids=lambda e: e.kind
)
def test_other_decisions_on_one_place_conflict(edit):
    pair = [edit.model_copy(update={"by": by}) for by in ("one", "two")]
    with pytest.raises(PlanConflict, match="'one' and 'two' both set"):
        check_conflicts(pair)
