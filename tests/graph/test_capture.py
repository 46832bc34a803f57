"""Capture: ids, operators, parameters and shapes, whatever way the model was seen."""

import copy
import pickle

import pytest
import torch
from channel_zoo import ZOO, build
from torch import nn
from torch.nn import functional as F

from gracile.errors import UserError
from gracile.graph.capture import capture
from gracile.graph.instrument import instrument
from gracile.nn.quantized import ActivationQuantizer


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return x + F.dropout(F.relu(self.bn(self.conv(x))), 0.4, self.training)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(4 * 36, 5)

    def forward(self, x):
        x = self.layer[0](self.layer(self.stem(x)))
        return self.fc(x.view(x.size(0), -1))


class LooksAtSize(Net):
    def forward(self, x):
        assert int(x.shape[1]) == 3
        return super().forward(x)


class LooksAtValues(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


X = torch.randn(2, 3, 8, 8)


def test_ids_are_module_paths_and_the_calling_module_for_functions():
    graph = capture(Net(), X)
    assert (graph.how, graph.reason) == ("fx", None)
    assert list(graph.nodes)[:7] == [
        "x", "stem", "layer.0.conv", "layer.0.bn", "layer.0.relu", "layer.0.dropout",
        "layer.0.add",
    ]  # fmt: skip
    assert graph["layer.0.conv_1"].module == graph["layer.0.conv"].module == "layer.0.conv"
    assert "layer.0.add_1" in graph.nodes
    assert list(graph.nodes)[-4:] == ["size", "reshape", "fc", "output"]


def test_a_node_has_operator_inputs_parameters_attrs_and_shape():
    node = capture(Net(), X)["layer.0.bn"]
    assert (node.op, node.inputs, node.shape) == ("batch_norm", ("layer.0.conv",), (2, 4, 6, 6))
    assert node.params["running_var"] == "layer.0.bn.running_var"
    conv = capture(Net(), X)["stem"]
    assert conv.attrs["kernel_size"] == (3, 3)
    assert conv.attrs["groups"] == 1


def test_a_functional_convolution_reads_like_a_module():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return F.conv2d(x, self.w, self.b, stride=2, padding=1)

    node = capture(Functional(), X)["conv"]
    assert node.params == {"weight": "w", "bias": "b"}
    assert (node.attrs["stride"], node.attrs["kernel_size"]) == ((2, 2), (3, 3))
    assert node.inputs == ("x",)


def test_a_captured_network_can_be_sent_to_another_process():
    module = capture(Net().eval(), X).module
    there = pickle.loads(pickle.dumps(module))
    assert torch.equal(there(X), module(X))


def test_ids_survive_recapture_deepcopy_and_instrument():
    model = Net()
    graph = capture(model, X)
    ids = list(graph.nodes)
    assert list(capture(model, X).nodes) == ids
    assert list(capture(copy.deepcopy(model), X).nodes) == ids
    assert list(capture(graph.module, X).nodes) == ids
    assert list(capture(copy.deepcopy(graph.module), X).nodes) == ids
    laid = capture(instrument(graph, {"layer.0.relu": ActivationQuantizer()}), X)
    assert [id for id in laid.nodes if id != "layer.0.relu.quantize"] == ids
    assert laid["layer.0.relu.quantize"].op == "quantize"
    assert laid["layer.0.dropout"].inputs == ("layer.0.relu.quantize",)


def test_the_graph_module_shares_parameters_and_computes_the_same():
    model = Net().eval()
    graph = capture(model, X)
    assert graph.module.get_parameter("stem.weight") is model.stem.weight
    torch.testing.assert_close(graph.module(X), model(X), rtol=0, atol=0)


def test_functional_dropout_follows_train_and_eval():
    module = capture(Net(), X).module
    module.eval()
    assert torch.equal(module(X), module(X))
    module.train()
    torch.manual_seed(0)
    assert not torch.equal(module(X), module(X))


def test_dropout_that_is_always_on_stays_so():
    class Sampling(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5)

    module = capture(Sampling(), X).module.eval()
    assert (module(X) == 0).any()


def test_a_submodule_with_two_forwards_stays_one_unknown_node():
    class TwoFaced(nn.Module):
        def forward(self, x):
            return x * torch.rand(()) if self.training else x

    graph = capture(nn.Sequential(nn.Conv2d(3, 4, 1), TwoFaced(), nn.ReLU()), X)
    assert graph["1"].op == "unknown"
    assert graph["1"].attrs["target"] == "TwoFaced"
    assert graph["2"].inputs == ("1",)


def test_capture_leaves_the_model_as_it_was():
    model = Net()
    model.layer[0].eval()
    seen = []
    model.stem.register_forward_hook(lambda *_: seen.append(1))
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attributes = set(model.__dict__)
    for cls in (Net, LooksAtSize, LooksAtValues):
        model.__class__ = cls
        capture(model, X.abs())
    assert set(model.__dict__) == attributes
    assert (model.training, model.layer[0].training, model.layer[0].bn.training) == (
        True, False, False,
    )  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert seen == []
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_observing_quantizer_is_not_shown_the_example():
    graph = capture(Net(), X)
    quantizer = ActivationQuantizer()
    module = instrument(graph, {"stem": quantizer})
    quantizer.mode = "observe"  # without an observer it would raise
    assert capture(module, X)["stem.quantize"].shape == (2, 4, 6, 6)
    assert quantizer.mode == "observe"


def test_export_takes_over_with_the_same_ids_and_operators():
    graph, seen = capture(LooksAtSize(), X), capture(Net(), X)
    assert graph.how == "export"
    assert graph.reason.startswith("fx: TypeError")
    assert (graph.modes, graph.fixed_batch) == (("eval", "train"), None)
    for id in ("stem", "layer.0.bn", "layer.0.relu", "layer.1.add", "layer.0.conv_1", "fc"):
        assert (graph[id].op, graph[id].inputs, graph[id].shape) == (
            seen[id].op, seen[id].inputs, seen[id].shape,
        )  # fmt: skip
        assert graph[id].params == seen[id].params


def test_modules_only_names_both_reasons():
    graph = capture(LooksAtValues(), X)
    assert graph.how == "modules"
    assert "fx: TraceError" in graph.reason
    assert "torch.export: " in graph.reason
    assert (graph["layer.0.conv"].op, graph["layer.0.conv"].shape) == ("conv", (2, 4, 6, 6))
    assert "layer.0.conv_1" in graph.nodes


def test_export_prints_nothing(capfd):
    capture(LooksAtValues(), X)
    assert capfd.readouterr() == ("", "")


class Makes(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return x + self.make(8)


def test_a_tensor_made_in_a_forward_belongs_to_the_graph_not_to_the_model():
    model = Makes(torch.arange)
    attributes = set(model.__dict__)
    graph = capture(model, X)
    assert graph.how == "fx"
    assert graph["add"].shape == (2, 3, 8, 8)
    assert set(model.__dict__) == attributes
    assert not model._buffers


def test_random_numbers_made_in_a_forward_are_never_frozen():
    graph = capture(Makes(torch.rand), X)
    assert graph.how == "export"
    assert "computes something else" in graph.reason


def test_an_example_that_does_not_fit_is_a_clear_error():
    with pytest.raises(UserError, match=r"Net does not run on the example of shape \(2, 4, 8, 8\)"):
        capture(Net(), torch.randn(2, 4, 8, 8))


def test_a_weight_that_a_parametrization_computes_is_looked_into():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    graph = capture(nn.Sequential(conv), X)
    assert [n.op for n in graph if n.op in ("weight_norm", "conv")] == ["weight_norm", "conv"]
    assert not graph.of_op("unknown")


def test_an_output_module_and_the_output_have_different_ids():
    class WithOutput(nn.Module):
        def __init__(self):
            super().__init__()
            self.output = nn.Linear(3, 2)

        def forward(self, x):
            return self.output(x)

    assert list(capture(WithOutput(), torch.randn(1, 3)).nodes) == ["x", "output", "output_1"]


@pytest.mark.parametrize("name", ZOO)
def test_every_pattern_of_the_zoo_is_captured_by_fx(name):
    model, inputs = build(name)
    graph = capture(model, inputs)
    assert graph.how == "fx"
    assert all(i in graph.nodes for node in graph for i in node.inputs)
    assert name == "unknown" or not graph.of_op("unknown")


def test_an_operator_without_a_rule_is_unknown_and_named():
    class Bessel(nn.Module):
        def forward(self, x):
            return torch.special.i0(x)

    node = capture(Bessel(), X)["special_i0"]
    assert (node.op, node.attrs, node.inputs) == ("unknown", {"target": "special_i0"}, ("x",))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_shapes_without_values_are_the_shapes_of_a_run(name):
    model, inputs = build(name)
    run, meta = capture(model, inputs), capture(model, inputs, check=False)
    assert list(meta.nodes) == list(run.nodes)
    for id, node in run.nodes.items():
        assert (meta[id].shape, meta[id].inputs, meta[id].attrs) == (
            node.shape, node.inputs, node.attrs,
        )  # fmt: skip


def test_unchecked_capture_computes_nothing(monkeypatch):
    monkeypatch.setattr("gracile.graph.record.recorded", None)
    model = Net()
    before = copy.deepcopy(model.state_dict())
    graph = capture(model, X, check=False)
    assert graph["fc"].shape == (2, 5)
    assert all(t.device.type == "cpu" and t.equal(before[k]) for k, t in model.state_dict().items())


class MixesDevices(Net):
    def __init__(self):
        super().__init__()
        self.scale = torch.ones(1, 3, 1, 1)  # no buffer: it stays where it is

    def forward(self, x):
        return super().forward(x * self.scale)


def test_unchecked_capture_runs_what_the_meta_device_cannot():
    graph = capture(MixesDevices(), X, check=False)
    assert graph.how == "fx"
    assert graph["fc"].shape == (2, 5)


def test_unchecked_capture_sees_that_a_batch_norm_does_not_fit():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5))
    with pytest.raises(UserError, match="does not run on the example"):
        capture(model, X, check=False)
