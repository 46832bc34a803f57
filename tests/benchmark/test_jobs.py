"""The table of jobs: leases, retries, one job for the same question, on disk and over HTTP."""

from contextlib import contextmanager
from threading import Thread

import pytest
from test_memory import network

from gracile.benchmark import jobs
from gracile.benchmark.jobs import JobTable, unpacked
from gracile.benchmark.jobs_http import RemoteTable, server
from gracile.core.record import Record
from gracile.errors import UserError

RECORD = Record("latency_ms", 1.5, "ms", subject={"model": "a"}).to_dict()
HERE = ["onnxruntime"]


@pytest.fixture
def clock(monkeypatch):
    """Time that goes by only when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(jobs, "time", lambda: now[0])
    return now


@pytest.fixture
def artifact(tmp_path):
    return network(tmp_path / "m.onnx", 4)


@contextmanager
def served(table, **options):
    with server(table, **options) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()


@pytest.fixture(params=["folder", "http"])
def sides(request, tmp_path):
    """(the coordinator's table, the device's)."""
    table = JobTable(tmp_path / "jobs")
    if request.param == "folder":
        yield table, JobTable(tmp_path / "jobs")
    else:
        with served(table, secret="s") as url:
            yield table, RemoteTable(url, "s")


def test_a_job_goes_to_one_device_and_comes_back(sides, artifact, tmp_path, clock):
    table, device = sides
    id = table.add({"a": artifact}, rounds=5)
    assert table.state(id).state == "waiting"
    lease = device.lease("edge", HERE)
    assert (lease.id, lease.task["settings"]) == (id, {"rounds": 5})
    assert device.lease("other", HERE) is None
    ((name, facts),) = lease.task["artifacts"]
    got = unpacked(facts, device.file, tmp_path / "here")
    assert (name, got.sha, got.runtime, got.inputs) == (
        "a", artifact.sha, "onnxruntime", artifact.inputs,
    )  # fmt: skip
    assert device.done(id, lease.token, [RECORD])
    state = table.state(id)
    assert (state.state, state.worker, state.attempts) == ("done", "edge", 1)
    assert [r.to_dict() for r in table.wait(id)] == [RECORD]


def test_the_same_question_is_asked_once(artifact, tmp_path):
    table = JobTable(tmp_path / "jobs")
    id = table.add({"a": artifact}, rounds=5)
    lease = table.lease("edge", HERE)
    table.done(id, lease.token, [RECORD])
    assert table.add({"a": artifact}, rounds=5) == id
    assert table.lease("edge", HERE) is None
    assert table.add({"a": artifact}, rounds=7) != id


def test_the_oldest_job_of_a_runtime_that_is_there(artifact, tmp_path):
    table = JobTable(tmp_path / "jobs")
    ids = [table.add({"a": artifact}, rounds=n) for n in (9, 5, 7)]
    assert table.lease("edge", ["openvino", "ncnn"]) is None
    assert [table.lease("edge", HERE).id for _ in ids] == ids


def test_a_lease_that_is_not_renewed_ends(sides, artifact, clock):
    table, device = sides
    id = table.add({"a": artifact})
    first = device.lease("dies", HERE, 60)
    clock[0] += 50
    assert device.renew(id, first.token, 60)
    clock[0] += 50
    assert device.lease("other", HERE, 60) is None
    clock[0] += 20
    second = device.lease("other", HERE, 60)
    assert second.id == id
    assert not device.renew(id, first.token)
    assert not device.done(id, first.token, [RECORD])  # too late: it is measured by another
    assert device.done(id, second.token, [RECORD])
    assert not device.failed(id, second.token, "x")  # it is done
    assert table.state(id).attempts == 2


def test_a_job_that_fails_waits_again_and_is_given_up_in_the_end(sides, artifact, clock):
    table, device = sides
    id = table.add({"a": artifact})
    for attempt in range(jobs.ATTEMPTS):
        lease = device.lease("edge", HERE)
        assert device.failed(id, lease.token, f"crash {attempt}")
    assert device.lease("edge", HERE) is None
    with pytest.raises(UserError, match="given up after 3 attempts: crash 2"):
        table.wait(id)


def test_a_job_that_kills_its_device_is_given_up(artifact, tmp_path, clock):
    table = JobTable(tmp_path / "jobs")
    id = table.add({"a": artifact})
    for _ in range(jobs.ATTEMPTS):
        assert table.lease("edge", HERE, 60)
        clock[0] += 61
    assert table.lease("edge", HERE) is None
    assert (table.state(id).state, table.state(id).error) == ("failed", "its lease ended")


def test_waiting_too_long_says_what_to_do(artifact, tmp_path):
    table = JobTable(tmp_path / "jobs")
    with pytest.raises(UserError, match=r"is waiting after 0 s; start `gracile agent"):
        table.wait(table.add({"a": artifact}), limit_s=0)


def test_what_is_no_job_is_refused(artifact, tmp_path):
    table = JobTable(tmp_path / "jobs")
    with pytest.raises(UserError, match="about one runtime, got no artifact"):
        table.add({})
    with pytest.raises(UserError, match="unknown setting 'speed'"):
        table.add({"a": artifact}, speed=1)
    with pytest.raises(UserError, match="no job 'x'"):
        table.state("x")
    for name in ("../jobs.sqlite", "", "0" * 64):
        with pytest.raises(UserError, match="no file"):
            table.file(name)


def test_an_artifact_that_is_not_what_the_task_says_is_refused(tmp_path):
    facts = {"files": [[".onnx", "0" * 64]]}
    with pytest.raises(UserError, match="arrived with another content"):
        unpacked(facts, lambda sha: b"other", tmp_path / "a")
    with pytest.raises(UserError, match="ending must be letters"):
        unpacked({"files": [["/../x", "0"]]}, lambda sha: b"", tmp_path / "b")


def test_a_wrong_secret_and_nonsense_are_refused_and_nobody_there_is_no_defect(tmp_path):
    table = JobTable(tmp_path / "jobs")
    with served(table, secret="s") as url:
        with pytest.raises(UserError, match=r"403.*wrong secret"):
            RemoteTable(url).lease("edge", HERE)
        device = RemoteTable(url, "s")
        with pytest.raises(UserError, match=r"400.*not a Record"):
            device.done("x", "y", [{"metric": "m"}])
        with pytest.raises(UserError, match="404"):
            device._call("/drop")
        with pytest.raises(UserError, match=r"400.*no file"):
            device.file("../jobs.sqlite")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1"):
        device.lease("edge", HERE)
