"""Units are those of the runtime's own program, and can be built again alone, at other widths."""

import pytest
import torch
from torch import nn

from gracile import Plan, Recipe, Result, Session, registry
from gracile.benchmark.runtimes.base import load
from gracile.core.plan import Architecture
from gracile.errors import UserError
from gracile.latency.difference import Pair, differences, in_batches
from gracile.latency.lowering import builder, isolated, units_of
from gracile.latency.measuring import measure, measure_network
from gracile.latency.predict import Predictor
from gracile.latency.table import Table
from gracile.latency.unit import Setting, Unit

RUNTIMES = ("openvino", "onnxruntime")


class Block(nn.Module):
    """Stem, depthwise, a residual addition, pooling, head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.narrow = nn.Conv2d(16, 8, 1)
        self.inner = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.depth(x))
        x = torch.relu(x + self.inner(torch.relu(self.narrow(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module", params=[(r, p) for r in RUNTIMES for p in ("f32", "int8")], ids=str)
def loaded(request, tmp_path_factory):
    runtime, precision = request.param
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(4, 3, 16, 16)
    result = Result(model, Plan(architecture=Architecture(name="block")))
    if precision == "int8":
        recipe = Recipe.build(methods={"q": {"quantize": "ptq", "when": {"at": "end"}}})
        result = Session(model, recipe, example=x[:2], calibration=[x], profile=runtime).finish()
    write = registry.get("exporter", runtime).obj
    path = tmp_path_factory.mktemp("artifact") / "m"
    return load(write(result.model, result.plan, result.tensors, x[:2], path, {}))


def precision_of(loaded):
    return "int8" if loaded.artifact.precision != "f32" else "f32"


def test_every_layer_is_a_unit_with_its_widths_and_precision(loaded):
    units = [u for _, u in units_of(loaded)]
    widths = [u.widths for u in units]
    assert widths.count((8, 16)) == 1  # inner
    assert (3, 16) in widths  # stem
    assert (16, 5) in widths  # head
    (depthwise,) = [u for u in units if "depthwise" in u.kind]
    assert depthwise.widths == (16,)
    layers = [u for u in units if u.widths in ((3, 16), (8, 16)) or u is depthwise]
    assert {u.precision for u in layers} == {precision_of(loaded)}


def test_an_addition_is_in_its_convolution_where_the_runtime_fuses_it(loaded):
    units = {u.widths: u for _, u in units_of(loaded)}
    if loaded.name == "openvino" and precision_of(loaded) == "f32":
        assert units[8, 16].detail["add"] == ["f32"]
        assert units[8, 16].detail["act"] == "relu"
        assert units[3, 16].detail["add"] == []


def test_every_unit_runs_alone_and_at_other_widths(loaded):
    setting = Setting.of(loaded)
    build = builder(setting)
    for _, unit in units_of(loaded):
        for u in (unit, unit.at(tuple(24 for _ in unit.widths))):
            pair = build(u)
            pair.whole()
            pair.alone()
        isolated(unit, setting)()


def test_a_small_network_fuses_as_the_whole_one(loaded):
    """The unit with the addition has as many steps more than its context as it should: one."""
    if loaded.name != "openvino" or precision_of(loaded) != "f32":
        pytest.skip("ONNX Runtime's nodes are run as they are")
    from gracile.benchmark.runtimes.openvino import _core
    from gracile.latency.openvino_units import small_networks

    (unit,) = [u for _, u in units_of(loaded) if u.widths == (8, 16)]
    kinds = []
    for model in small_networks(unit):
        graph = _core().compile_model(model, "CPU").get_runtime_model()
        found = [str(op.get_rt_info()["layerType"].astype(str)) for op in graph.get_ordered_ops()]
        kinds.append([k for k in found if k in ("Convolution", "Eltwise", "Subgraph")])
    whole, alone = kinds
    assert whole == [*alone, "Convolution"]


def test_a_runtime_without_a_program_is_refused():
    class Other:
        name = "pytorch"

    with pytest.raises(UserError, match="'pytorch' does not say which units"):
        units_of(Other())
    with pytest.raises(UserError, match="onnxruntime, openvino"):
        builder(Setting("pytorch", "1", "x"))


def test_a_unit_that_cannot_be_built_is_told_and_left_out():
    setting = Setting("openvino", "1", "x")
    odd = Unit.of("Odd", (), {"in": ["f32"], "reads": [[1, 4, 8, 8]], "out": "f32", "op": "Nope",
                              "constants": [None], "attributes": {}})  # fmt: skip
    refused = {}
    assert in_batches([odd], builder(setting), refused=refused) == {}
    assert "cannot be built alone" in refused[odd]
    with pytest.raises(UserError, match="cannot be built alone"):
        in_batches([odd], builder(setting))


def busy(n):
    return lambda: sum(range(n))


def test_large_units_are_measured_fewer_at_a_time():
    built, together = [], []

    def build(unit):
        built.append(unit)
        return Pair(lambda: together.append(len(built)), lambda: None)

    done = []
    sizes = {"a": 0.4, "b": 0.4, "c": 0.4, "d": 5.0, "e": 0.1}
    found = in_batches(
        list(sizes), build, rounds=1, told=lambda n, of: done.append(n), size=sizes.__getitem__
    )
    assert list(found) == list(sizes)
    assert done == [2, 3, 4, 5]  # a unit of any size has its turn
    assert together[0] == 2  # both were there before the first was timed


def test_weights_of_units():
    assert Unit.of("conv", (4, 8), {"kernel": [3, 3]}).weights == 4 * 8 * 9
    assert Unit.of("depthwise", (8,), {"kernel": [3, 3]}).weights == 8 * 9
    assert Unit.of("linear", (4, 8), {}).weights == 32
    assert Unit.of("elementwise", (8,), {}).weights == 0
    inputs = [
        {"shape": [1, "i"]},
        {"constant": True, "shape": ["o", "i"]},
        {"constant": True, "values": [1]},
    ]
    assert Unit.of("Gemm", (4, 8), {"inputs": inputs}).weights == 32


def test_a_difference_is_that_of_the_two_networks():
    one, four = (Pair(busy(k * 20_000), busy(20_000), copies=k - 1) for k in (2, 5))
    a, b = differences([one, four], rounds=8)
    assert a.ms > 0
    assert b.ms == pytest.approx(a.ms, rel=0.5)


def test_a_difference_is_never_negative():
    (found,) = differences([Pair(busy(10), busy(50_000))], rounds=3)
    assert found.ms == 0.0


@pytest.mark.slow
def test_a_network_is_predicted_from_its_measured_units(loaded):
    units, times = units_of(loaded), Table().at(Setting.of(loaded))
    done = measure(times, units, exact=True)
    assert not done.refused
    assert done.units > 4
    ms = measure_network(times, "block", loaded, units)
    found = Predictor(times).network(units)
    assert set(found.counts) == {"measured"}
    assert found.calibration.networks == 1
    assert found.ms == pytest.approx(ms, rel=0.01)  # calibrated on itself
    assert 0.2 < found.sum_ms / ms < 2.0
