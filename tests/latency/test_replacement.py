"""A layer against what would stand in its place: common units cancel, unknown ones are refused."""

import copy

import pytest
import torch
from torch import nn

from gracile.errors import UserError
from gracile.latency import measuring
from gracile.latency.difference import Point
from gracile.latency.replacement import program, replacement_ms, times_of
from gracile.latency.table import Table
from gracile.latency.unit import Setting

RUNTIMES = ("openvino", "onnxruntime")
X = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(0))


def wide():
    torch.manual_seed(0)
    return nn.Conv2d(16, 32, 3, padding=1)


def separable():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 32, 1))


class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(2)
        self.stem, self.head = nn.Conv2d(16, 16, 1), nn.Linear(32, 5)
        self.middle = middle

    def forward(self, x):
        return self.head(torch.relu(self.middle(torch.relu(self.stem(x)))).mean((2, 3)))


def priced(modules, runtime, ms=lambda unit: 0.001 * max(1, unit.weights)):
    """Times of this machine's setting, with a price made up for each unit of these."""
    here, units = program(modules[0], X, Setting(runtime, "", ""))
    for module in modules[1:]:
        units |= program(module, X, here)[1]
    times = Table().at(here)
    times.points |= {u: Point(ms(u), 0.0, 14, 1.0) for u in units}
    return times


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_one_layer_against_two_by_the_prices_of_their_units(runtime):
    times = priced([wide(), separable()], runtime)
    before, after = replacement_ms(wide(), separable(), X, times)
    assert before.how == after.how == "measured"
    assert before.ms > 16 * 32 * 9 * 0.001 * 0.99
    assert before.ms > after.ms > 0


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_two_networks_have_in_common_cancels(runtime):
    times = priced([Net(wide()), Net(separable())], runtime)
    before, after = replacement_ms(Net(wide()), Net(separable()), X, times)
    same, again = replacement_ms(Net(wide()), Net(wide()), X, times)
    assert (same.ms, again.ms) == (0.0, 0.0)
    common = (
        program(Net(wide()), X, times.setting)[1] & program(Net(separable()), X, times.setting)[1]
    )
    assert common
    for unit in common:  # nothing is asked of these
        del times.points[unit]
    assert replacement_ms(Net(wide()), Net(separable()), X, times) == (before, after)


def test_what_the_table_does_not_know_is_refused_by_name():
    times = priced([wide()], "openvino")
    with pytest.raises(UserError, match=r"knows nothing of .*depthwise.*`measure: true`"):
        replacement_ms(wide(), separable(), X, times)


def test_what_is_missing_is_measured_once(monkeypatch):
    asked = []

    def fake(units, build, **_):
        asked.append(list(units))
        return {u: Point(0.5, 0.0, 14, 1.0) for u in units}

    monkeypatch.setattr(measuring, "in_batches", fake)
    monkeypatch.setattr(measuring, "_sweep_missing", lambda times, units, told: 0)
    times = priced([wide()], "openvino")
    first = replacement_ms(wide(), separable(), X, times, measuring=True)
    assert asked[0]
    assert first == replacement_ms(wide(), separable(), X, times, measuring=True)
    assert asked[1:] == [[]]


def test_nothing_is_measured_into_times_of_another_device():
    times = priced([wide()], "openvino")
    elsewhere = Table().at(Setting("openvino", times.setting.version, "another processor"))
    with pytest.raises(UserError, match=r"device another processor, not .*cannot be measured here"):
        replacement_ms(wide(), separable(), X, elsewhere, measuring=True)


def test_modules_are_left_as_they_are():
    module = wide().train()
    state = copy.deepcopy(module.state_dict())
    program(module, X[:1], Setting("onnxruntime", "", ""))
    assert module.training
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_the_setting_that_is_meant_is_found_or_asked_for():
    table = Table()
    one = table.at(Setting("openvino", "1", "a", threads=1))
    assert times_of(table) is one
    two = table.at(Setting("openvino", "1", "a", threads=2))
    assert times_of(table, threads=2) is two
    with pytest.raises(UserError, match=r"several .*\(runtime openvino\); it has openvino on a"):
        times_of(table, "openvino")
    with pytest.raises(UserError, match=r"has none .*Name the runtime"):
        times_of(table, "onnxruntime")
    with pytest.raises(UserError, match="it has nothing"):
        times_of(Table())
