"""Export capture: a GraphModule over the model's own modules, in both modes, for any batch."""

import copy
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from stubborn import Attends, Encoder, Mixed, X, build
from torch import nn
from torch.nn import functional as F

from gracile.graph.capture import capture
from gracile.graph.instrument import instrument
from gracile.graph.shared_module import SharedModule
from gracile.nn.by_mode import ByMode
from gracile.nn.quantized import ActivationQuantizer


def ids(n=2, length=5):
    return torch.randint(0, 11, (n, length), generator=torch.Generator().manual_seed(n))


def outputs_in_train_mode(module, x):
    module.train()
    torch.manual_seed(3)
    return module(x)


def test_names_order_and_objects_are_the_models():
    model = Mixed()
    module = capture(model, X).module
    assert list(module.state_dict()) == list(model.state_dict())
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in model.named_parameters()]
    for name, p in model.named_parameters(remove_duplicate=False):
        assert module.get_parameter(name) is p
    for name, b in model.named_buffers():
        assert module.get_buffer(name) is b
    assert "table" in dict(module.named_buffers())
    assert "table" not in module.state_dict()


def test_copies_keep_names_ties_and_ids():
    model = Encoder()
    module = copy.deepcopy(capture(model, ids()).module)
    assert list(module.state_dict()) == list(model.state_dict())
    assert module.get_parameter("head.weight") is module.get_parameter("words.weight")
    assert module.get_parameter("head.weight") is not model.head.weight
    shared = capture(model, ids()).module
    shared.layers.add_module("new", nn.Identity())
    assert "new" not in dict(model.layers.named_children())
    assert list(capture(module, ids()).nodes) == list(capture(model, ids()).nodes)


def test_a_module_call_is_one_node_and_the_rest_are_operators():
    graph = capture(Mixed(), X)
    assert (graph.how, graph.modes, graph.fixed_batch) == ("export", ("eval", "train"), None)
    assert [(n.id, n.op, n.module) for n in graph if n.module] == [
        ("conv", "conv", "conv"),
        ("bn", "batch_norm", "bn"),
        ("act", "relu", "act"),
        ("fc", "linear", "fc"),
    ]
    assert (graph["scale"].op, graph["mul"].inputs) == ("param", ("act", "scale"))
    assert (graph["mul"].attrs, graph["mul"].fx.target) == ({}, torch.ops.aten.mul.Tensor)


def test_results_in_nested_tuples_are_read_level_by_level():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.attention = nn.LSTM(4, 3), nn.MultiheadAttention(4, 2)

        def forward(self, x):
            assert x.shape[2] == 4
            x = self.attention(x, key=x, value=x, need_weights=False)[0]
            _, (h, c) = self.lstm(x)
            return h - c

    x = torch.randn(5, 2, 4)
    model = Recurrent().eval()
    graph = capture(model, x)
    assert graph["getitem_1"].inputs == ("lstm",)
    assert graph["getitem_1"].fx.args[1] == 1  # (h, c)
    assert graph["sub"].inputs == ("getitem_2", "getitem_3")
    assert [graph[i].fx.args[1] for i in ("getitem_2", "getitem_3")] == [0, 1]
    assert torch.equal(graph.module.eval()(x), model(x))


@pytest.mark.parametrize("name", ["mixed", "encoder", "attends"])
def test_both_modes_compute_what_the_model_does(name):
    model, x = build(name)
    graph = capture(model, x)
    twin = copy.deepcopy(model)
    assert graph.modes == ("eval", "train")
    expected, got = (outputs_in_train_mode(m, x) for m in (twin, graph.module))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    for (k, a), b in zip(twin.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=k)
    twin.eval(), graph.module.eval()
    torch.testing.assert_close(graph.module(x), twin(x))


def test_a_training_step_moves_the_models_own_statistics():
    model = Mixed()
    module = capture(model, X).module
    assert model.bn.num_batches_tracked == 0
    outputs_in_train_mode(module, X)
    assert model.bn.num_batches_tracked == 1


@pytest.mark.parametrize("example", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_batch_size_is_free(example, batch):
    model = Encoder().eval()
    module = capture(model, ids(example)).module.eval()
    torch.testing.assert_close(module(ids(batch)), model(ids(batch)))


def test_a_batch_size_that_the_forward_asks_for_is_reported():
    class Two(Mixed):
        def forward(self, x):
            return super().forward(x) if x.shape[0] == 2 else x

    assert capture(Two(), X).fixed_batch == 2


def test_the_graph_can_be_moved_and_widened():
    model = Encoder().eval()
    module = capture(model, ids()).module.eval()
    on_meta = copy.deepcopy(module).to("meta")
    assert on_meta(ids().to("meta"))["logits"].shape == (2, 5, 11)
    wide = copy.deepcopy(module).double()(ids())["logits"]
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), model(ids())["logits"], rtol=1e-4, atol=1e-4)


def test_dropout_inside_an_operator_is_switched_by_the_mode():
    graph = capture(Attends(), X.flatten(2))
    switch = graph.module.get_submodule("_by_mode.scaled_dot_product_attention___dropout_p")
    assert isinstance(switch, ByMode)
    assert (switch.eval()(), switch.train()()) == (0.0, 0.25)
    assert graph["scaled_dot_product_attention.dropout_p"].op == "size"
    assert graph["batch_norm"].attrs["training"] == "?"


def test_what_differs_within_a_submodule_stays_one_node():
    class Drop(nn.Module):
        def forward(self, x):
            return x * torch.rand(x.shape[0], 1, 1, 1) if self.training else x

    class Drops(Mixed):
        def __init__(self):
            super().__init__()
            self.act = Drop()

    model = Drops()
    graph = capture(model, X)
    assert (graph["act"].op, graph["act"].attrs["target"]) == ("unknown", "Drop")
    assert graph.modes == ("eval", "train")


class Auxiliary(Mixed):
    def forward(self, x):
        y = super().forward(x)
        return (y, x.mean()) if self.training else y


class StopsGradients(Mixed):
    def forward(self, x):
        with torch.no_grad():
            x = x * self.bn.weight[:3, None, None]
        return super().forward(x)


class DropsLayers(Mixed):
    def forward(self, x):
        return super().forward(x if not self.training or torch.rand(()) > 0.5 else -x)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Auxiliary, "the model's own forward does something else in train mode"),
        (StopsGradients, "in train mode the exported graph has other gradients than the model"),
        (DropsLayers, "in train mode: GuardOnDataDependentSymNode"),
    ],
)
def test_a_forward_that_holds_in_eval_mode_only_says_why(cls, why):
    model = cls().eval()
    graph = capture(model, X)
    assert graph.modes == ("eval",)
    assert f"; eval mode only: {why}" in graph.reason
    torch.testing.assert_close(graph.module.eval()(X), model(X))
    again = capture(graph.module, X)
    assert (again.how, again.reason, again.modes) == ("export", graph.reason, ("eval",))


Pair = namedtuple("Pair", "first rest")


def test_the_returned_structure_is_kept():
    class Returns(Mixed):
        def forward(self, x):
            y = super().forward(x)
            return Pair(y, {"twice": [2 * y, None]})

    model = Returns().eval()
    module = capture(model, X).module.eval()
    for m in (module, copy.deepcopy(module), SharedModule(module, copy.deepcopy(module.graph))):
        got = m(X)
        assert isinstance(got, Pair)
        assert got.rest["twice"][1] is None
        torch.testing.assert_close(got.rest["twice"][0], 2 * model(X).first)


def test_buffers_that_a_forward_writes_to_are_written_to():
    class Counts(Mixed):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            y = super().forward(x)
            y[:, 0] = self.calls
            return y

    model = Counts()
    module = capture(model, X).module.eval()
    assert model.calls == 0
    module(X)
    assert torch.equal(module(X)[:, 0], torch.full((2,), 2.0))
    assert model.calls == 2


def test_a_copy_before_a_change_in_place_stays_a_copy():
    class Edits(nn.Module):
        def forward(self, x):
            assert x.shape[1] == 4
            mask = torch.tensor([1.0, 2.0, 3.0, 4.0])
            y = x.transpose(0, 1).contiguous()
            y.mul_(mask.add_(4))
            return x + y.transpose(0, 1)

    x = torch.randn(4, 4)
    module = capture(Edits(), x).module
    # column of y = x^T scaled by 4 + (1, 2, 3, 4): row i of y^T is row i of x times 5 + i
    expected = x + x * torch.tensor([[5.0], [6.0], [7.0], [8.0]])
    for _ in range(2):
        torch.testing.assert_close(module(x.clone()), expected)


def test_modules_can_be_inserted_and_ids_and_knowledge_stay():
    model = Encoder().eval()
    graph = capture(model, ids())
    quantizer = ActivationQuantizer()
    quantizer.mode = "off"
    module = instrument(graph, {"layers.1.gelu": quantizer})
    again = capture(module, ids())
    assert [i for i in again.nodes if i != "layers.1.gelu.quantize"] == list(graph.nodes)
    assert again["layers.1.down"].inputs == ("layers.1.gelu.quantize",)
    assert (again.how, again.reason) == ("export", graph.reason)
    torch.testing.assert_close(module(ids())["logits"], model(ids())["logits"])


def test_ids_are_the_same_in_another_process():
    code = (
        "import sys; sys.path.insert(0, 'tests/graph')\n"
        "from stubborn import build; from gracile.graph.capture import capture\n"
        "print(list(capture(*build('encoder')).nodes))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(list(capture(*build("encoder")).nodes))


def test_functional_batch_norm_and_spatial_dropout_follow_the_mode():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x):
            assert x.shape[1] == 3
            x = F.batch_norm(x, self.mean, self.var, training=self.training)
            return F.dropout2d(x, 0.5, self.training)

    model = Functional()
    module = capture(model, X).module
    assert torch.equal(model.mean, torch.zeros(3))
    gone = outputs_in_train_mode(module, X).flatten(2) == 0
    assert torch.equal(gone.all(2), gone.any(2))  # whole channels
    torch.testing.assert_close(model.mean, 0.1 * X.mean((0, 2, 3)))
    assert not (module.eval()(X) == 0).any()


def test_a_part_that_switches_autocast_off_is_followed_and_said_so():
    class Island(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.a(x)
            with torch.autocast("cpu", enabled=False):
                x = x * x.relu()
            return self.b(x[:, : max(1, x.shape[1])] if x.shape[1] > 5 else x)

    enter = torch.autocast.__enter__
    model, x = Island(), torch.randn(2, 4)
    graph = capture(model, x)
    assert graph.how == "export"
    assert "switch autocast off" in graph.reason
    assert graph.modes == ("eval", "train")
    assert torch.autocast.__enter__ is enter
    torch.testing.assert_close(graph.module(x), model(x))
