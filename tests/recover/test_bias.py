"""Bias correction: by hand, equal means after it, and what it cannot correct."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.errors import BindError
from gracile.recipe.load import loads
from gracile.train.session import Session

GENERATOR = torch.Generator().manual_seed(5)
BATCHES = [torch.randn(8, 3, 6, 6, generator=GENERATOR) + 0.5 for _ in range(3)]
PTQ = "int4: {quantize: ptq, bits: 4, observer: min_max}"


def session(model, methods: str, calibration=BATCHES):
    text = "recipe: 1\nmethods:\n" + "".join(f"  {line}\n" for line in methods.split("\n"))
    recipe = loads(text, name="r.yaml")
    return Session(model, recipe, example=calibration[0], calibration=calibration)


class Net(nn.Module):
    """BatchNorm behind a layer without bias, a function's ReLU, dropout, a bias, grouped layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.drop = nn.Dropout()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.up(F.relu(self.deep(x))))
        return self.head(self.drop(x.mean((2, 3))))


def net():
    torch.manual_seed(1)
    model = Net()
    with torch.no_grad():
        for x in BATCHES:
            model(x)
    return model.eval()


def means(model, names):
    """Mean of each layer's output per channel, over all batches."""
    seen = {}
    hooks = [
        model.get_submodule(n).register_forward_hook(
            lambda m, a, y, n=n: seen.setdefault(n, []).append(y.detach())
        )
        for n in names
    ]
    with torch.no_grad():
        for x in BATCHES:
            model(x)
    for h in hooks:
        h.remove()
    return {n: torch.cat(v).transpose(0, 1).flatten(1).mean(1) for n, v in seen.items()}


def quantized(mode=None, model=None):
    fix = f"\nfix: {{recover: bias, mode: {mode}}}" if mode else ""
    return session(model or net(), PTQ + fix).finish()


@pytest.mark.parametrize("mode", ["fast", "full"])
def test_the_shift_by_hand(mode):
    """0.3 rounds to 0 on the grid {-1, 0, 1}; on inputs of mean 2 that is 0.6 less."""
    model = nn.Sequential(nn.Linear(2, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.3, 1.0]]))
        model[0].bias.fill_(0.25)
    x = [torch.tensor([[1.0, 5.0], [3.0, -5.0]])]
    methods = "int2: {quantize: ptq, bits: 2, activations: false}\n"
    result = session(model, f"{methods}fix: {{recover: bias, mode: {mode}}}", x).finish()
    assert result.model[0].weight.round().tolist() == [[0.0, 1.0]]
    torch.testing.assert_close(result.model[0].bias.detach(), torch.tensor([0.85]))


def test_full_gives_every_layer_the_float_mean():
    names = ["bn", "deep", "up", "head"]
    wanted = means(net(), names)
    got, without = (means(quantized(m).model, names) for m in ("full", None))
    for name in names:
        assert not torch.allclose(without[name], wanted[name], rtol=1e-4, atol=1e-5), name
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_fast_gives_the_first_layer_the_float_mean_and_the_output_a_closer_one():
    wanted = means(net(), ["bn", "head"])
    got, without = (means(quantized(m).model, ["bn", "head"]) for m in ("fast", None))
    torch.testing.assert_close(got["bn"], wanted["bn"], rtol=1e-4, atol=1e-5)
    assert (got["head"] - wanted["head"]).norm() < (without["head"] - wanted["head"]).norm()


def test_both_modes_agree_where_there_is_one_layer():
    def model():
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv2d(3, 4, 3)).eval()

    fast, full = (quantized(m, model()).model.get_parameter("0.bias") for m in ("fast", "full"))
    torch.testing.assert_close(fast, full)
    assert not torch.equal(fast, model()[0].bias)


def test_weights_and_grids_stay():
    with_it, without = quantized("full"), quantized()
    for name, p in without.model.named_parameters():
        if name.endswith("weight"):
            assert torch.equal(p, with_it.model.get_parameter(name)), name
    for key, value in without.tensors.items():
        assert torch.equal(value, with_it.tensors[key]), key
    assert [e.at for e in with_it.plan.edits] == [e.at for e in without.plan.edits]


def test_a_pruned_network_is_compared_with_itself_before_rounding():
    """Not with the network as it came: what pruning took is not put back."""
    mask = 'few: {prune: oneshot, weights: "stem", sparsity: 0.5, when: {at: end}}\n'
    pruned = session(net(), mask.strip()).finish().model
    wanted = means(pruned, ["bn"])["bn"]
    fixed = session(net(), mask + PTQ + "\nfix: {recover: bias, mode: full}").finish().model
    torch.testing.assert_close(means(fixed, ["bn"])["bn"], wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_without_bias_and_batch_norm_is_left_and_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    before = copy.deepcopy(model)
    result = quantized("fast", model)
    assert any(c == "bias.left" and " 0 as they are" in t for c, t in result.warnings)
    assert not torch.equal(result.model.get_parameter("2.bias"), before[2].bias)


def test_a_layer_called_twice_is_left():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.head(self.inner(F.relu(self.inner(x))))

    torch.manual_seed(0)
    model = Twice().eval()
    bias = model.inner.bias.detach().clone()
    result = quantized("full", model)
    assert torch.equal(result.model.get_parameter("inner.bias"), bias)
    assert any(c == "bias.left" for c, _ in result.warnings)


def test_it_needs_a_quantizer_in_the_recipe():
    with pytest.raises(BindError, match="'fix' makes up for quantization, and this recipe has no"):
        session(net(), "fix: {recover: bias}")


def test_before_the_quantizer_it_says_where_it_belongs():
    with pytest.raises(BindError, match="put it behind the quantizer"):
        session(net(), f"fix: {{recover: bias}}\n{PTQ}")
