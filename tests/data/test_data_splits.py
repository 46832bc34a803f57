"""Which rows are for what: the recipe's `data` section against label vectors alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile.data.splits import choose, stratified
from gracile.errors import BindError, UserError


def labels(**sizes):
    return {name: torch.arange(n) % 10 for name, n in sizes.items()}


def rows(part):
    return set(part.rows.tolist())


def test_auto_cuts_a_stratified_tenth_of_train():
    parts = choose(labels(train=200, test=50), {}, seed=0)
    assert len(parts["val"].rows) == 20
    assert (torch.arange(200) % 10)[parts["val"].rows].bincount().tolist() == [2] * 10
    assert rows(parts["train"]) | rows(parts["val"]) == set(range(200))
    assert rows(parts["test"]) == set(range(50))
    assert parts["val"].note == "20 of the 200 train rows (stratified, seed 0)"
    assert parts["test"].note == "test rows 0-49 (all)"


def test_auto_takes_the_sets_own_val_split():
    parts = choose(labels(train=30, val=10, test=20), {"val": "auto"}, seed=0)
    assert parts["val"].base == "val"
    assert len(parts["train"].rows) == 30


def test_without_a_test_split_val_is_for_testing_and_val_is_cut():
    parts = choose(labels(train=30, val=10), {}, seed=0)
    assert (parts["test"].base, parts["val"].base) == ("val", "train")


@pytest.mark.parametrize(("val", "count"), [(0.25, 25), (17, 17), ("auto", 10)])
def test_share_count_and_auto(val, count):
    parts = choose(labels(train=100, test=10), {"val": val}, seed=0)
    assert (len(parts["val"].rows), len(parts["train"].rows)) == (count, 100 - count)


def test_rows_of_the_test_split():
    asked = {"val": "test[50:]", "test": "test[:50]", "calibration": "test[50:60]"}
    parts = choose(labels(train=100, test=100), asked, seed=0)
    assert rows(parts["val"]) == set(range(50, 100))
    assert rows(parts["test"]) == set(range(50))
    assert parts["calibration"].rows.tolist() == list(range(50, 60))
    assert len(parts["train"].rows) == 100
    assert parts["val"].note == "test rows 50-99"


def test_rows_named_for_val_and_test_leave_train():
    asked = {"val": "train[:10]", "test": "train[-20:]"}
    parts = choose(labels(train=100, test=10), asked, seed=0)
    assert rows(parts["train"]) == set(range(10, 80))


def test_named_train_rows_are_cut_from():
    parts = choose(labels(train=100, test=10), {"train": "train[:40]", "val": 0.5}, seed=0)
    assert rows(parts["train"]) | rows(parts["val"]) == set(range(40))
    assert len(parts["val"].rows) == 20


def test_calibration_is_drawn_from_the_training_rows_and_capped():
    parts = choose(labels(train=100, test=10), {"calibration": 12}, seed=0)
    assert len(parts["calibration"].rows) == 12
    assert rows(parts["calibration"]) <= rows(parts["train"])
    small = choose(labels(train=100, test=10), {}, seed=0)["calibration"]
    assert len(small.rows) == 90
    assert small.note == "90 of the 90 training images, drawn with seed 0 (300 were asked)"


def test_only_a_test_split_leaves_the_rest_empty():
    parts = choose(labels(test=10), {}, seed=0)
    assert [len(parts[k].rows) for k in ("train", "val", "test", "calibration")] == [0, 0, 10, 0]
    assert parts["train"].note == "none"


@given(
    st.integers(0, 2**31), st.sampled_from(["auto", 0.3, 7, "train[3:9]", "test[20:]"])
)  # fmt: skip
def test_parts_are_disjoint_and_repeat_with_the_seed(seed, val):
    sizes = labels(train=64, test=40)
    asked = {"val": val, "test": "test[:20]"}
    parts, again = choose(sizes, asked, seed), choose(sizes, asked, seed)
    used = [(parts[k].base, r) for k in ("train", "val", "test") for r in rows(parts[k])]
    assert len(used) == len(set(used))
    assert all(torch.equal(parts[k].rows, again[k].rows) for k in parts)


def test_another_seed_cuts_other_rows():
    sizes = labels(train=100, test=10)
    assert rows(choose(sizes, {}, 0)["val"]) != rows(choose(sizes, {}, 1)["val"])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_stratified_is_within_one_of_the_exact_share(values, data):
    of = torch.tensor(values)
    count = data.draw(st.integers(0, len(values)))
    picked = stratified(of, count, torch.Generator().manual_seed(0))
    assert len(set(picked.tolist())) == count
    for c in of.unique():
        exact = float((of == c).sum()) * count / len(of)
        assert abs(int((of[picked] == c).sum()) - exact) < 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"val": "test[5:]"},
            r"data.val \(test rows 5-9\) and data.test .* share 5 rows; name disj",
        ),
        ({"val": "train[:5]", "train": "train[:9]"}, "data.val .* and data.train .* share 5 rows"),
        ({"test": "train[:5]", "train": "train[:9]"}, "data.test .* and data.train .* share 5"),
        ({"calibration": "test[:3]"}, "data.calibration .* and data.test .* share 3 rows"),
        ({"test": "test[:11]"}, "'test\\[:11\\]' is out of range: test has 10 rows"),
        ({"test": "test[-11:]"}, "out of range"),
        ({"val": "train[5:5]"}, "has no rows"),
        ({"val": "val[:5]"}, "this data has no val split"),
        ({"val": 20}, "cannot cut 20 from 20 training rows"),
        ({"val": 1.5}, r"give a share in \(0, 1\)"),
        ({"val": 0}, "cannot cut 0"),
    ],
)
def test_rows_that_do_not_exist_or_have_two_uses(asked, message):
    with pytest.raises(BindError, match=message):
        choose(labels(train=20, test=10), asked, seed=0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"vall": 3}, "data has no key 'vall'. Nearest: 'val'"),
        ({"val": "dev[:5]"}, r"data.val must be like 'test\[5000:\]'"),
        ({"val": True}, "data.val must be auto, a share, a count or rows"),
        ({"test": 100}, r"data.test must be rows like 'test\[:5000\]': 100"),
        ({"calibration": 0}, "data.calibration must be a count"),
        ({"calibration": 0.5}, "data.calibration must be a count"),
    ],
)
def test_values_of_the_wrong_form(asked, message):
    with pytest.raises(UserError, match=message):
        choose(labels(train=20, test=10), asked, seed=0)


def test_neither_test_nor_val_asks_for_rows():
    with pytest.raises(BindError, match="neither a test nor a val split; name test rows"):
        choose(labels(train=20), {}, seed=0)
    assert len(choose(labels(train=20), {"test": "train[:5]"}, 0)["test"].rows) == 5
