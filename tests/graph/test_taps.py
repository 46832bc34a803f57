"""Taps read what operators give in the model's own forward: values, gradients, repeated calls."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.errors import BindError
from gracile.graph.capture import capture
from gracile.graph.taps import Taps, names_of


class Block(nn.Module):
    """A convolution, a residual sum, one ReLU called twice."""

    def __init__(self, inplace=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x):
        return F.relu(self.relu(self.bn(self.conv(self.relu(x)))) + x)


class Net(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.a, self.b = Block(inplace), Block(inplace)
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        x = self.b(self.a(x * 1.0)) * self.scale
        return self.head(F.dropout(x.mean((2, 3)), 0.5, self.training))


X = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def made(inplace=False):
    torch.manual_seed(0)
    model = Net(inplace)
    return model, capture(model, X)


@pytest.mark.parametrize("inplace", [False, True])
def test_values_are_those_of_the_forward_in_train_mode(inplace):
    model, graph = made(inplace)
    ids = ["a.conv", "a.bn", "a.relu", "a.relu_1", "a.add", "a.relu_2", "b.add", "head"]
    taps = Taps(model, graph, ids)
    model.train()
    with taps.opened():
        model(X)
        got = taps.values()
    h = X
    if not inplace:
        torch.testing.assert_close(got["a.relu"], h.relu())
    conv = model.a.conv(h.relu())
    torch.testing.assert_close(got["a.conv"], conv)
    normed = F.batch_norm(conv, None, None, model.a.bn.weight, model.a.bn.bias, training=True)
    torch.testing.assert_close(got["a.bn"], normed)
    torch.testing.assert_close(got["a.relu_1"], normed.relu())
    torch.testing.assert_close(got["a.relu_2"], got["a.add"].relu())


def test_gradients_are_those_of_the_value_itself():
    model, graph = made()
    model.eval()
    taps = Taps(model, graph, ["b.add"])
    with taps.opened():
        model(X)
        value = taps.values()["b.add"]
    got = torch.autograd.grad(value.square().sum(), list(model.a.parameters()))
    h = model.a(X)
    again = model.b.relu(model.b.bn(model.b.conv(model.b.relu(h)))) + h
    expected = torch.autograd.grad(again.square().sum(), list(model.a.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_last_forward_with_gradient_counts():
    model, graph = made()
    taps = Taps(model, graph, ["a.conv"])
    taps.open()
    model(X)
    first = taps.values()["a.conv"]
    with torch.no_grad():
        model(2 * X)
    assert torch.equal(taps.values()["a.conv"], first)
    taps.close()
    assert taps.values() == {}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_names_of_modules_mean_their_last_operator():
    model, graph = made()
    names = names_of(model, graph)
    assert names["a"] == "a.relu_2"
    assert names["a.add"] == "a.add"
    assert "" not in names
    Taps(model, graph, ["a.relu_2"]).prove((X,), outputs={"a": "a.relu_2"})


def test_a_module_that_gives_something_else_is_refused():
    model, graph = made()
    with pytest.raises(BindError, match=r"what 'a' gives is not the output .* 'a\.add'"):
        Taps(model, graph, ["a.conv"]).prove((X,), outputs={"a": "a.conv"})


def test_what_reads_weights_outside_of_modules_is_refused():
    model, graph = made()
    with pytest.raises(BindError, match=r"'mul_1' cannot be read .* reads weights"):
        Taps(model, graph, ["mul_1"])


def test_functional_dropout_is_refused():
    model, graph = made()
    (id,) = [n.id for n in graph.of_op("dropout")]
    with pytest.raises(BindError, match="cannot be read in the forward"):
        Taps(model, graph, [id])


def test_a_sum_whose_input_is_changed_in_place_is_refused():
    model, graph = made(inplace=True)  # the first ReLU of a block changes what is added later
    Taps(model, graph, ["a.conv", "a.relu_1"]).prove((X,))
    with pytest.raises(BindError, match=r"'a\.add' cannot be read .* is changed before"):
        Taps(model, graph, ["a.add"]).prove((X,))
