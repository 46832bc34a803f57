"""The report page: what it holds, what it leaves out, and that nothing in a run can break it."""

import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_sample import EVIL, make_run, result

from gracile.core.record import Record
from gracile.errors import UserError
from gracile.report.coverage import hundred
from gracile.report.html import write

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Reader(HTMLParser):
    """Collects headings, text, table cells and every attribute that could load something."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.text, self.tables = [], [], [], [], {}
        self._caption = self._row = None

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self._row = []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"
        if tag == "tr" and self._row:
            self.tables.setdefault(self._caption, []).append(self._row)

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "caption":
            self._caption = data
        elif self.open and self.open[-1] in ("td", "th"):
            self._row.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def read(path):
    reader = Reader()
    reader.feed(path.read_text())
    assert reader.open == []
    return reader


def run_with(tmp_path, **changes):
    """The sample's result with some parts replaced; a part that is None is taken out."""
    data = {k: v for k, v in {**result(), **changes}.items() if v is not None}
    (tmp_path / "result.json").write_text(json.dumps(data))
    return tmp_path


def test_all_sections_are_there(tmp_path):
    page = read(write(make_run(tmp_path)))
    for heading in (
        "2.41×\xa0faster in OpenVINO", "Goal missed", "Before and after", "Accuracy on the way",
        "Agreement with the original", "Speed-up", "Latency per runtime", "Layer by layer",
        "Training curves", "Sparsity over time", "Coverage", "Warnings", "Proof of integer kernels",
        "Parity with PyTorch", "Recipe", "Environment and data", "How to reproduce",
    ):  # fmt: skip
        assert heading in " ".join(page.text), heading
    assert "Not in this report" not in page.words


def test_tables_hold_the_numbers_of_the_result(tmp_path):
    tables = read(write(make_run(tmp_path))).tables
    assert ["Top-1 accuracy (%)", "92.55", "91.94", "−0.61 points"] in tables["Before and after"]
    assert tables["Speed-up"][1] == ["OpenVINO", "0.842", "0.349", "2.41", "2.36–2.47"]
    assert tables["Agreement with the original"][2] == [
        "ONNX Runtime", "96.15", "385", "217", "156", "10000", "3", "2.10", "< 0.001",
    ]  # fmt: skip
    assert tables["Proof of integer kernels"][1] == ["OpenVINO", "18 of 19", "20", "3"]
    assert tables["Parity with PyTorch"][1] == [
        "OpenVINO", "int8", "0.0312", "1.00", "0.999981", "99.91", "none",
    ]  # fmt: skip
    assert tables["Conditions"][2] == [
        "OpenVINO", "after", "0.349", "0.021", "0.419", "9", "1", "1", "f32",
    ]  # fmt: skip
    assert ["conv1", "conv", "16", "16", "32", "0.0", "0.44", "0.29"] in tables[
        "All layers as a table"
    ]


def test_latency_is_described_by_the_record_the_result_carries(tmp_path):
    record = Record(
        "latency_ms", 7.0, "ms", median=8.0, iqr=0.5, n=5, threads=2, runtime="openvino"
    )
    before = {"latency": {"openvino": 7.0}, "latency_records": {"openvino": record.to_dict()}}
    data = {"before": before, "after": {}}
    (tmp_path / "result.json").write_text(json.dumps(data))
    page = read(write(tmp_path))
    assert page.tables["Conditions"][1] == [
        "OpenVINO", "before", "7.000", "0.500", "–", "5", "2", "–", "–",
    ]  # fmt: skip
    assert "OpenVINO: 2 threads." in page.words


def test_a_prediction_never_stands_in_a_table_of_measurements(tmp_path):
    tables = read(write(make_run(tmp_path))).tables
    having = [name for name, rows in tables.items() if any("2.31" in row for row in rows)]
    assert having == ["Predicted before the run"]
    assert len(tables["Predicted before the run"]) == 2


def test_the_reasons_of_the_ledger_are_told(tmp_path):
    rows = read(write(make_run(tmp_path))).tables["Reasons"]
    protected = next(row for row in rows if row[0] == "protected")
    assert protected[1:3] == ["reads the image; 0.8 points at 8 bits", "filters, int8"]
    assert sum(float(row[3]) for row in rows[1:]) == pytest.approx(100, abs=0.2)


def test_the_page_loads_nothing(tmp_path):
    path = write(make_run(tmp_path))
    page = read(path)
    assert not {"script", "img", "iframe", "object", "audio", "video"} & set(page.tags)
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert not re.search(r"https?://|@import|url\(", path.read_text())


def test_every_link_has_its_target(tmp_path):
    text = write(make_run(tmp_path)).read_text()
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in re.findall(r'href="(#[^"]+)"', text)} <= set(ids)


def test_a_method_named_script_is_text(tmp_path):
    path = write(make_run(tmp_path, method=EVIL))
    page = read(path)
    assert "script" not in page.tags
    assert path.read_text().count("&lt;script&gt;") >= 3  # recipe, plan, reasons
    assert EVIL in page.words


def test_text_of_the_result_is_escaped(tmp_path):
    changes = {
        "warnings": [{"code": EVIL, "text": EVIL}],
        "layers": [{"id": EVIL, "op": EVIL, "channels_before": 2, "channels_after": 1}],
        "parity": {EVIL: {"first_bad": EVIL}},
        "data": {"name": EVIL, "splits": {EVIL: EVIL}},
        "versions": {EVIL: EVIL},
        "command": [EVIL, "--out", EVIL],
        "out": EVIL,
    }
    page = read(write(run_with(tmp_path, **changes)))
    assert "script" not in page.tags


def test_the_same_files_give_the_same_page(tmp_path):
    first = write(make_run(tmp_path)).read_bytes()
    assert write(tmp_path).read_bytes() == first


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("history.json", "Nothing was trained, or the run kept no history."),
        ("ledger.json", None),
        ("plan.json", None),
        ("recipe.yaml", None),
        ("records.jsonl", "Records.jsonl has none."),
    ],
)
def test_a_file_that_is_not_there_costs_only_its_section(tmp_path, missing, sentence):
    make_run(tmp_path)
    (tmp_path / missing).unlink()
    page = read(write(tmp_path))
    assert "Before and after" in page.words
    if sentence:
        assert sentence in page.words


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (("stages",), "Accuracy was not measured between the stages of this run."),
        (("agreement",), "Predictions were not compared sample by sample."),
        (("speedup",), "No runtime was asked for, so no time was measured."),
        (("layers",), "This run has no list of layers."),
        (("kernels",), "No runtime reported which kernels it runs."),
        (("parity",), "Nothing was exported, so there was nothing to compare."),
        (("warnings",), "The run raised none."),
    ],
)
def test_an_absent_part_is_named_once_and_honestly(tmp_path, parts, sentence):
    page = read(write(run_with(tmp_path, **dict.fromkeys(parts))))
    assert page.words.count(sentence) == 1


def test_a_bare_result_is_enough(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    page = read(write(tmp_path))
    assert "Speed not measured, accuracy not measured." in page.words
    assert "No goal was set" in page.words


def test_null_parts_count_as_absent(tmp_path):
    nulls = dict.fromkeys(result())
    nulls.update(before={"latency": {"openvino": None}}, after=None, speedup={"openvino": None})
    (tmp_path / "result.json").write_text(json.dumps(nulls))
    assert "No runtime was asked for" in read(write(tmp_path)).words


def test_shares_in_the_result_are_enough_for_the_coverage_bars(tmp_path):
    shares = {"parameters": {"precision": {"int4": 0.2, "int8": 0.5, "float": 0.3}}}
    page = read(write(run_with(tmp_path, ledger={"shares": shares})))
    assert "Precision, by parameters: int8 50.0 %, int4 20.0 %, float 30.0 %" in page.words


def test_fewer_macs_without_speed_is_said(tmp_path):
    slow = {"openvino": {"ratio": 0.98, "ci95": [0.95, 1.01]}}
    page = read(write(run_with(tmp_path, speedup=slow)))
    assert "Multiply-adds fell 1.86× and yet OpenVINO is not faster" in page.words
    assert "and yet" not in read(write(make_run(tmp_path))).words


def test_the_command_can_be_pasted_into_a_shell(tmp_path):
    told = read(write(run_with(tmp_path, command=["gracile", "compress", "a b", "--json"])))
    assert "gracile compress 'a b' \\ --json" in told.words
    made = read(write(make_run(tmp_path)))
    assert (
        "gracile compress sample_resnet20 \\ --recipe runs/sample/recipe.yaml \\ --data sample-data"
        " \\ --runtime openvino \\ --runtime onnxruntime \\ --out runs/again" in made.words
    )


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("result.json", "{", r"result\.json: not a JSON file"),
        ("result.json", "[]", r"result\.json: must be a JSON object"),
        ("result.json", '{"before": 3}', r"result\.json: 'before' must be an object"),
        ("history.json", '{"curves": {"lr": [1]}}', r"history\.json: a curve must be a list"),
        ("ledger.json", "{}", r"not a ledger"),
        ("plan.json", "{}", r"plan\.json: not a valid plan"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, text, message):
    make_run(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        write(tmp_path)


def test_a_folder_without_a_result_is_no_run(tmp_path):
    make_run(tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(UserError, match=r"not a finished run: it has no result\.json"):
        write(tmp_path)


def test_a_failed_write_leaves_the_old_page(tmp_path):
    old = write(make_run(tmp_path)).read_bytes()
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(UserError):
        write(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=8).filter(any))
def test_shown_percentages_add_up_to_a_hundred(counts):
    shares = {str(i): n / sum(counts) for i, n in enumerate(counts)}
    shown = hundred(shares)
    assert sum(round(10 * float(v)) for v in shown.values()) == 1000
    assert all(abs(float(shown[k]) - 100 * shares[k]) < 0.1 + 1e-6 for k in shares)
