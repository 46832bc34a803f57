"""Comparing recipes: mean and spread over seeds, by hand; the page and its JSON twin."""

import json

import pytest
from report_sample import EVIL, comparison_rows

from gracile.errors import UserError
from gracile.report.candidates import candidates, spread
from gracile.report.comparison import write_comparison


def test_mean_and_sample_standard_deviation():
    rows = [
        {"recipe": "a", "seed": s, "top1": t, "speedup": {"openvino": 2.0}}
        for s, t in enumerate((0.90, 0.92, 0.94))
    ]
    (found,) = candidates(rows)
    assert (found.seeds, found.top1.n) == ((0, 1, 2), 3)
    assert (found.top1.mean, found.top1.sd) == (pytest.approx(0.92), pytest.approx(0.02))
    assert (found.speedup["openvino"].mean, found.speedup["openvino"].sd) == (2.0, 0.0)
    assert found.drop is None


def test_one_run_has_no_spread():
    assert spread([3.0]).sd is None
    assert spread([None]) is None


def test_recipes_keep_their_order_and_rows_their_values(tmp_path):
    rows = comparison_rows()
    write_comparison(tmp_path, rows)
    data = json.loads((tmp_path / "compare.json").read_text())
    assert (data["format"], data["rows"]) == (1, rows)
    assert [r["recipe"] for r in data["recipes"]] == ["int8", "filters50+int8", "filters70+int8+kd"]


def test_the_page_shows_mean_and_spread_and_one_plot_a_runtime(tmp_path):
    rows = [
        {"recipe": "a", "seed": s, "top1": t, "drop": 0.5, "macs": 2_000_000, "bytes": 2048,
         "speedup": {"openvino": 2.0, "pytorch": 1.5}}
        for s, t in enumerate((0.90, 0.92))
    ]  # fmt: skip
    text = write_comparison(tmp_path, rows).read_text()
    assert "91.00 ± 1.41" in text
    assert "MACs (M)" in text
    assert "Size (KiB)" in text
    assert text.count("<figure>") == 2


def test_without_speed_there_is_a_table_and_a_sentence(tmp_path):
    text = write_comparison(tmp_path, [{"recipe": "a", "top1": 0.9}]).read_text()
    assert "No run has both an accuracy and a measured speed-up." in text
    assert "<figure>" not in text


def test_a_recipe_name_is_text(tmp_path):
    row = {"recipe": EVIL, "top1": 0.9, "speedup": {EVIL: 2.0}}
    assert "<script" not in write_comparison(tmp_path, [row]).read_text()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "nothing to compare"),
        ([{"recipe": "a"}, {"seed": 1}], "row 1 of the comparison has no 'recipe'"),
        ([{"recipe": "a", "speed": 2}], r"has unknown \['speed'\]"),
    ],
)
def test_rows_are_checked(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        write_comparison(tmp_path, rows)
