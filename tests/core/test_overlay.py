import copy

import pytest
import torch
from torch import nn

from gracile.core.overlay import ORDER, Overlays


class Twice(nn.Module):
    """One weight read by two modules, a free parameter, and a submodule used twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x):
        return self.b(self.a(x)) * self.scale


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Twice()


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def test_an_overlay_changes_the_output_as_changing_the_weight_would(model):
    mask = torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 0]])
    overlays = Overlays(model)
    overlays.set("a.weight", "mask", lambda w: w * mask)
    got = model(X)
    w = model.a.weight * mask
    torch.testing.assert_close(got, (X @ w.T @ w.T) * model.scale)


def test_a_tied_weight_is_computed_once_and_its_gradients_add_up(model):
    calls = []
    overlays = Overlays(model)
    overlays.set("b.weight", "mask", lambda w: (calls.append(1), w * 2)[1])
    model(X).sum().backward()
    assert len(calls) == 1
    got = model.a.weight.grad.clone()
    free = model.a.weight.detach().clone().requires_grad_()
    w = free * 2
    ((X @ w.T @ w.T) * model.scale.detach()).sum().backward()
    torch.testing.assert_close(got, free.grad)


def test_a_free_parameter_can_carry_one(model):
    Overlays(model).set("scale", "quantize", torch.zeros_like)
    assert torch.equal(model(X), torch.zeros(4, 3))


def test_between_forwards_the_model_is_the_users(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    names = [n for n, _ in model.named_parameters()]
    overlays = Overlays(model)
    overlays.set("a.weight", "mask", lambda w: w * 0)
    model(X)
    assert [n for n, _ in model.named_parameters()] == names
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(model.a.weight, nn.Parameter)
    assert "weight" not in model.a.__dict__
    assert type(model.a) is nn.Linear


def test_layers_stack_in_their_fixed_order_whatever_the_order_of_setting(model):
    seen = []

    def layer(name):
        return lambda w: (seen.append(name), w)[1]

    overlays = Overlays(model)
    for name in reversed(ORDER):
        overlays.set("a.weight", name, layer(name))
    model(X)
    assert seen == list(ORDER)


def test_effective_stops_after_the_layer_asked_for(model):
    overlays = Overlays(model)
    overlays.set("a.weight", "quantize", lambda w: w + 10)
    overlays.set("a.weight", "mask", lambda w: w * 2)
    stored = model.a.weight
    torch.testing.assert_close(overlays.effective("a.weight"), stored * 2 + 10)
    torch.testing.assert_close(overlays.effective("a.weight", upto="mask"), stored * 2)
    torch.testing.assert_close(overlays.effective("scale"), model.scale)


def test_setting_a_layer_again_replaces_it_and_removing_takes_it_off(model):
    plain = model(X)
    overlays = Overlays(model)
    overlays.set("a.weight", "mask", lambda w: w * 0)
    overlays.set("a.weight", "mask", lambda w: w * 1)
    torch.testing.assert_close(model(X), plain)
    assert overlays.addresses() == overlays.addresses("mask") == ["a.weight"]
    assert overlays.addresses("quantize") == []
    overlays.remove("a.weight", "mask")
    overlays.remove("a.weight", "mask")
    assert overlays.addresses() == []
    assert overlays.get("a.weight", "mask") is None


def test_wrong_addresses_and_layers_are_refused(model):
    overlays = Overlays(model)
    with pytest.raises(AttributeError):
        overlays.set("a.wight", "mask", lambda w: w)
    with pytest.raises(ValueError, match="mask"):
        overlays.set("a.weight", "prune", lambda w: w)


def test_an_error_in_the_forward_leaves_the_model_clean(model):
    overlays = Overlays(model)
    overlays.set("a.weight", "mask", lambda w: w * 0)
    with pytest.raises(RuntimeError):
        model(torch.zeros(4, 7))
    assert "weight" not in model.a.__dict__
    assert torch.equal(model(X), torch.zeros(4, 3))


def test_an_error_in_an_overlay_leaves_the_model_clean(model):
    overlays = Overlays(model)

    def fail(w):
        raise ArithmeticError("no")

    overlays.set("a.weight", "mask", fail)
    with pytest.raises(ArithmeticError):
        model(X)
    overlays.set("a.weight", "mask", lambda w: w * 0)
    assert torch.equal(model(X), torch.zeros(4, 3))
    assert "weight" not in model.a.__dict__


def test_detach_gives_the_model_back(model):
    plain = model(X)
    overlays = Overlays(model)
    overlays.set("a.weight", "mask", lambda w: w * 0)
    overlays.detach()
    assert torch.equal(model(X), plain)
    assert overlays.addresses() == []
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_paused_layers_go_on_in_another_overlays(model):
    overlays = Overlays(model)
    overlays.set("a.weight", "mask", lambda w: w * 0)
    layers = overlays.pause()
    assert not torch.equal(model(X), torch.zeros(4, 3))
    again = Overlays(model, layers)
    assert torch.equal(model(X), torch.zeros(4, 3))
    assert again.addresses() == ["a.weight"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_are_overlaid_and_given_back(kind):
    torch.manual_seed(0)
    rnn = nn.Sequential(kind(3, 4, batch_first=True))
    x = torch.randn(2, 5, 3)
    plain = rnn(x)[0]
    overlays = Overlays(rnn)
    overlays.set("0.weight_hh_l0", "mask", lambda w: w * 0)
    masked = rnn(x)[0]
    overlays.detach()
    torch.testing.assert_close(rnn(x)[0], plain)
    with torch.no_grad():
        rnn[0].weight_hh_l0.zero_()
    torch.testing.assert_close(rnn(x)[0], masked)


def test_a_deep_copy_stands_alone(model):
    overlays = Overlays(model)
    overlays.set("a.weight", "mask", lambda w: w * 0)
    other = copy.deepcopy(model)
    assert torch.equal(other(X), torch.zeros(4, 3))
    overlays.detach()
    assert not torch.equal(model(X), torch.zeros(4, 3))
    assert torch.equal(other(X), torch.zeros(4, 3))
    assert other.a.weight is not model.a.weight


def test_a_model_that_calls_itself_is_overlaid_once():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(3.0))

        def forward(self, n):
            return self.w if n == 0 else self.w + self(n - 1)

    model = Recursive()
    Overlays(model).set("w", "mask", lambda w: w * 2)
    assert model(2).item() == 18.0
    assert "w" not in model.__dict__
