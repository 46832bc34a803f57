"""Ranges in files: saved and reused, Distiller's statistics, and what is refused."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from quant_session import PROFILE, FakeSession, batch, net

from gracile.errors import UserError
from gracile.quantize import engine
from gracile.quantize.methods.ptq import Ptq, PtqOptions
from gracile.quantize.observers.aciq import clip_factor
from gracile.quantize.ranges import Range, load_ranges, save_ranges


@pytest.fixture(autouse=True)
def _profile(monkeypatch):
    monkeypatch.setattr(engine, "load_profile", lambda name: PROFILE)
    monkeypatch.setattr(engine, "sums_saturate", lambda: False)


def fired(folder, *, model=None, calibration=None, **options):
    session = FakeSession(model or net(), calibration=calibration)
    session.recipe = SimpleNamespace(path=str(folder / "recipe.yaml"))
    method = Ptq("int8", PtqOptions(**options))
    method.on_attach(session)
    method.on_fire(session, 1.0)
    return session, method


@pytest.fixture
def saved(tmp_path):
    """A calibrated method, and its ranges in a file."""
    session, method = fired(tmp_path, observer="mse")
    save_ranges(tmp_path / "r.json", method.ranges())
    return session, method


def test_ranges_name_what_was_observed_and_by_what(saved):
    session, method = saved
    ranges = method.ranges()
    assert list(ranges) == ["x", "relu", "bn2", "relu_1", "mean"]  # not what only moves values
    assert {r.observer for r in ranges.values()} == {"mse"}
    assert ranges["relu"].low == 0 < ranges["relu"].high
    x = torch.cat(session.batches)
    assert x.min() <= ranges["x"].low < ranges["x"].high <= x.max()


def test_a_file_of_ranges_gives_the_same_network_without_calibration(saved, tmp_path):
    assert "calibration" not in Ptq("w", PtqOptions(ranges="r.json")).needs
    session, _ = fired(tmp_path, calibration=[], ranges="r.json", observer="mse")
    with torch.no_grad():
        assert torch.equal(session.model(batch(5)), saved[0].model(batch(5)))


def test_ranges_survive_a_stop(saved, tmp_path):
    session = FakeSession(net())
    again = Ptq("int8", PtqOptions(observer="mse"))
    again.on_attach(session)
    again.load_state_dict(copy.deepcopy(saved[1].state_dict()))
    assert again.ranges() == saved[1].ranges()


def test_in_a_run_directory_the_runs_own_ranges_count(saved, tmp_path):
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    (run / "state" / "run.json").write_text("{}")
    (tmp_path / "r.json").rename(run / "ranges.json")
    session, _ = fired(run, calibration=[], ranges="elsewhere/r.json", observer="mse")
    with torch.no_grad():
        assert torch.equal(session.model(batch(5)), saved[0].model(batch(5)))


def test_after_a_cut_the_file_may_have_more(saved, tmp_path):
    data = json.loads((tmp_path / "r.json").read_text())
    data["ranges"]["gone"] = {"low": 0, "high": 1}
    (tmp_path / "r.json").write_text(json.dumps(data))
    wanted = []
    kernel = PtqOptions().observer
    assert load_ranges(tmp_path / "r.json", wanted, kernel, cut=True) == {}
    with pytest.raises(UserError, match="is no quantized activation of this model"):
        load_ranges(tmp_path / "r.json", wanted, kernel)


# --- Distiller's statistics


def stats(**changes):
    plain = {
        "min": -3.0, "max": 5.0, "avg_min": -2.0, "avg_max": 4.0, "mean": 0.5, "std": 1.0, "b": 0.8,
        "shape": "(8, 6, 8, 8)", "total_numel": 99,
    } | changes  # fmt: skip
    return json.dumps(plain)  # YAML as well


@pytest.fixture
def statistics(tmp_path):
    relu = stats(min=0.0, avg_min=0.0)
    (tmp_path / "stats.yaml").write_text(
        f"module.conv1: {{inputs: {{0: {stats()}}}, output: {stats()}}}\n"
        f"relu: {{output: {relu}}}\nbn2: {{output: {stats()}}}\nrelu_1: {{output: {relu}}}\n"
        f"mean: {{output: {stats(min=1e-5, max='2e0')}}}\nunused: {{output: {stats()}}}\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("observer", "ends"),
    [
        ("min_max", (-3, 5)),
        ("mean_extremes", (-2, 4)),
        ({"name": "three_sigma", "n": 2.0, "spread": "std"}, (-1.5, 2.5)),
        ({"name": "aciq", "distribution": "gauss"}, (-3, 0.5 + clip_factor(8, "gauss"))),
        ({"name": "aciq", "distribution": "laplace"}, (-3, 5)),  # 0.5 + 9.9 * 0.8: not beyond
    ],
)
def test_statistics_of_distiller_are_ranges(statistics, observer, ends):
    _, method = fired(statistics, calibration=[], ranges="stats.yaml", observer=observer)
    found = method.ranges()
    for id in ("x", "bn2"):
        assert (found[id].low, found[id].high) == pytest.approx(ends)
    assert found["relu"].low == 0
    if observer == "min_max":
        assert found["mean"] == Range(0, 2, "min_max")  # average of what is not negative


def test_an_observer_that_statistics_know_nothing_of_is_refused(statistics):
    for observer in ("percentile", "three_sigma"):
        with pytest.raises(
            UserError, match=rf"nothing for the observer '{observer}'; take min_max"
        ):
            fired(statistics, ranges="stats.yaml", observer=observer)


# --- refusals, all before anything is fired


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("bn2"), "lacks the range of 'bn2'.*Leave 'ranges' out"),
        (lambda r: r.update(bn3=r.pop("bn2")), "a range of 'bn3', which is no .*Nearest: 'bn2'"),
        (lambda r: r["bn2"].update(low=9.0), "'bn2' must have low <= high"),
        (lambda r: r["bn2"].update(high="wide"), "'bn2' must have a finite number 'high'"),
        (lambda r: r["bn2"].update(high=float("inf")), "'bn2' must have a finite number 'high'"),
        (lambda r: r["bn2"].update(low=True), "'bn2' must have a finite number 'low'"),
        (lambda r: r.update(bn2=3), "'bn2' must have a finite number 'low'"),
    ],
)
def test_wrong_ranges_are_refused(saved, tmp_path, change, message):
    data = json.loads((tmp_path / "r.json").read_text())
    change(data["ranges"])
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        fired(tmp_path, ranges="r.json")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.json", "{", "cannot be read"),
        ("r.json", "[1]", "must hold a mapping, got list"),
        ("r.json", '{"format": 2, "ranges": {}}', "needs format: 1 and ranges"),
        ("r.json", '{"a": 1}', "needs format: 1 and ranges"),
        ("r.yaml", "a: !!python/object:os.system {}", "cannot be read"),
        ("r.yaml", "conv1: {output: {min: 0}}", r"lacks the range of 'relu' \(and of 3 more\)"),
    ],
)
def test_other_files_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        fired(tmp_path, ranges=name, observer="min_max")


def test_a_file_that_is_not_there_is_looked_for_beside_the_recipe(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: no such file; .* beside the recipe"):
        fired(tmp_path, ranges="none.json")
    with pytest.raises(ValueError, match="ranges are of activations"):
        PtqOptions(ranges="r.json", activations=False)
