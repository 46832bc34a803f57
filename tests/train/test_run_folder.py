"""The run directory: begun once, gone on with only as it was begun, by one process at a time."""

import json
import os
import subprocess
import sys

import pytest
import torch
import train_case as case

from gracile.errors import ResumeError, UserError
from gracile.train.folder import check_folder, opened, read_begun

RECIPE = case.recipe(case.FILTERS)
IDENTITY = {"model": "net", "recipe_sha": RECIPE.sha, "threads": 1, "runtimes": ["openvino"]}


@pytest.fixture
def run(tmp_path):
    """A run that was begun and cut off."""
    out = tmp_path / "run"
    with opened(out, IDENTITY, RECIPE):
        pass
    return out


def again(out, *, resume=True, recipe=RECIPE, **changes):
    check_folder(out, {**IDENTITY, **changes}, recipe, resume=resume)
    with opened(out, {**IDENTITY, **changes}, recipe):
        pass


def test_the_recipe_and_what_was_asked_for_are_kept(run):
    assert (run / "recipe.yaml").read_text() == RECIPE.to_yaml()
    assert read_begun(run)["identity"] == IDENTITY
    again(run)


def test_a_second_run_needs_resume(run):
    with pytest.raises(UserError, match="already holds a run; continue it with --resume"):
        again(run, resume=False)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"threads": 2}, "is a run with threads 1, not 2"),
        ({"model": "other"}, "is a run with model 'net', not 'other'"),
        ({"runtimes": []}, r"is a run with runtimes \['openvino'\], not \[\]"),
        ({"hint": "bf16"}, "is a run with hint None, not 'bf16'"),  # begun by an older version
    ],
)
def test_other_arguments_are_refused_by_name(run, changes, text):
    with pytest.raises(ResumeError, match=text):
        again(run, **changes)


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (case.recipe(case.FILTERS, train="{epochs: 4}"), "train.epochs is 3 there and 4 here"),
        (case.recipe(case.FILTERS, case.THIN), "methods.thin.prune is not set there and thin here"),
        (case.recipe(), "methods.filters.prune is gradual there and not set here"),
        (case.recipe(case.FILTERS, seed=1), "seed is 0 there and 1 here"),
    ],
)
def test_another_recipe_is_refused_with_the_first_difference(run, recipe, text):
    with pytest.raises(ResumeError, match=rf"another recipe: {text}.*recipe\.yaml"):
        again(run, recipe=recipe, recipe_sha=recipe.sha)


def test_the_same_methods_in_another_order_are_another_recipe(tmp_path):
    one, other = case.recipe(case.FILTERS, case.KD), case.recipe(case.KD, case.FILTERS)
    again(tmp_path / "run", recipe=one, recipe_sha=one.sha)
    with pytest.raises(ResumeError, match="its methods are in another order"):
        again(tmp_path / "run", recipe=other, recipe_sha=other.sha)


@pytest.mark.parametrize("key", ["torch", "cpu", "machine"])
def test_another_machine_is_refused(run, key):
    facts = json.loads((run / "state" / "run.json").read_text())
    facts["environment"][key] = "another"
    (run / "state" / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ResumeError, match=f"begun with {key} another, here is"):
        again(run)


def test_the_threads_of_training_are_those_of_the_beginning(run):
    facts = json.loads((run / "state" / "run.json").read_text())
    facts["environment"]["threads"] = 2
    (run / "state" / "run.json").write_text(json.dumps(facts))
    try:
        again(run)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, resume):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty and holds no run \(it has 'letter.txt'\)"):
        again(tmp_path, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_a_file_or_an_impossible_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; name a directory"):
        again(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be made: Not a directory"):
        again(tmp_path / "file" / "run")


def test_an_empty_or_absent_folder_is_begun_with_or_without_resume(tmp_path):
    (tmp_path / "empty").mkdir()
    again(tmp_path / "empty", resume=False)
    again(tmp_path / "absent", resume=True)


def test_a_run_killed_before_it_was_written_down_is_begun_again(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / ".run.json.77.tmp").write_text("{")
    again(tmp_path)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["lock", "run.json"]


def test_half_written_files_of_a_killed_process_are_removed_and_only_those(run):
    half = (".plan.json.123.tmp", "export/openvino/dense/.model.xml.9.tmp", "state/.a.b.7.tmp")
    kept = (".hidden", "export/notes.tmp", "state/.keep.tmp")
    folder = run / "export" / "openvino" / "dense" / ".model.123.abc_9"
    folder.mkdir(parents=True)
    for name in (*half, *kept):
        (run / name).write_text("")
    (folder / "model.onnx").write_text("")
    again(run)
    assert not folder.exists()
    assert [n for n in half if (run / n).exists()] == []
    assert [n for n in kept if not (run / n).exists()] == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"identity": {}}', '{"identity": 1, "environment": {}}']
)
def test_a_damaged_run_is_one_clear_error(run, text):
    (run / "state" / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json: damaged; the run cannot go on"):
        again(run)


def test_a_folder_without_a_run_says_so(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_begun(tmp_path)


HOLD = """
import fcntl, sys
f = open(sys.argv[1], "w")
fcntl.flock(f, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_cannot_write_to_one_run(run):
    lock = str(run / "state" / "lock")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, lock],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is writing to"):
            again(run)
    finally:
        other.kill()  # the lock ends with its process
        other.communicate()
    again(run)
