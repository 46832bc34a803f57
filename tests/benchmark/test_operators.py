"""Times of layers on made-up counters: grouping by unit, sums, ratios, and never end to end."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gracile.benchmark.artifact import Unit
from gracile.benchmark.operators import count_operators, pieces_of
from gracile.benchmark.runtimes.base import CountedLayer, Counters, Loaded
from gracile.errors import UserError

LAYERS = (
    CountedLayer("reorder", "Reorder"),
    CountedLayer("c1", "Conv fast", ("relu",), ("relu@Conv0", "relu@Relu1")),
    CountedLayer("c2", "Conv fast", ("bn2", "add"), ("bn2@Conv2", "add@Add3")),
    CountedLayer("q", "Quantize", ("relu",), ("relu@Quant4",)),
)
UNITS = (Unit("relu", ("conv1", "bn1")), Unit("bn2", ("conv2", "bn2")), Unit("add"))


class Counted:
    """A loaded artifact whose layers take known times, ms."""

    name, version, device, batch, hint, threads = "fake", "1.0", "fake:CPU", 1, "f32", 1

    def __init__(self, ms, layers=LAYERS, units=UNITS):
        self.layers, self.ms, self.asked = layers, ms, []
        self.artifact = SimpleNamespace(
            sha="a", inputs=(("x", (1, 4)),), units=units, path=Path("m")
        )

    def time(self, n, batch=None):
        """As if counting cost nothing and 20 ms went by between layers."""
        return [sum(self.ms) + 20.0] * n

    def counters(self, batch=None):
        """The layers with these times in every inference."""

        def times(n):
            self.asked.append(n)
            return np.tile(np.array(self.ms, float), (n, 1))

        return Counters(self.layers, times)


def by_unit(records, metric, model):
    return {
        r.subject["unit"]: r for r in records if r.metric == metric and r.subject["model"] == model
    }


def test_layers_that_work_for_the_same_units_are_one_piece():
    pieces = pieces_of(Counted([]).artifact, LAYERS)
    assert [(p.name, p.layers, p.kernels, p.columns) for p in pieces] == [
        ("reorder", (), ("Reorder",), (0,)),
        ("relu", ("conv1", "bn1"), ("Conv fast", "Quantize"), (1, 3)),
        ("bn2 + add", ("conv2", "bn2"), ("Conv fast",), (2,)),
    ]
    assert pieces[1].fused == ("relu@Conv0", "relu@Relu1", "relu@Quant4")


def test_a_file_without_units_has_the_runtime_s_names():
    (piece,) = pieces_of(Counted([], units=()).artifact, (CountedLayer("Conv_1", "Conv"),))
    assert (piece.name, piece.layers) == ("Conv_1", ())


def test_units_their_sum_and_the_ratio_by_hand():
    loaded = {"dense": Counted([1.0, 4.0, 3.0, 2.0]), "small": Counted([1.0, 1.0, 1.0, 1.0])}
    records = count_operators(loaded, rounds=5)
    total = {r.subject["model"]: r for r in records if r.metric == "operators_ms"}
    assert (total["dense"].value, total["small"].value) == (10.0, 4.0)  # not 30: no end to end
    units = by_unit(records, "unit_ms", "dense")
    assert {u: r.value for u, r in units.items()} == {"reorder": 1.0, "relu": 6.0, "bn2 + add": 3.0}
    assert units["relu"].subject["layers"] == "conv1, bn1"
    assert units["bn2 + add"].subject["fused"] == "bn2@Conv2, add@Add3"
    ratios = by_unit(records, "unit_speedup", "small")
    assert {u: (r.value, r.ci95) for u, r in ratios.items()} == {
        "reorder": (1.0, (1.0, 1.0)), "relu": (3.0, (3.0, 3.0)), "bn2 + add": (3.0, (3.0, 3.0)),
    }  # fmt: skip
    assert len({r.id for r in records}) == len(records)
    assert not {"latency_ms", "speedup"} & {r.metric for r in records}


def test_rounds_repeat_inferences_and_what_one_side_lacks_has_no_ratio():
    a, b = Counted([1.0, 4.0, 3.0, 2.0]), Counted([5.0], (CountedLayer("x", "X", ("other",)),))
    records = count_operators({"a": a, "b": b}, rounds=5, warmup=2, min_round_ms=90)
    assert a.asked == [2, 3, 3, 3, 3, 3]  # 30 ms each
    assert not by_unit(records, "unit_speedup", "b")


def test_a_counter_that_says_0_has_no_ratio():
    same = (CountedLayer("c", "Conv", ("relu",)),)
    records = count_operators({"a": Counted([0.0], same), "b": Counted([1.0], same)}, rounds=5)
    assert not by_unit(records, "unit_speedup", "b")


def test_a_runtime_without_counters_says_so():
    class Bare(Loaded):
        name = "bare"
        version = run = run_units = kernels = _step = None

    artifact = SimpleNamespace(runtime="bare", path="m")
    with pytest.raises(UserError, match="bare has no counters of time for its layers"):
        Bare(artifact).counters()
