import math
import threading

import pytest
import torch
from benchmarks import capture, fakequant, run, session_overhead
from benchmarks.cell import Cell, template
from benchmarks.run import (
    BENCHMARKS,
    chosen,
    main,
    measuring_slot,
    missing,
    notes,
    notes_file,
    run_cell,
)

from gracile.core.record import RecordLog
from gracile.errors import UserError

EVERY = [c for m in BENCHMARKS.values() for c in m.cells()]


def cell(found=None, calls=None, **facts):
    records = tuple(template("toy", "one", "ms", "ms", v, **facts) for v in ("a", "b"))

    def measure():
        if calls is not None:
            calls.append(1)
        return (
            {("ms", "a"): {"value": 1.0}, ("ms", "b"): {"value": 2.0}} if found is None else found
        )

    return Cell("toy", "one", "smoke", records, measure)


def test_a_cell_is_measured_once(tmp_path):
    calls = []
    for _ in range(2):
        run_cell(cell(calls=calls), RecordLog(tmp_path / "toy.jsonl"))
    assert len(calls) == 1
    stored = {r.subject["variant"]: r.value for r in RecordLog(tmp_path / "toy.jsonl")}
    assert stored == {"a": 1.0, "b": 2.0}


def test_again_measures_anew_and_replaces(tmp_path):
    log, calls = RecordLog(tmp_path / "toy.jsonl"), []
    run_cell(cell(calls=calls), log)
    run_cell(cell(calls=calls), log, again=True)
    assert len(calls) == 2
    assert len(log) == 2


def test_other_conditions_are_measured_anew(tmp_path):
    log = RecordLog(tmp_path / "toy.jsonl")
    run_cell(cell(), log)
    assert not cell(threads=2).done(log)
    assert cell().done(log)


def test_a_cell_that_was_cut_off_is_measured_again(tmp_path):
    log, calls = RecordLog(tmp_path / "toy.jsonl"), []
    log.add(cell().run()[0])
    assert run_cell(cell(calls=calls), log)
    assert len(calls) == 1
    assert len(log) == 2


def test_what_a_cell_says_beyond_numbers_is_kept_beside_its_records(tmp_path):
    one, log = cell(), RecordLog(tmp_path / "toy.jsonl")
    one.notes["status"] = "ok"
    run_cell(one, log)
    assert notes(notes_file(log.path)) == {"one": {"status": "ok"}}
    run_cell(cell(), RecordLog(tmp_path / "other.jsonl"))
    assert not notes_file(tmp_path / "other.jsonl").exists()


def test_a_benchmark_whose_packages_are_missing_is_skipped_aloud(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.structure, "NEEDS", {"no_such_module": "no-such-package"})
    monkeypatch.setattr(run, "BENCHMARKS", {"structure": run.structure})
    assert missing("structure") == ["no-such-package"]
    assert main(["--results", str(tmp_path)]) == 0
    assert "structure: needs no-such-package: make bench-peers; skipped" in (
        capsys.readouterr().err
    )
    with pytest.raises(UserError, match="no-such-package"):
        main(["--only", "structure", "--results", str(tmp_path)])


def test_a_cell_that_measures_something_else_is_refused():
    with pytest.raises(RuntimeError, match="toy/one announced"):
        cell(found={("ms", "a"): {"value": 1.0}}).run()


@pytest.mark.parametrize("one", EVERY, ids=lambda c: f"{c.benchmark}-{c.name}")
def test_a_cell_announces_distinct_records_with_all_facts(one):
    assert len({r.id for r in one.records}) == len(one.records)
    for r in one.records:
        assert math.isnan(r.value)
        assert r.unit
        assert r.device
        assert r.threads >= 1
        assert {"gracile", "torch", "python"} <= set(r.versions)
        assert r.subject["benchmark"] == one.benchmark


def test_cells_of_all_benchmarks_have_distinct_records():
    ids = [r.id for c in EVERY for r in c.records]
    assert len(set(ids)) == len(ids)


def test_full_contains_smoke():
    for name in BENCHMARKS:
        smoke = {c.name for c in chosen(name, "smoke")}
        full = {c.name for c in chosen(name, "full")}
        assert full
        assert smoke <= full
    assert any(list(chosen(name, "smoke")) for name in BENCHMARKS)


def test_only_one_measures_at_a_time(tmp_path, capsys):
    second = threading.Event()

    def other():
        with measuring_slot(tmp_path / "slot"):
            second.set()

    thread = threading.Thread(target=other)
    with measuring_slot(tmp_path / "slot"):
        thread.start()
        assert not second.wait(0.2)
    thread.join(5)
    assert second.is_set()
    assert "waiting" in capsys.readouterr().err


def test_the_capture_benchmark_runs_and_its_second_run_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "NETWORKS", {"resnet20_cifar_a": ((3, 32, 32), "smoke")})
    assert main(["--only", "capture", "--results", str(tmp_path)]) == 1
    log = RecordLog(tmp_path / "capture.jsonl")
    assert {r.subject["variant"] for r in log} == set(capture.STAGES)
    assert all(r.value > 0 and r.unit == "s" and r.load_avg is not None for r in log)
    assert main(["--only", "capture", "--results", str(tmp_path)]) == 0


@pytest.mark.parametrize("axis", [None, 0])
def test_the_two_fake_quantizations_that_are_timed_agree(axis):
    case = fakequant.Case("tiny", (8, 64), axis, *((0, 255) if axis is None else (-127, 127)))
    results = []
    for rule in (fakequant.ours, fakequant.theirs):
        x, scale, zero = fakequant.arguments(case)
        x.requires_grad_(True)
        y = rule(x, scale, zero, case)
        y.sum().backward()
        results.append((y.detach(), x.grad))
    one_step = float(scale.max())  # torch multiplies by 1/scale, which rounds other ties
    torch.testing.assert_close(results[0][0], results[1][0], atol=1.01 * one_step, rtol=0)
    assert (results[0][1] != results[1][1]).float().mean() < 0.01


@pytest.mark.parametrize("variant", session_overhead.VARIANTS)
def test_the_steps_that_are_timed_train(variant):
    step = session_overhead.step(session_overhead.RECIPES.get(variant))
    model = next(c.cell_contents for c in step.__closure__ if _is_trained(c.cell_contents))
    parameters = getattr(model, "model", model).parameters
    before = [p.detach().clone() for p in parameters()]
    step()
    step()
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters(), strict=True))


def _is_trained(value):
    return isinstance(value, torch.nn.Module) or type(value).__name__ == "Session"
