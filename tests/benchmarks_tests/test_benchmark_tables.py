from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmarks import latency_model
from benchmarks.cell import Cell, template
from benchmarks.run import BENCHMARKS, RESULTS
from benchmarks.tables import COLUMNS, PAGE, main, page, section, shown, table

from gracile.core.record import RecordLog

ROOT = Path(__file__).parents[2]


def records(cell="resnet20_cifar_a openvino", **facts):
    make = [
        ("latency_ms", "ms", "dense", {"value": 0.75, "ci95": (0.7, 0.8)}),
        ("latency_ms", "ms", "int8", {"value": 0.191}),
        ("speedup", "ratio", "int8", {"value": 3.9, "ci95": (3.5, 4.2)}),
        ("macs", "count", "dense", {"value": 40_551_040}),
    ]
    return [
        template("widths", cell, metric, unit, variant, **facts).about(load_avg=1.25, **value)
        for metric, unit, variant, value in make
    ]


def test_a_table_has_a_row_for_each_variant_and_a_column_for_each_metric():
    assert table(records()) == [
        "| | latency (ms) | speed-up | multiply-adds |",
        "|---|---:|---:|---:|",
        "| dense | 0.75 [0.7, 0.8] |  | 40.55 M |",
        "| int8 | 0.191 | 3.9x [3.5, 4.2] |  |",
    ]


def test_the_page_states_device_threads_load_and_versions(tmp_path):
    RecordLog(tmp_path / "widths.jsonl").add(*records(runtime="openvino", precision_hint="f32"))
    text = page(tmp_path)
    for fact in ("1 thread", "load average 1.2", "precision hint f32", "openvino 20", "gracile 0"):
        assert fact in text


def test_of_two_versions_the_newer_is_shown(tmp_path):
    old = [r.about(versions={"gracile": "0.0.1"}, time=1.0, value=99.0) for r in records()]
    RecordLog(tmp_path / "widths.jsonl").add(*records(), *old)
    assert "99" not in page(tmp_path)


def test_without_results_the_page_says_how_to_get_them(tmp_path):
    path = main(["--results", str(tmp_path), "--out", str(tmp_path / "page.md")])
    assert "make bench" in path.read_text()


def test_every_metric_has_a_title():
    generic = [m for m in BENCHMARKS.values() if not hasattr(m, "table")]
    metrics = {r.metric for m in generic for c in m.cells() for r in c.records}
    assert metrics <= set(COLUMNS)


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        ("bytes", 1_123_957, "1.07 MiB"),
        ("flag", 1.0, "yes"),
        ("s", 0.5761, "0.576"),
        ("ratio", 1.5753, "1.58x"),
    ],
)
def test_values_are_shown_with_their_unit(unit, value, text):
    assert shown(template("toy", "a", "m", unit, "v").about(value=value)) == text


def test_the_page_in_the_docs_is_what_the_records_make():
    text = PAGE.read_text()
    assert sum(line.startswith("|") for line in text.splitlines()) > 20
    assert text == page(RESULTS), "run: python -m benchmarks.tables"


def test_machines_share_a_table_where_a_cell_says_so(monkeypatch):
    def cell(variant, device, value, time, anywhere):
        record = replace(template("toy", "one", "latency_ms", "ms", variant), device=device)
        return Cell("toy", variant, "full", (record,), dict, anywhere=anywhere), record.about(
            value=value, time=time
        )

    for anywhere, tables in ((True, 1), (False, 2)):
        made = [
            cell("a", "old", 1.0, 1.0, anywhere),
            cell("a", "new", 2.0, 2.0, anywhere),
            cell("b", "old", 3.0, 1.0, anywhere),
        ]
        module = SimpleNamespace(cells=lambda made=made: [c for c, _ in made])
        monkeypatch.setitem(BENCHMARKS, "toy", module)
        text = section("toy", "", [r for _, r in made])
        assert text.count("### one") == tables
        assert ("| a | 1 |" in text) is not anywhere  # the newer one is shown
        assert "| b | 3 |" in text


def test_prefixes_are_a_table_and_a_plot():
    found = [
        template("latency_model", "prefixes", metric, "ms", f"{k} blocks").about(value=value * k)
        for k in (1, 2, 3)
        for metric, value in (("latency_ms", 0.5), ("predicted_ms", 0.55))
    ]
    *lines, plot = latency_model.table(found, {})
    assert "| 2 blocks | 1.0000 | 1.1000 | +10.0% |" in lines
    assert plot.count("<polyline") == 2
