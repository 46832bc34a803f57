import pytest

from gracile.core.schedule import Calendar
from gracile.errors import BindError
from gracile.recipe import loads
from gracile.recipe.explain import Firing, render, timetable_rows, timetable_text

pytestmark = pytest.mark.usefixtures("toy_methods")

CALENDAR = Calendar(epochs=3, steps=75)


def test_every_firing_of_every_method_by_hand(valid):
    rows = timetable_rows(loads(valid), CALENDAR)
    # 0ep..2ep is mini-batches 0..149: every 50th is 0, 50 and 100 = epoch 1, batch 25
    final, initial = 0.5, 0.05
    middle = final + (initial - final) * 0.5**3
    name = "prune: fade"
    assert rows == [
        Firing("filters", name, 0, 0, 0.0, {"sparsity": pytest.approx(initial)}),
        Firing("filters", name, 0, 50, 0.5, {"sparsity": pytest.approx(middle)}),
        Firing("filters", name, 1, 25, 1.0, {"sparsity": pytest.approx(final)}),
        Firing("thin", "prune: cut", 2, 0, 1.0),
        Firing("int8", "quantize: grid", None, None, 1.0),
    ]
    assert [r.moment for r in rows[2:]] == ["epoch 1, batch 25", "epoch 2, batch 0", "end"]


def test_a_method_without_timing_acts_always():
    (row,) = timetable_rows(loads("recipe: 1\nmethods: {q: {quantize: grid}}"), Calendar(0))
    assert row == Firing("q", "quantize: grid")
    assert row.moment == "always"


def test_no_methods_no_rows():
    assert timetable_rows(loads("recipe: 1"), Calendar(0)) == []
    assert "timetable" in timetable_text(loads("recipe: 1"), Calendar(0))


def test_a_method_that_never_fires_is_named_with_its_line(valid):
    with pytest.raises(BindError, match=r"^<string>:17: 'thin': when {at: 2ep} never fires"):
        timetable_rows(loads(valid), Calendar(epochs=2, steps=75))


def test_the_text_shows_moments_and_levels(valid):
    text = timetable_text(loads(valid), CALENDAR)
    for part in ("filters", "prune: fade", "epoch 1, batch 25", "0.500", "sparsity 0.5000", "end"):
        assert part in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_of_many_firings_the_middle_is_left_out_and_counted(valid):
    recipe = loads(valid.replace("every: 50it", "every: 1it"))
    rows = timetable_rows(recipe, CALENDAR)
    assert len(rows) == 152
    assert render(rows).row_count == 16 + 1 + 2
    text = timetable_text(recipe, CALENDAR)
    assert "... 134 more ..." in text
    assert "epoch 1, batch 74" in text
