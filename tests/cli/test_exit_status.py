"""Exit statuses: 0 ok, 1 goal missed, 2 user error, 3 proof failed, 4 missing extra, 70, 130."""

import dataclasses
import json
import subprocess
import sys

import pytest
from cli_case import compress

from gracile.errors import VerificationError
from gracile.export import parity


def test_0_with_a_goal_that_is_met(call):
    code, out, _ = call(*compress("small.yaml", "met"))
    assert code == 0
    assert "goal met: top-1 drop (points): wanted 100" in out


@pytest.mark.parametrize(
    ("goal", "runtime", "text"),
    [
        (
            "goal={size_mb: 0.0001}",
            (),
            "GOAL MISSED: size (MB): wanted 0.0001, got 0.00126 (off by 0.00116)",
        ),
        ("goal={speedup: 1000}", ("pytorch",), "GOAL MISSED: speed-up in pytorch: wanted 1e+03"),
        ("goal={latency_ms: 1e-6}", ("pytorch",), "GOAL MISSED: latency in pytorch (ms): wanted"),
        ("goal={speedup: 1.5}", (), "(no --runtime given to measure it): wanted 1.5, got not"),
    ],
    ids=lambda v: str(v),
)
def test_1_when_the_goal_is_missed_says_by_how_much(goal, runtime, text, call, as_json, tmp_path):
    more = [x for r in runtime for x in ("--runtime", r)]
    argv = compress("small.yaml", str(tmp_path / "run"), "--set", goal, *more)
    code, out, _ = call(*argv)
    assert code == 1
    line = next(line for line in out.splitlines() if "GOAL MISSED" in line)
    assert text in line
    assert ("off by" in line) is ("not measured" not in line)
    result = as_json(*argv, "--resume", code=1)
    assert result["status"] == "goal missed"
    assert result["goal"]["met"] is False
    assert (tmp_path / "run" / "report.html").exists()  # all was done, only not enough


def test_3_when_an_artifact_computes_something_else(call, as_json, monkeypatch, tmp_path):
    real = parity.check

    def wrong(*args, **options):
        report = real(*args, **options)
        return dataclasses.replace(report, ok=False, problems=("output 0 is off by 0.3",))

    monkeypatch.setattr(parity, "check", wrong)
    argv = compress("small.yaml", str(tmp_path / "run"), "--runtime", "pytorch")
    found = as_json(*argv, code=3)
    assert found["status"] == "ParityError"
    assert "output 0 is off by 0.3" in found["warnings"][0]["text"]


def test_a_run_whose_proof_failed_goes_on_when_the_cause_is_gone(
    as_json, monkeypatch, tmp_path, place
):
    argv = compress("small.yaml", str(tmp_path / "run"), "--runtime", "pytorch")
    with monkeypatch.context() as broken:
        broken.setattr(parity, "MIN_COSINE", {"f32": 2.0, "bf16": 2.0, "int8": 2.0})
        text = as_json(*argv, code=3)["warnings"][0]["text"]
        assert "the artifact does not compute what the PyTorch model computes" in text
    assert as_json(*argv, "--resume")["parity"]["pytorch"]["ok"] is True


def test_3_when_a_cut_would_change_the_model(as_json, monkeypatch, tmp_path):
    def refuse(*args, **options):
        raise VerificationError("masked and sliced model differ at 'relu'.")

    monkeypatch.setattr("gracile.graph.verify.prove", refuse)
    found = as_json(*compress("small.yaml", str(tmp_path / "run")), code=3)
    assert found["warnings"] == [
        {"code": "VerificationError", "text": "masked and sliced model differ at 'relu'."}
    ]


@pytest.mark.parametrize(
    ("package", "argv", "command"),
    [
        ("openvino", ("--runtime", "openvino"), "pip install 'gracile[openvino]'"),
        ("onnxruntime", ("--runtime", "onnxruntime"), "pip install 'gracile[onnx]'"),
        ("sklearn.datasets", (), "pip install 'gracile[digits]'"),
    ],
)
def test_4_when_an_extra_is_missing_before_anything_is_written(
    package, argv, command, call, as_json, monkeypatch, place
):
    from gracile.benchmark.runtimes import openvino

    openvino._core.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)  # importing it is an ImportError now
    code, out, err = call(*compress("both.yaml", "without", *argv))
    assert (code, out) == (4, "")
    assert err.splitlines()[-1].startswith("MissingExtra: ")
    assert command in err
    assert "Traceback" not in err
    assert not (place / "without").exists()
    found = as_json(*compress("both.yaml", "without", *argv), code=4)
    assert found["status"] == "MissingExtra"


HIDDEN = """
import sys
sys.modules["onnxruntime"] = None
from gracile.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_4_in_a_process_of_its_own(place):
    argv = compress("both.yaml", "without", "--runtime", "onnxruntime", "--json")
    done = subprocess.run([sys.executable, "-c", HIDDEN, *argv], capture_output=True, text=True)
    assert done.returncode == 4
    assert json.loads(done.stdout)["status"] == "MissingExtra"
    assert "pip install 'gracile[onnx]'" in done.stderr
    assert not (place / "without").exists()


def test_70_is_a_defect_with_its_traceback_and_still_one_json_object(as_json, monkeypatch, call):
    monkeypatch.setattr("gracile.train.run.run", lambda *a, **k: 1 / 0)
    found = as_json(*compress("small.yaml", "never"), code=70)
    assert found["status"] == "internal error"
    code, out, err = call(*compress("small.yaml", "never"))
    assert (code, out) == (70, "")
    assert "ZeroDivisionError" in err
    assert "this is a defect of gracile" in err


def test_130_when_interrupted_and_the_run_goes_on(as_json, call, monkeypatch, tmp_path):
    argv = compress("small.yaml", str(tmp_path / "run"))

    def interrupt(model):
        raise KeyboardInterrupt

    with monkeypatch.context() as busy:
        busy.setattr("gracile.train.loop.average_gradients", interrupt)
        code, out, err = call(*argv)
        assert (code, out) == (130, "")
        assert err.splitlines()[-1] == (
            "interrupted; a run goes on with the same command and --resume"
        )
        assert "Traceback" not in err
        assert as_json(*argv, "--resume", code=130)["status"] == "interrupted"
    assert as_json(*argv, "--resume")["status"] == "ok"


def test_the_script_exits_with_the_status(monkeypatch, place):
    from gracile.cli.main import run

    with pytest.raises(SystemExit) as exit:
        run(["list", "nothing"])
    assert exit.value.code == 2
