"""`gracile sensitivity`, on a network of a thousand parameters."""

import csv
import json

COMMAND = ("sensitivity", "net.py:Net", "--images", "24", "--levels", "0.25,0.5")


def test_files_page_and_json(as_json, tmp_path):
    out = tmp_path / "scan"
    found = as_json(*COMMAND, "--out", out, "--tensors", "inner", "--max-drop", "100")
    assert (found["by"], found["criterion"], found["base"]["images"]) == ("filter", "l1", 24)
    assert [(r["tensor"], r["level"], r["removed"]) for r in found["rows"]] == [
        ("inner.weight", 0.25, 2),
        ("inner.weight", 0.5, 4),
    ]
    assert found["tolerated"] == {"inner.weight": 0.5}
    assert sorted(p.name for p in out.iterdir()) == [
        "sensitivity.csv", "sensitivity.html", "sensitivity.json",
    ]  # fmt: skip
    rows = list(csv.DictReader((out / "sensitivity.csv").read_text().splitlines()))
    assert [r["tensor"] for r in rows] == ["", "inner.weight", "inner.weight"]
    assert json.loads((out / "sensitivity.json").read_text())["rows"] == found["rows"]
    page = (out / "sensitivity.html").read_text()
    assert "Points of top-1 lost" in page
    assert "24 images of digits, val" in page


def test_the_table_and_the_split(call):
    code, out, _ = call(*COMMAND, "--by", "bits", "--levels", "8,2", "--split", "test[:30]")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["Tensor", "8", "bits", "2", "bits"]
    assert [r[0] for r in rows[1:4]] == ["stem.weight", "inner.weight", "head.weight"]
    assert "on 24 images of digits, test[:30]" in out


def test_levels_as_a_span(as_json):
    found = as_json(*COMMAND[:4], "--levels", "0.25:0.75:0.25", "--tensors", "stem")
    assert [r["level"] for r in found["rows"]] == [0.25, 0.5, 0.75]


def test_what_is_refused(call):
    code, _, err = call(*COMMAND[:4], "--levels", "a")
    assert code == 2
    assert "--levels must be like 0.2,0.5 or 0.1:0.9:0.1 or 8,4,2, got 'a'" in err
    code, _, err = call(*COMMAND, "--resume")
    assert code == 2
    assert "--resume needs the --out" in err
    code, _, err = call(*COMMAND, "--by", "rows")
    assert code == 2
    assert "by must be one of filter, channel, element, bits" in err
