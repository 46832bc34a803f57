"""Every command, run for real on a network of a thousand parameters."""

import json
import re

import pytest
import torch
from cli_case import HEAD, compress
from safetensors.torch import load_file, save_file
from typer.main import get_command

from gracile import registry
from gracile.cli.main import app, main
from gracile.core.record import RecordLog

# ------------------------------------------------------------------ help


def commands(group=None, name=()):
    group = group or get_command(app)
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*name, key))
        else:
            yield (*name, key), command


COMMANDS = dict(commands())


def test_the_commands_are_these():
    assert {" ".join(name) for name in COMMANDS} == {
        "activations", "agent", "benchmark", "bisect", "compare", "compress", "demo", "export",
        "groups", "inspect", "latency measure", "latency predict", "latency show", "list",
        "preflight", "report", "sensitivity", "summary", "undo", "recipe check", "recipe convert",
        "recipe explain", "recipe simulate",
    }  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_help_explains_every_argument_and_option(name, call):
    command = COMMANDS[name]
    assert command.help
    code, out, _ = call(*name, "--help")
    assert code == 0
    text = " ".join(out.split())
    for parameter in command.params:
        assert parameter.help, f"{name}: {parameter.name} has no help"
        assert " ".join(parameter.help.split()) in text, f"{name}: {parameter.name}"
        if parameter.param_type_name == "option":
            assert parameter.opts[-1] in text


def test_the_overview_names_every_command(call):
    code, out, _ = call("--help")
    assert code == 0
    assert all(name[0] in out for name in COMMANDS)


# ------------------------------------------------------------------ what there is


def test_list_shows_everything_registered(as_json, call):
    entries = as_json("list")["entries"]
    assert {(e["kind"], e["name"]) for e in entries} == {
        (e.kind, e.name) for kind in registry.HOMES for e in registry.entries(kind)
    }
    assert all(e["source"] and e["summary"] for e in entries)
    code, out, _ = call("list", "runtime")
    assert code == 0
    assert [r for r in ("onnxruntime", "openvino", "pytorch", "prune/thin") if r in out] == [
        "onnxruntime", "openvino", "pytorch",
    ]  # fmt: skip


def test_an_unknown_kind_names_the_nearest(call):
    code, _, err = call("list", "modle")
    assert code == 2
    assert "unknown kind 'modle'. Nearest: 'model'" in err


def test_summary_counts_by_hand(as_json, call):
    found = as_json("summary", "net.py:Net?num_classes=5")
    weights = 8 * 3 * 9 + 2 * 8 + 8 * 8 * 9 + 8 + 8 * 5 + 5
    assert found["params"] == weights
    assert found["bytes"] == 4 * (weights + 2 * 8) + 8  # running mean and variance, and a count
    assert found["macs"] == 64 * (8 * 27 + 8 * 72) + 8 * 5  # 8x8 outputs; one multiply-add is 1
    assert found["captured_by"] == "fx"
    code, out, _ = call("summary", "net.py:Net?num_classes=5")
    assert code == 0
    assert "8x8x8" in out
    assert "861 parameters" in out


def test_summary_takes_weights_and_other_shapes(as_json, call, place):
    from gracile.models.spec import resolve

    save_file(resolve("net.py:Net?num_classes=5").model.state_dict(), place / "w.safetensors")
    more = ("--weights", "w.safetensors", "--shape", "3,64,64")
    assert as_json("summary", "net.py:Net?num_classes=5", *more)["macs"] == 4 * 50688 + 40
    for shape in ("3,x", "3,0,3", ""):
        code, _, err = call("summary", "net.py:Net?num_classes=5", "--shape", shape)
        assert code == 2
        assert f"--shape must be like 3,32,32, got '{shape}'" in err


# ------------------------------------------------------------------ recipes


def test_recipe_check_with_and_without_a_model(call):
    assert call("recipe", "check", "both.yaml")[:2] == (0, "both.yaml: ok, 3 method(s)\n")
    code, out, _ = call("recipe", "check", "both.yaml", "--model", "net.py:Net")
    assert (code, out) == (0, "both.yaml: ok, 3 method(s), binds to net.py:Net\n")


def test_recipe_check_refuses_with_the_line_and_sees_overrides(call, place):
    (place / "bad.yaml").write_text("recipe: 1\nmethods:\n  m: {prune: gradual, sparsity: 1.5}\n")
    code, out, err = call("recipe", "check", "bad.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("RecipeError: bad.yaml:3: ")
    code, _, err = call("recipe", "check", "both.yaml", "--set", "prune.filters.sparsity=1.5")
    assert code == 2
    assert err.startswith("RecipeError: --set prune.filters.sparsity=1.5: ")


def test_recipe_explain_prints_every_firing_and_the_tensors_meant(call):
    code, out, _ = call("recipe", "explain", "both.yaml")
    assert code == 0
    for part in ("epoch 0, batch 0", "epoch 1, batch 0", "end", "sparsity 0.5000"):
        assert part in out
    code, out, _ = call("recipe", "explain", "both.yaml", "--model", "net.py:Net")
    assert code == 0
    assert "filters: 2 tensors: stem.weight, inner.weight" in out


def test_recipe_explain_counts_steps(call, place):
    (place / "it.yaml").write_text(
        "recipe: 1\ntrain: {epochs: 2}\nmethods:\n"
        "  m: {prune: oneshot, weights: stem, sparsity: 0.5, when: {at: 150it}}\n"
    )
    assert "epoch 1, batch 50" in call("recipe", "explain", "it.yaml", "--steps", "100")[1]
    code, _, err = call("recipe", "explain", "it.yaml", "--steps", "50")
    assert code == 2
    assert err.startswith("BindError: it.yaml:4: 'm': when {at: 150it} never fires")


# ------------------------------------------------------------------ compress and what follows

COLUMN = {"accuracy", "macs", "params", "bytes", "latency"}


def test_compress_json_has_the_promised_keys(finished):
    result = json.loads((finished / "result.json").read_text())
    promised = {
        "format", "status", "exit", "out", "goal", "before", "after", "speedup", "parity",
        "ledger", "warnings", "records",
    }  # fmt: skip
    assert promised <= result.keys()
    assert result["goal"]["met"] is True
    for column in ("before", "after"):
        assert result[column].keys() >= COLUMN
        assert result[column]["latency"].keys() == {"onnxruntime"}
    assert result["speedup"]["onnxruntime"].keys() == {"ratio", "ci95"}
    assert result["parity"]["onnxruntime"].keys() >= {"max_lsb", "cosine", "agreement", "first_bad"}
    assert result["parity"]["onnxruntime"]["first_bad"] is None
    for by in result["ledger"]["shares"].values():
        assert all(sum(axis.values()) == pytest.approx(1) for axis in by.values())
    assert all(w.keys() == {"code", "text"} for w in result["warnings"])
    assert len(RecordLog(result["records"])) > 20


def test_compress_keeps_what_the_design_says(finished):
    names = {p.name for p in finished.iterdir()}
    assert names == {
        "recipe.yaml", "plan.json", "model.safetensors", "model.json", "export", "ledger.json",
        "ranges.json", "records.jsonl", "report.html", "history.json", "result.json", "state",
    }  # fmt: skip
    assert load_file(finished / "model.safetensors")["stem.weight"].shape[0] == 4


def test_a_run_that_leaves_masks_counts_what_is_not_zero_and_packs_it(place, as_json, call):
    (place / "zeros.yaml").write_text(
        HEAD + "  z: {prune: oneshot, weights: inner.weight, sparsity: 0.75, when: {at: 0ep}}\n"
    )
    found = as_json(*compress("zeros.yaml", "zeros"))
    stored = load_file(place / "zeros" / "model.safetensors")["inner.weight"]
    assert int(stored.count_nonzero()) == stored.numel() // 4
    assert found["after"]["params"] - found["after"]["nonzeros"] == 3 * stored.numel() // 4
    assert found["after"]["packed_bytes"] == (place / "zeros" / "packed.safetensors").stat().st_size
    assert "Parameters that are not 0" in call("report", "zeros")[1] + (
        (place / "zeros" / "report.html").read_text()
    )
    (place / "zeros" / "model.safetensors").unlink()  # what was packed is enough
    assert as_json("inspect", "zeros")["exit"] == 0


def test_compress_prints_json_only_on_stdout_and_logs_only_on_stderr(call):
    code, out, err = call(*compress("small.yaml", "quiet", "--json"))
    assert code == 0
    assert json.loads(out)["out"] == "quiet"
    assert [line for line in err.splitlines() if line.startswith("·")][:2] == [
        "· dense",
        "· finish",
    ]


def test_compress_prints_the_table_the_goal_and_the_page(call):
    code, out, _ = call(*compress("small.yaml", "shown", "--set", "goal.size_mb=1"))
    assert code == 0
    for part in ("Top-1 accuracy", "Parameters", "goal met: size (MB)", "shown/report.html"):
        assert part in out


def test_report_writes_the_page_again_and_prints_its_tables(finished, call, as_json):
    page = (finished / "report.html").read_bytes()
    (finished / "report.html").unlink()
    code, out, _ = call("report", "run")
    assert code == 0
    assert "Top-1 accuracy" in out
    assert (finished / "report.html").read_bytes() == page  # the same files, the same page
    code, out, _ = call("report", "run", "--markdown")
    assert code == 0
    assert re.search(r"^\| Top-1 accuracy", out, re.MULTILINE)
    assert as_json("report", "run")["parity"]["onnxruntime"]["first_bad"] is None


def test_report_of_no_run_says_so(call, place):
    code, _, err = call("report", "nowhere")
    assert code == 2
    assert "nowhere/result.json: no such finished run" in err


def test_export_of_a_run_equals_its_own_artifact(finished, as_json, place):
    found = as_json("export", "run", "--runtime", "onnxruntime", "--out", "again")
    assert found["artifact"]["precision"] == "int8"
    assert found["parity"]["ok"] is True
    one = finished / "export" / "onnxruntime" / "compressed" / "model.onnx"
    assert (place / "again" / "model.onnx").read_bytes() == one.read_bytes()


def test_export_of_a_plain_model_and_timing_of_both(finished, as_json, call, place):
    found = as_json("export", "net.py:Net", "--runtime", "onnxruntime", "--out", "plain.onnx")
    assert found["artifact"]["path"] == "plain.onnx"
    assert found["artifact"]["precision"] == "f32"
    small = "run/export/onnxruntime/compressed/model.onnx"
    more = ("--rounds", "5", "--records", "times.jsonl")
    records = as_json("benchmark", "plain.onnx", small, *more)["records"]
    assert [r["metric"] for r in records].count("latency_ms") == 2
    assert [r["subject"]["model"] for r in records if r["metric"] == "speedup"] == ["model.onnx"]
    assert len(RecordLog(place / "times.jsonl")) == len(records)
    code, out, _ = call("benchmark", "run", "--rounds", "5", "--runtime", "onnxruntime")
    assert code == 0
    assert re.search(r"onnxruntime +compressed .*\dx", out)
    assert "1 thread(s), batch 1, precision hint f32 for every side" in out


def test_layers_throughput_memory_and_a_reference_are_records_of_their_own(as_json, call, finished):
    files = [f"run/export/onnxruntime/{which}/model.onnx" for which in ("dense", "compressed")]
    more = ("--rounds", "5", "--layers", "--streams", "2", "--memory", "--reference", files[0])
    records = as_json("benchmark", *files, *more)["records"]
    found = {r["metric"] for r in records}
    assert found >= {
        "latency_ms", "speedup", "relative_latency", "operators_ms", "unit_ms", "unit_speedup",
        "throughput", "throughput_ratio", "artifact_bytes", "peak_memory", "added_memory",
    }  # fmt: skip
    units = {r["subject"]["unit"] for r in records if r["metric"] == "unit_ms"}
    assert "head" in units
    assert len({r["id"] for r in records}) == len(records)
    assert {r["runtime"] for r in records} == {"onnxruntime"}
    code, out, err = call("benchmark", *files, "--rounds", "5", "--layers", "--runtime", "openvino")
    assert code == 0, err
    assert "in openvino, by its own counters" in " ".join(out.split())
    assert "End to end, one stream" in out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("export", "run", "--runtime", "tensorrt", "--out", "x"), "unknown"),
        (("export", "half", "--runtime", "pytorch", "--out", "x"), "half: not a finished run"),
        (
            ("export", "run", "--runtime", "pytorch", "--out", "x", "--weights", "w.safetensors"),
            "--weights: the run in run has its own",
        ),
        (("benchmark", "half"), "no exported artifacts in it"),
        (("benchmark", "run", "--runtime", "openvino"), "no artifact for 'openvino' there"),
        (("benchmark", "nothing.onnx"), "nothing.onnx: no such file"),
        (("benchmark", "net.py"), "an artifact ends in"),
        (("benchmark", "run", "--rounds", "4"), "--rounds"),
        (("compress",), "MODEL"),
        (("compress", "net.py:Net", "--recipe", "small.yaml"), "--out"),
        (("compress", "net.py:Net", "--out", "x", "--recipe", "small.yaml", "--speed"), "--speed"),
        (("compres",), "No such command 'compres'"),
    ],
    ids=" ".join,
)
def test_user_errors_are_one_message_and_status_2(argv, text, finished, call, as_json, place):
    (place / "half").mkdir(exist_ok=True)
    code, out, err = call(*argv)
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err
    assert not (place / "x").exists()
    assert text in as_json(*argv, code=2)["warnings"][0]["text"]


def test_an_out_that_is_a_file_is_refused(call, place):
    (place / "file").write_text("mine")
    code, _, err = call(*compress("small.yaml", "file"))
    assert code == 2
    assert "--out file is a file; name a directory" in err
    assert (place / "file").read_text() == "mine"


# ------------------------------------------------------------------ compare

COMPARE = ("compare", "net.py:Net", "--recipes", "small.yaml", "--recipes", "int8.yaml")


def test_compare_runs_every_recipe_with_every_seed(as_json, call, place):
    more = ("--out", "versus", "--seeds", "2", "--runtime", "pytorch")
    rows = as_json(*COMPARE, *more)["rows"]
    assert [(r["recipe"], r["seed"]) for r in rows] == [
        ("small", 0), ("small", 1), ("int8", 0), ("int8", 1),
    ]  # fmt: skip
    assert all(r["speedup"]["pytorch"] > 0 for r in rows)
    small, int8 = rows[0], rows[2]
    assert small["macs"] < int8["macs"]  # thinned, and not
    weights = [load_file(place / f"versus/small-seed{s}/model.safetensors") for s in (0, 1)]
    assert not torch.equal(weights[0]["head.weight"], weights[1]["head.weight"])
    assert (place / "versus" / "compare.html").exists()
    code, out, err = call(*COMPARE, *more)
    assert (code, out) == (2, "")
    assert "versus/small-seed0 already holds a run; continue it with --resume" in err
    code, out, _ = call(*COMPARE, *more, "--resume")
    assert code == 0
    assert re.search(r"^\| .*small .*\| 2 \|", out, re.MULTILINE)


def test_compare_finds_faults_of_the_last_recipe_before_the_first_runs(call, place):
    (place / "bad.yaml").write_text(
        (place / "small.yaml").read_text().replace("type:Conv2d", "type:Conv9d")
    )
    code, _, err = call(*COMPARE, "--recipes", "bad.yaml", "--out", "never")
    assert code == 2
    assert "BindError: bad.yaml:6: 'filters': 'type:Conv9d' matches no tensor" in err
    assert not (place / "never").exists()


def test_compare_wants_equal_budgets_and_names(call, place):
    (place / "long.yaml").write_text(
        (place / "small.yaml").read_text().replace("epochs: 2", "epochs: 3")
    )
    code, _, err = call(*COMPARE, "--recipes", "long.yaml", "--out", "never")
    assert code == 2
    assert "long.yaml: trains 3 epochs of batch 32, small.yaml 2 of 32" in err
    (place / "other").mkdir(exist_ok=True)
    (place / "other" / "small.yaml").write_text((place / "small.yaml").read_text())
    code, _, err = call(*COMPARE, "--recipes", "other/small.yaml", "--out", "never")
    assert code == 2
    assert "two files have one name" in err


def test_demo_and_compress_share_one_entry_point():
    assert main(["demo", "--help"]) == 0


def test_a_run_leaves_its_ranges_and_another_takes_them(finished, as_json, call, place):
    there = json.loads((finished / "ranges.json").read_text())["ranges"]
    assert {r["observer"] for r in there.values()} == {"percentile"}
    text = (place / "both.yaml").read_text()
    given = text.replace("quantize: ptq", "quantize: ptq, ranges: run/ranges.json")
    (place / "given.yaml").write_text(given)
    as_json(*compress("given.yaml", "given"))
    seen, taken = (load_file(place / f / "model.safetensors") for f in ("run", "given"))
    assert seen.keys() == taken.keys()
    assert all(torch.equal(seen[k], taken[k]) for k in seen)
    as_json("export", "given", "--runtime", "onnxruntime", "--out", "from-given")


def test_ranges_that_are_not_there_are_refused_before_anything_is_written(call, place):
    text = (place / "int8.yaml").read_text().replace("ptq", "ptq, ranges: no.json")
    (place / "wrong.yaml").write_text(text)
    code, _, err = call(*compress("wrong.yaml", "wrong"))
    assert code == 2
    assert "wrong.yaml:6: 'int8': ranges: no.json: no such file" in err
    assert not (place / "wrong").exists()
