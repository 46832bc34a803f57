"""Units: what a runtime computes as one, named by its last node."""

import torch
from small_nets import ResNet, as_if_trained, quantized

from gracile.benchmark.artifact import Unit
from gracile.export.prepare import activation_grids
from gracile.export.units import choose_units
from gracile.graph.capture import capture

X = torch.randn(2, 3, 8, 8)


def test_a_layer_its_norm_and_its_activation_are_one_unit():
    units = choose_units(capture(as_if_trained(ResNet()), X), ())
    assert units[:3] == (
        Unit("relu", ("conv1", "bn1")),
        Unit("blocks.0.relu", ("blocks.0.conv1", "blocks.0.bn1")),
        Unit("blocks.0.bn2", ("blocks.0.conv2", "blocks.0.bn2")),
    )
    assert units[-1] == Unit("fc", ("fc",))


def test_an_addition_and_its_activation_are_one_unit():
    ids = [u.id for u in choose_units(capture(as_if_trained(ResNet()), X), ())]
    assert not any(id.endswith("add") for id in ids)
    assert not any("pad" in id or "getitem" in id or "flatten" in id for id in ids)


def test_every_layer_is_in_exactly_one_unit():
    model = as_if_trained(ResNet())
    layers = [x for u in choose_units(capture(model, X), ()) for x in u.layers]
    own = [n for n, m in model.named_modules() if list(m.parameters(recurse=False))]
    assert sorted(layers) == sorted(own)


def test_a_quantizer_ends_a_unit_and_a_quantized_input_is_one():
    model, _, _ = quantized(as_if_trained(ResNet()), X, at=["x", "conv1", "relu"])
    graph = capture(model, X)
    units = choose_units(graph, activation_grids(graph))
    assert units[:3] == (Unit("x.quantize"), Unit("conv1", ("conv1",)), Unit("relu", ("bn1",)))
