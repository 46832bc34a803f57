"""The table of a recovery ladder: a row for each rung, what was not taken with its reason."""

from pathlib import Path

from gracile.report.ladder import ladder
from gracile.report.run import Run

RUNG = {"rung": "batch_norm", "seconds": 1.5, "images": 300, "before": 0.5, "after": 0.75,
        "kept": True, "why": "", "gain": 25.0}  # fmt: skip


def section(*rungs):
    climbed = {"entry": "l", "epoch": 3, "before": 0.5, "after": 0.75, "rungs": list(rungs)}
    return ladder(Run(Path("x"), {"ladder": [climbed]}))


def test_each_rung_is_a_row():
    lost = {**RUNG, "rung": "bias", "before": 0.75, "after": 0.7, "kept": False, "gain": 0.0}
    unable = {**RUNG, "rung": "reconstruct", "after": None, "kept": False, "why": "no layer"}
    ((_, _, (table,)),) = [(s.id, s.title, s.blocks) for s in section(RUNG, lost, unable)]
    assert table.rows[0] == (
        "l", "3", "batch_norm", "50.00", "75.00", "+25.00", "1.50", "300", "yes",
    )  # fmt: skip
    assert table.rows[1][5:] == ("0.00", "1.50", "300", "no")
    assert table.rows[2][4] == "–"
    assert table.rows[2][8] == "not taken: no layer"


def test_a_climb_that_needed_nothing_is_told_and_without_a_ladder_there_is_no_section():
    ((row,),) = [s.blocks[0].rows for s in section()]
    assert row[2] == "none needed"
    assert ladder(Run(Path("x"), {})) == []
