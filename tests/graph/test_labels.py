"""The algebra of labels: splitting, merging and tying dims keeps track of every single index."""

from math import prod

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gracile.graph.labels import KEPT, Axes, Flow, segments

SIZES = {("a", 0): 6, ("b", 0): 6, ("c", 0): 12, ("e", 0): 12, ("h", 0): 2, ("d", 0): 3}


def flow():
    return Flow(lambda at, dim: SIZES.get((at, dim)), lambda at: at, lambda id: None)


def atoms(f, labels):
    return [f.atoms(int(x)) for x in f.find(labels)]


def test_a_split_makes_an_atom_a_row_and_an_atom_a_column():
    f = flow()
    rows, columns = f.split(f.axis("a", 0), (2, 3), "")
    got = atoms(f, f.axis("a", 0))
    assert got == [(int(r), int(c)) for r in rows for c in columns]
    assert {f.level(int(r)) for r in rows} == {"outer"}
    assert {f.level(int(c)) for c in columns} == {"inner"}


def test_the_same_split_again_finds_the_same_atoms():
    f = flow()
    first = f.split(f.axis("a", 0), (2, 3), "")
    again = f.split(f.axis("a", 0), (2, 3), "")
    assert [x.tolist() for x in first] == [x.tolist() for x in again]


def test_a_finer_split_splits_the_atoms_of_a_coarser_one():
    f = flow()
    heads, _ = f.split(f.axis("c", 0), (2, 6), "")
    a, b, _ = f.split(f.axis("c", 0), (2, 3, 2), "")
    assert a.tolist() == heads.tolist()
    assert len(b) == 3
    assert all(len(x) == 3 for x in atoms(f, f.axis("c", 0)))


def test_a_split_across_the_first_one_finds_the_common_parts():
    """(2, 6) and then (4, 3): the 6 are (2, 3), so an index is one of 2, one of 2 and one of 3."""
    f = flow()
    f.split(f.axis("c", 0), (2, 6), "")
    f.split(f.axis("c", 0), (4, 3), "")
    layout = atoms(f, f.axis("c", 0))
    assert [len(set(x)) for x in zip(*layout, strict=True)] == [2, 2, 3]


def test_a_split_that_does_not_fit_leaves_one_unit():
    """Rows of 4 and rows of 3 have no whole common part: all must go together."""
    f = flow()
    f.split(f.axis("c", 0), (3, 4), "")
    f.split(f.axis("c", 0), (4, 3), "")
    assert len(set(atoms(f, f.axis("c", 0)))) == 1


def test_thirds_of_rows_are_found():
    """(6 groups, 2) read as (2 rows, 6): the 6 are (3, 2), so a group is a row and a third."""
    f = flow()
    f.split(f.axis("c", 0), (6, 2), "")
    f.split(f.axis("c", 0), (2, 6), "")
    layout = atoms(f, f.axis("c", 0))
    assert [len(set(x)) for x in zip(*layout, strict=True)] == [2, 3, 2]


def test_halves_of_a_concatenation_share_their_columns():
    f = flow()
    f.split(f.axis("a", 0), (2, 3), "")
    f.split(f.axis("c", 0), (4, 3), "")
    both = np.concatenate([f.axis("a", 0), f.axis("c", 0)])
    _, columns = f.split(both, (6, 3), "")
    left, right = atoms(f, f.axis("a", 0)), atoms(f, f.axis("c", 0))
    for j, (column,) in enumerate(atoms(f, columns)):
        assert [j == k % 3 for k in range(6)] == [column in x for x in left]
        assert [j == k % 3 for k in range(12)] == [column in x for x in right]


def test_thirds_of_rows_in_two_halves_are_tied():
    """No product any more: the three groups of a row are one unit, columns are cut alike."""
    f = flow()
    f.split(f.axis("c", 0), (6, 2), "")
    f.split(f.axis("e", 0), (6, 2), "")
    both = np.concatenate([f.axis("c", 0), f.axis("e", 0)])
    rows, columns = f.split(both, (4, 6), "")
    layout = atoms(f, both)
    assert len({x[0] for x in layout}) == 4
    assert len({x[1] for x in layout}) == 2
    assert [x[0] for x in layout] == [r for (r,) in atoms(f, rows) for _ in range(6)]
    assert [x[1] for x in layout[:6]] == [c for (c,) in atoms(f, columns)]


def test_merging_rows_and_columns_gives_the_split_axis_back():
    f = flow()
    rows, columns = f.split(f.axis("a", 0), (2, 3), "")
    merged = f.merge((rows, columns), (2, 3))
    f.tie(merged, f.axis("a", 0), "")
    assert atoms(f, merged) == atoms(f, f.axis("a", 0))


def test_tying_a_plain_axis_to_a_product_makes_it_one():
    f = flow()
    merged = f.merge((f.axis("h", 0), f.axis("d", 0)), (2, 3))
    f.tie(f.axis("a", 0), merged, "")
    assert atoms(f, f.axis("a", 0))[4] == (int(f.axis("h", 0)[1]), int(f.axis("d", 0)[1]))


def test_tying_two_products_ties_rows_to_rows_and_columns_to_columns():
    f = flow()
    left = f.split(f.axis("a", 0), (2, 3), "")
    right = f.split(f.axis("b", 0), (2, 3), "")
    f.tie(f.axis("a", 0), f.axis("b", 0), "")
    for x, y in zip(left, right, strict=True):
        assert f.find(x).tolist() == f.find(y).tolist()


def test_what_is_tied_to_an_index_that_stays_is_protected_with_the_reason():
    f = flow()
    f.tie(f.axis("a", 0), np.full(6, KEPT), "it stays")
    assert f.reasons(f.find(f.axis("a", 0)).tolist()) == ["it stays"] * 6


def test_a_product_that_must_stay_protects_its_row_and_its_column():
    f = flow()
    rows, columns = f.split(f.axis("a", 0), (2, 3), "")
    f.protect(f.axis("a", 0)[4:5], "why")  # row 1, column 1
    assert [bool(f.reasons([int(r)])) for r in rows] == [False, True]
    assert [bool(f.reasons([int(c)])) for c in columns] == [False, True, False]


def test_protection_and_levels_survive_a_union():
    f = flow()
    f.protect(f.axis("b", 0)[2:3], "why")
    f.tie(f.axis("a", 0), f.axis("b", 0), "")
    assert f.reasons(f.find(f.axis("a", 0)).tolist()) == ["why"]


def test_axes_of_different_lengths_cannot_be_tied():
    f = flow()
    with pytest.raises(ValueError, match="cannot tie 6 to 12"):
        f.tie(f.axis("a", 0), f.axis("c", 0), "")


def test_more_tensors_than_the_first_table_holds():
    f = Flow(lambda at, dim: 700, lambda at: at, lambda id: None)
    for k in range(8):
        f.tie(f.axis(f"t{k}", 0), f.axis("t0", 0), "")
    assert f.find(f.axis("t7", 0)).tolist() == f.find(f.axis("t0", 0)).tolist()


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((2, 6), (2, 6), [([0], [0]), ([1], [1])]),
        ((2, 3, 4), (2, 12), [([0], [0]), ([1, 2], [1])]),
        ((2, 12), (2, 3, 4), [([0], [0]), ([1], [1, 2])]),
        ((2, 3, 4), (2, 4, 3), [([0], [0]), ([1, 2], [1, 2])]),
        ((2, 5, 1), (2, 5), [([0], [0]), ([1], [1]), ([2], [])]),
        ((2, 5), (2, 1, 5), [([0], [0]), ([1], [1, 2])]),
        ((4, 3), (12,), [([0, 1], [0])]),
    ],
)
def test_segments_are_the_smallest_runs_of_equal_size(before, after, expected):
    assert segments(before, after) == expected


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@given(shapes, st.integers(0, 3))
def test_labels_move_as_data_moves(shape, dim):
    """Reshape to one dim and back: a label is where numpy puts the index."""
    dim %= len(shape)
    assume(shape[dim] > 1)
    f = Flow(lambda at, d: shape[dim], lambda at: at, lambda id: None)
    labels = f.axis("w", 0)
    dims = [None] * len(shape)
    dims[dim] = labels
    value = Axes(tuple(dims))
    flat = f.rearranged(value, shape, (prod(shape),), "")
    place = [1] * len(shape)
    place[dim] = -1
    expected = np.broadcast_to(labels.reshape(place), shape).reshape(-1)
    assert f.find(flat.dims[0]).tolist() == expected.tolist()
    back = f.rearranged(flat, (prod(shape),), shape, "")
    assert f.find(back.dims[dim]).tolist() == labels.tolist()
    assert not f.reasons(labels.tolist())
