"""Bits of single layers and activations: the last counts, float takes quantizers away, errors."""

import pytest
from learned_case import fired
from quant_session import PROFILE, FakeSession, net

from gracile.errors import BindError, RecipeError
from gracile.quantize import engine
from gracile.quantize.methods.ptq import Ptq, PtqOptions
from gracile.recipe.load import loads


@pytest.fixture(autouse=True)
def _profile(monkeypatch):
    monkeypatch.setattr(engine, "load_profile", lambda name: PROFILE)
    monkeypatch.setattr(engine, "sums_saturate", lambda: False)


def placed(**options):
    """(bits of weights, bits of activations) of a net under `quantize: ptq`."""
    session = FakeSession(net())
    method = Ptq("q", PtqOptions(**options))
    method.on_attach(session)
    weights = {w.address.removesuffix(".weight"): w.bits for w in method.placement.weights}
    return weights, {a.id: a.bits for a in method.placement.activations}


EIGHT = {"x": 8, "relu": 8, "bn2": 8, "relu_1": 8, "pool": 8, "mean": 8, "flatten": 8}


def test_bits_are_of_a_weight_and_of_what_its_layer_reads():
    weights, activations = placed(overrides=[{"weights": "conv2", "bits": 4}])
    assert weights == {"conv1": 8, "conv2": 4, "fc": 8}
    assert activations == {**EIGHT, "relu": 4}


def test_weights_or_what_they_read_alone():
    overrides = [{"weights": "conv1", "weight_bits": 3}, {"weights": "fc", "activation_bits": 5}]
    weights, activations = placed(overrides=overrides)
    assert weights == {"conv1": 3, "conv2": 8, "fc": 8}
    assert activations == {**EIGHT, "mean": 5, "flatten": 5}  # they share a scale


def test_activations_by_their_node():
    _, activations = placed(overrides=[{"activations": "bn*", "bits": 6}])
    assert activations == {**EIGHT, "bn2": 6}


def test_the_last_override_counts_and_all_before_edges():
    overrides = [{"weights": "**", "bits": 4}, {"weights": "fc", "weight_bits": 2}]
    weights, activations = placed(bits=3, edges_bits=8, overrides=overrides)
    assert weights == {"conv1": 4, "conv2": 4, "fc": 2}
    assert activations["x"] == activations["mean"] == 4
    assert activations["bn2"] == 3
    weights, _ = placed(bits=3, edges_bits=8, overrides=[{"weights": "conv2", "bits": 4}])
    assert weights == {"conv1": 8, "conv2": 4, "fc": 8}


@pytest.mark.parametrize("bits", ["float", 32])
def test_float_takes_the_layer_and_its_quantizers_away(bits):
    weights, activations = placed(overrides=[{"weights": "fc", "bits": bits}])
    assert weights == {"conv1": 8, "conv2": 8}
    assert "flatten" in activations  # what a pooling in integers gives
    overrides = [{"weights": "**", "bits": bits}, {"weights": "conv1", "bits": 4}]
    assert placed(overrides=overrides)[0] == {"conv1": 4}


def test_half_range_is_kept():
    weights, _ = placed(
        half_range=True, bits=4, overrides=[{"weights": ["fc", "conv1"], "weight_bits": 8}]
    )
    assert weights == {"conv1": 7, "conv2": 4, "fc": 7}


@pytest.mark.parametrize("name", ["lsq", "learned", "pact", "dorefa", "wrpn"])
def test_every_method_has_them(name):
    overrides = [{"weights": "conv2", "bits": 4}, {"weights": "fc", "bits": "float"}]
    session, method, _ = fired(name, overrides=overrides)
    found = {e.at: e.bits for e in method.edits(session)}
    odd = name in ("pact", "dorefa")  # levels without 0 are stored with a bit more
    assert found["conv2.weight"] == 4 + odd
    assert found["relu"] == 4
    assert found["conv1.weight"] == 8
    assert "fc.weight" not in found


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ({"weights": "conv9", "bits": 4}, "'conv9' matches no tensor.*conv2"),
        ({"weights": "bn1", "bits": 4}, "overrides.0: 'bn1' means no weight that is quantized"),
        ({"activations": "bn1", "bits": 4}, "'bn1' matches no quantized activation.*'bn2'"),
    ],
)
def test_what_matches_nothing_is_refused(override, says):
    with pytest.raises(BindError, match=says):
        placed(overrides=[override])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("overrides: [{bits: 4}]", "needs either 'weights' or 'activations'"),
        ("overrides: [{weights: a}]", "needs 'bits'"),
        ("overrides: [{activations: a, bits: float}]", "An operator runs in float if its weight"),
        ("overrides: [{activations: a, weight_bits: 4}]", "is about activations"),
        ("overrides: [{weights: a, bits: float, weight_bits: 4}]", "leave it out"),
        ("overrides: [{weights: a, bits: 17}]", r"q\.overrides\.0\.bits must be"),
        ("overrides: [{weights: a, bits: 1}]", "1 bit is too few here; write 2 or more"),
        ("overrides: [{weights: a, bist: 4}]", "has no key 'bist'. Nearest: 'bits'"),
        ("activations: false, overrides: [{weights: a, activation_bits: 4}]", "leave one out"),
    ],
)
def test_wrong_overrides_are_refused_with_their_place(options, says):
    with pytest.raises(RecipeError, match=f"r.yaml:3: .*{says}"):
        loads(f"recipe: 1\nmethods:\n  q: {{quantize: ptq, {options}}}\n", name="r.yaml")
