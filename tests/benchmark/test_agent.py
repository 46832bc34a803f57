"""The agent: fair between coordinators, survives failures, and runs where there is no torch."""

import json
import subprocess
import sys
from time import sleep

import pytest
from test_memory import network

from gracile.benchmark.agent import Agent, runtimes_here, table_at
from gracile.benchmark.jobs import JobTable
from gracile.core.record import Record
from gracile.errors import UserError

RECORD = Record("latency_ms", 1.5, "ms").to_dict()
HERE = ["onnxruntime"]


def tables(tmp_path, counts):
    """A table for each count, with so many jobs."""
    out = {}
    for name, count in counts.items():
        out[name] = JobTable(tmp_path / name)
        for n in range(count):
            out[name].add({"a": network(tmp_path / "m.onnx", 4)}, rounds=5 + n)
    return out


def done(table):
    with table._open() as db:
        return db.execute("SELECT COUNT(*) FROM jobs WHERE state = 'done'").fetchone()[0]


def test_coordinators_get_the_same_time_not_the_same_number(tmp_path):
    both = tables(tmp_path, {"slow": 9, "fast": 9})
    order = []

    def measure(table, lease):
        name = table.folder.name
        order.append(name)
        sleep(0.06 if name == "slow" else 0.015)
        return [RECORD]

    agent = Agent(both, HERE, measure=measure)
    for _ in range(10):
        assert agent.step()
    assert 1 <= order.count("slow") <= 4  # a quarter as many, for the same time
    assert order[0] != order[1]


def test_all_jobs_are_measured_and_then_it_ends(tmp_path):
    both = tables(tmp_path, {"a": 3, "b": 1, "c": 0})
    agent = Agent(both, HERE, measure=lambda table, lease: [RECORD])
    assert agent.work(idle_s=0) == 4
    assert [done(t) for t in both.values()] == [3, 1, 0]


def test_a_failing_job_is_tried_again_and_harms_no_other(tmp_path):
    one = tables(tmp_path, {"a": 2})
    said = []

    def measure(table, lease):
        if lease.task["settings"]["rounds"] == 5:
            raise RuntimeError("out of memory")
        return [RECORD]

    agent = Agent(one, HERE, say=said.append, measure=measure)
    assert agent.work(idle_s=0) == 4  # three attempts of the first
    assert done(one["a"]) == 1
    assert any("RuntimeError: out of memory" in line for line in said)


def test_a_coordinator_that_is_away_does_not_stop_the_others(tmp_path):
    class Away:
        def lease(self, *args):
            raise ConnectionError("http://gone: refused")

    both = {"gone": Away(), **tables(tmp_path, {"here": 2})}
    said = []
    agent = Agent(both, HERE, say=said.append, measure=lambda table, lease: [RECORD])
    assert agent.work(idle_s=0) == 2
    assert "http://gone: refused; trying again later" in said


def test_a_long_measurement_keeps_its_lease(tmp_path):
    (table,) = tables(tmp_path, {"a": 1}).values()

    def measure(table, lease):
        sleep(1.5)
        assert table.lease("other", HERE, 1) is None
        return [RECORD]

    Agent({"a": table}, HERE, lease_s=0.9, measure=measure).step()
    assert done(table) == 1


def test_who_and_what_for_is_needed(tmp_path):
    with pytest.raises(UserError, match="a coordinator to work for"):
        Agent({}, HERE)
    with pytest.raises(UserError, match="no table of jobs"):
        table_at(str(tmp_path / "none"))
    assert "onnxruntime" in runtimes_here()


def test_a_device_without_torch_measures_by_the_command_line(tmp_path):
    table = JobTable(tmp_path / "jobs")
    a, b = network(tmp_path / "a.onnx", 32), network(tmp_path / "b.onnx", 8)
    id = table.add({"dense": a, "small": b}, rounds=5, layers=True)
    code = (
        "import sys; sys.modules['torch'] = None; "  # importing it fails
        "from gracile.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    argv = ["agent", str(table.folder), "--idle", "0", "--name", "edge", "--json"]
    found = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["jobs"] == 1
    records = table.wait(id, limit_s=0)
    assert {"latency_ms", "speedup", "unit_ms", "operators_ms", "artifact_bytes"} <= {
        r.metric for r in records
    }
    assert {r.subject["model"] for r in records} == {"dense", "small"}
    assert table.state(id).worker == "edge"
