import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gracile.core.record import VALUE_FIELDS, Record, RecordLog, find
from gracile.errors import UserError

FULL = Record(
    "latency_ms",
    1.25,
    "ms",
    n=9,
    median=1.25,
    p95=1.4,
    iqr=0.1,
    ci95=(1.2, 1.3),
    split="test",
    seed=0,
    subject={"model_sha": "m", "artifact_sha": "a"},
    runtime="openvino",
    runtime_version="2025.3",
    precision_hint="f32",
    threads=1,
    batch=1,
    shape=(1, 3, 32, 32),
    device="cpu",
    load_avg=0.3,
    recipe_sha="r",
    data_sha="d",
    versions={"torch": "2.13"},
    time=1000.0,
)


def test_measuring_again_keeps_the_id():
    again = dataclasses.replace(
        FULL, value=2.0, n=11, median=2.0, p95=3.0, iqr=0.2, ci95=(1.0, 3.0), load_avg=4.0, time=9.0
    )
    assert again.id == FULL.id


OTHERS = {
    "metric": "macs", "unit": "s", "kind": "predicted", "split": "val", "seed": 1,
    "subject": {"model_sha": "x"}, "runtime": "onnxruntime", "runtime_version": "1",
    "precision_hint": "bf16", "threads": 2, "batch": 8, "shape": (1, 1), "device": "gpu",
    "recipe_sha": "q", "data_sha": "e", "versions": {},
}  # fmt: skip


@pytest.mark.parametrize("field", OTHERS)
def test_measuring_something_else_changes_the_id(field):
    assert dataclasses.replace(FULL, **{field: OTHERS[field]}).id != FULL.id


def test_every_field_is_either_a_value_or_a_fact():
    names = {f.name for f in dataclasses.fields(Record)}
    assert names == set(OTHERS) | (set(VALUE_FIELDS) - {"id"})


def test_order_of_facts_does_not_change_the_id():
    one = dataclasses.replace(FULL, subject={"a": "1", "b": "2"})
    two = dataclasses.replace(FULL, subject={"b": "2", "a": "1"})
    assert one.id == two.id


def test_a_record_survives_json():
    again = Record.from_dict(json.loads(json.dumps(FULL.to_dict())))
    assert again == FULL
    assert again.id == FULL.id
    assert next(iter(FULL.to_dict())) == "id"


@pytest.mark.parametrize("data", [{"metric": "x"}, {**FULL.to_dict(), "colour": 1}, [], 3, None])
def test_what_is_not_a_record_is_refused(data):
    with pytest.raises(UserError, match="not a Record"):
        Record.from_dict(data)


def test_about_sets_fields_and_refuses_unknown_ones():
    assert FULL.about(seed=3).seed == 3
    with pytest.raises(ValueError, match="sed"):
        FULL.about(sed=3)


def test_the_log_replaces_and_keeps_order(tmp_path):
    log = RecordLog(tmp_path / "run" / "records.jsonl")
    log.add(Record("a", 1, "count"), Record("b", 1, "count"))
    log.add(Record("a", 2, "count"))
    again = RecordLog(tmp_path / "run" / "records.jsonl")
    assert [(r.metric, r.value) for r in again] == [("a", 2), ("b", 1)]
    assert len(again) == 2
    assert len(log.path.read_text().splitlines()) == 2


def test_the_last_line_with_an_id_wins(tmp_path):
    path = tmp_path / "records.jsonl"
    lines = [json.dumps(Record("a", v, "count").to_dict()) for v in (1, 2)]
    path.write_text("\n".join(lines) + "\n")
    assert [r.value for r in RecordLog(path)] == [2]


@settings(max_examples=25)
@given(st.integers(1, 400))
def test_a_torn_last_line_costs_that_line_only(cut):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        log = RecordLog(path)
        log.add(Record("a", 1, "count"), Record("b", 2, "count"))
        data = path.read_bytes()
        last = len(data.splitlines(keepends=True)[-1])
        path.write_bytes(data[: len(data) - min(cut, last - 1)])
        kept = [r.metric for r in RecordLog(path)]
        assert kept == (["a", "b"] if cut == 1 else ["a"])  # without its newline a line is whole
        RecordLog(path).add(Record("b", 3, "count"))
        assert [r.value for r in RecordLog(path)] == [1, 3]


@pytest.mark.parametrize("line", ["{", "[1]", '{"metric": "a"}', "nonsense"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "records.jsonl"
    good = json.dumps(FULL.to_dict())
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match=r"records\.jsonl:2: not a Record"):
        RecordLog(path)


def test_find_looks_at_fields_and_at_the_subject(tmp_path):
    log = RecordLog(tmp_path / "r.jsonl")
    other = dataclasses.replace(FULL, runtime="onnxruntime", subject={"model": "dense"})
    log.add(FULL, other)
    assert log.find("latency_ms", runtime="openvino") == [FULL]
    assert log.find("latency_ms", model="dense") == [other]
    assert log.find("latency_ms", model="dense", runtime="openvino") == []
    assert find([FULL], "macs") == []
