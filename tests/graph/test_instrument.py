"""instrument() changes nothing but what the inserted modules do, and shares everything."""

import pytest
import torch
from torch import nn

from gracile.errors import BindError, UserError
from gracile.graph.capture import capture
from gracile.graph.graph import Graph
from gracile.graph.instrument import instrument


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x, y):
        z = self.bn(self.conv(x))
        return torch.relu(z) + z * y


class Add(nn.Module):
    """Adds a number: visible, and easy to compute by hand."""

    def __init__(self, number: float):
        super().__init__()
        self.number = number

    def forward(self, x):
        return x + self.number


X = (torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3))


def test_identity_modules_change_nothing_and_parameters_are_shared():
    net = Net()
    graph = capture(net, X)
    ids = [n.id for n in graph if n.op != "output"]
    module = instrument(graph, {id: nn.Identity() for id in ids})
    assert torch.equal(module.eval()(*X), net.eval()(*X))
    assert module.get_parameter("conv.weight") is net.conv.weight


def test_all_readers_see_the_inserted_module():
    net = Net().eval()
    module = instrument(capture(net, X), {"bn": Add(10.0)})
    z = net.bn(net.conv(X[0])) + 10
    torch.testing.assert_close(module(*X), torch.relu(z) + z * X[1])


def test_an_input_can_be_instrumented():
    net = Net().eval()
    module = instrument(capture(net, X), {"x": Add(1.0), "y": Add(2.0)})
    torch.testing.assert_close(module(*X), net(X[0] + 1, X[1] + 2))


def test_ids_and_names_of_inserted_nodes():
    module = instrument(capture(Net(), X), {"bn": Add(0.0)})
    again = capture(module, X)
    assert again["bn.quantize"].inputs == ("bn",)
    assert isinstance(module.get_submodule("_quantizers.bn"), Add)
    assert list(again.nodes)[:3] == ["x", "y", "conv"]


def test_more_can_be_added_later():
    net = Net().eval()
    module = instrument(capture(net, X), {"bn": Add(1.0)})
    module = instrument(capture(module, X), {"conv": Add(5.0)})
    z = net.bn(net.conv(X[0]) + 5) + 1
    torch.testing.assert_close(module(*X), torch.relu(z) + z * X[1])


def test_the_original_is_untouched():
    net = Net().eval()
    graph = capture(net, X)
    before = graph.module(*X)
    instrument(graph, {"bn": Add(3.0)})
    assert torch.equal(graph.module(*X), before)
    assert not hasattr(graph.module, "_quantizers")


def test_modes_of_shared_modules_are_kept():
    net = Net().train()
    net.bn.eval()  # frozen by the user
    graph = capture(net, X)
    module = instrument(graph, {"bn": Add(0.0)})
    assert module.training == graph.module.training
    assert net.conv.training
    assert not module.get_submodule("bn").training


def test_wrong_places_are_refused():
    graph = capture(Net(), X)
    with pytest.raises(BindError, match=r"no node 'bm'.*Known: .*bn"):
        instrument(graph, {"bm": nn.Identity()})
    with pytest.raises(BindError, match="is the output"):
        instrument(graph, {"output": nn.Identity()})
    twice = capture(instrument(graph, {"bn": Add(0.0)}), X)
    with pytest.raises(BindError, match="quantizer already"):
        instrument(twice, {"bn": Add(0.0)})


def test_a_graph_that_fx_did_not_make_is_refused():
    with pytest.raises(UserError, match="captured by 'modules': no way in"):
        instrument(Graph({}, "modules", reason="no way in"), {})
