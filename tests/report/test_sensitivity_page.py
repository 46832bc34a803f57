"""The page of a scan: curves in sixes, drops as a table; and a run's report that has one."""

from report_sample import make_run

from gracile.analyze.sensitivity import Row, Sensitivity
from gracile.report.html import write
from gracile.report.sensitivity import drops, write_sensitivity


def scan(by="filter", tensors=7):
    base = Row("", 0.0, 0, 0, 0.9, 1.0, 0.5, 40)
    rows = [
        Row(f"layer{t}.weight", level, 1, 8, 0.9 - level / 10, 1.0, 0.6, 40)
        for t in range(tensors)
        for level in ((8.0, 2.0) if by == "bits" else (0.5, 0.25))
    ]
    criterion = None if by == "bits" else "l1"
    return Sensitivity(by, criterion, base, tuple(rows), {"fc.weight": "it has only one filter"})


def test_the_table_has_a_tensor_a_row_and_signed_points():
    table = drops(scan())
    assert table.columns == ("Tensor", "50 %", "25 %")
    assert table.rows[0] == ("layer0.weight", "−5.0", "−2.5")
    assert "the least l1 first" in table.note
    assert drops(scan(by="bits")).columns == ("Tensor", "8 bits", "2 bits")


def test_the_page_shows_six_curves_a_chart_and_what_was_left_out(tmp_path):
    page = write_sensitivity(tmp_path, scan(), name="a<b", data="digits, val").read_text()
    assert "layer0 to layer5" in page
    assert "layer6" in page
    assert "it has only one filter" in page
    assert "Sensitivity: a&lt;b" in page
    assert "40 images of digits, val" in page
    assert "top-1 90.00 %, loss 0.500" in page.replace("\u00a0", " ")


def test_a_run_with_a_scan_shows_it_and_one_without_is_silent(tmp_path):
    run = make_run(tmp_path / "run")
    assert "Sensitivity" not in write(run).read_text()
    scan().save(run)
    text = write(run).read_text()
    assert "Sensitivity by filter" in text
    assert "layer0 to layer5" in text
