"""Cross-layer equalization: by hand, the same function, better grids, and where it stops."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.errors import BindError, GracileError
from gracile.graph.capture import capture
from gracile.graph.fold import fold_batchnorm
from gracile.graph.scaling import by_channels, scale_groups
from gracile.recipe.load import loads
from gracile.recover.methods.equalize import factors
from gracile.train.session import Session

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(5))
EVEN = "even: {recover: equalize}"
PTQ = "q: {quantize: ptq, bits: 8, per_channel: false, half_range: false}"


def session(model, methods=EVEN, x=X):
    text = "recipe: 1\nmethods:\n" + "".join(f"  {line}\n" for line in methods.split("\n"))
    return Session(model, loads(text, name="r.yaml"), example=x[:4], calibration=[x])


def equalized(model, methods=EVEN, x=X):
    return session(model, methods, x).finish().model


class Mobile(nn.Module):
    """Inverted residuals with ReLU: depthwise chains, a residual stream, a flattened head."""

    def __init__(self, act=nn.ReLU, width=8):
        super().__init__()
        w = width
        self.stem = nn.Sequential(nn.Conv2d(3, w, 3, 2, 1, bias=False), nn.BatchNorm2d(w), act())
        self.block = nn.Sequential(
            nn.Conv2d(w, 2 * w, 1, bias=False), nn.BatchNorm2d(2 * w), act(),
            nn.Conv2d(2 * w, 2 * w, 3, 1, 1, groups=2 * w, bias=False), nn.BatchNorm2d(2 * w),
            act(), nn.Conv2d(2 * w, w, 1, bias=False), nn.BatchNorm2d(w),
        )  # fmt: skip
        self.grouped = nn.Conv2d(w, 2 * w, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(2 * w, w, 2, stride=2, groups=2)
        self.slope = nn.PReLU(w)
        self.head = nn.Linear(w * 4, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.block(x)
        x = F.leaky_relu(self.grouped(x))
        x = F.max_pool2d(self.slope(self.up(x)), 4)
        return self.head(torch.flatten(x, 1))


def mobile(spread=1.0, **options):
    """With statistics of data; the scales of its channels differ by factors up to e^spread."""
    torch.manual_seed(3)
    model = Mobile(**options)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.mul_((spread * torch.randn_like(norm.weight)).exp())
            norm.bias.normal_()
        for m in (model.grouped, model.up):
            channels = (spread * torch.randn(m.bias.numel())).exp()
            view = by_channels(capture(model.eval(), X[:4])[_name(model, m)], m.weight)
            view.mul_(channels.reshape(view.shape[0], -1, 1, 1))
        for _ in range(30):
            model.train()(X)
    return model.eval()


def _name(model, layer):
    return next(n for n, m in model.named_modules() if m is layer)


def test_the_factors_of_eq_11_by_hand():
    """r1 = (8, 1), r2 = (2, 4): s = sqrt(r1 / r2), and both ranges become sqrt(r1 r2) = (4, 2)."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[8.0, 4.0], [-1.0, 0.5]]))
        model[0].bias.copy_(torch.tensor([2.0, 3.0]))
        model[2].weight.copy_(torch.tensor([[1.0, 4.0], [-2.0, 1.0]]))
    got = equalized(model, x=X[..., 0, :2].flatten(0, 1))
    close = torch.testing.assert_close
    close(got[0].weight.detach(), torch.tensor([[4.0, 2.0], [-2.0, 1.0]]))
    close(got[0].bias.detach(), torch.tensor([1.0, 6.0]))
    close(got[2].weight.detach(), torch.tensor([[2.0, 2.0], [-4.0, 0.5]]))


def test_a_dead_channel_keeps_its_scale():
    got = factors(torch.tensor([0.0, 4.0, 3.0]), torch.tensor([2.0, 0.0, 3.0]))
    assert got.tolist() == [1.0, 1.0, 1.0]


def test_the_network_computes_the_same():
    model = mobile()
    with torch.no_grad():
        wanted = model(X)
        got = equalized(model)(X)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_every_group_is_even_afterwards():
    model = equalized(mobile())
    graph = capture(model, X[:4])
    groups, _ = scale_groups(graph)
    assert [(g.id, [r.node.id for r in g.readers]) for g in groups] == [
        ("stem.0", ["block.0", "grouped"]),
        ("block.0", ["block.3"]),
        ("block.3", ["block.6"]),
        ("grouped", ["up"]),
        ("up", ["head"]),
    ]
    for g in groups:
        read = torch.stack([
            by_channels(r.node, model.get_parameter(r.node.params["weight"]), r.inputs)
            .abs().amax((1, 3)).flatten()
            for r in g.readers
        ]).amax(0)  # fmt: skip
        rows = [model.get_parameter(w.node.params["weight"]) for w in g.writers]
        if g.writers[0].norm is None:
            made = by_channels(g.writers[0].node, rows[0]).abs().amax((2, 3)).flatten()
            torch.testing.assert_close(made, read, rtol=0.05, atol=1e-3)
        else:
            for row in rows:
                ends = row.abs().flatten(1).amax(1)
                torch.testing.assert_close(ends, ends.max().expand_as(ends), rtol=0.2, atol=0.0)
    assert [w.node.id for w in groups[0].writers] == ["stem.0", "block.6"]


def unevened(model):
    """The same function, BatchNorm folded, its channels scaled apart by factors of about e^1.5."""
    module = fold_batchnorm(capture(model, X[:4]).module).module
    rng = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for g in scale_groups(capture(module, X[:4]))[0]:
            factor = (1.5 * torch.randn(g.size, generator=rng)).exp()
            for node, made, inputs in [
                *((w.node, True, 1) for w in g.writers),
                *((r.node, False, r.inputs) for r in g.readers),
            ]:
                view = by_channels(
                    node, module.get_parameter(node.params["weight"]), 1 if made else inputs
                )
                shape = (view.shape[0], -1, 1, 1) if made else (view.shape[0], 1, -1, 1)
                view.mul_((factor if made else 1 / factor).reshape(shape))
                if made:
                    module.get_parameter(node.params["bias"]).mul_(factor)
    return module


def test_one_scale_per_tensor_loses_far_less():
    model = mobile()
    broken = unevened(model)
    with torch.no_grad():
        wanted = model(X)
        torch.testing.assert_close(broken(X), wanted, rtol=1e-3, atol=1e-3)

        def error(methods):
            got = equalized(copy.deepcopy(broken), methods)(X)
            return float((got - wanted).norm() / wanted.norm())

        assert error(f"{EVEN}\n{PTQ}") < 0.25 * error(PTQ)


def test_masked_weights_stay_zero():
    mask = 'few: {prune: oneshot, weights: "block.0", sparsity: 0.5, when: {at: end}}\n'
    result = session(mobile(), mask + EVEN).finish()
    keep = result.tensors["block.0.weight.mask"]
    assert torch.equal(result.model.get_parameter("block.0.weight") != 0, keep)


def test_relu6_is_not_passed_and_told():
    s = session(mobile(act=nn.ReLU6))
    before = s.model.get_parameter("block.3.weight").detach().clone()
    result = s.finish()
    assert torch.equal(result.model.get_parameter("block.3.weight"), before)
    assert any(c == "equalize.left" and "clips at 6" in t for c, t in result.warnings)


def test_a_network_of_sigmoids_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 2, 3)).eval()
    with pytest.raises(BindError, match=r"'even': no channels .*\(sigmoid\) does not pass"):
        session(model)


def test_behind_the_quantizer_it_says_where_it_belongs():
    with pytest.raises(GracileError, match="put it before the quantizer"):
        session(mobile(), f"{PTQ}\n{EVEN}").finish()


def test_layers_that_share_a_weight_stay():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.a(F.relu(self.a(x)))))))

    torch.manual_seed(0)
    model = Twice().eval()
    graph = capture(model, X[:4])
    groups, refused = scale_groups(graph)
    assert [g.id for g in groups] == ["b"]
    assert "not its own" in refused["a"]


def test_absorbing_moves_what_a_channel_has_in_any_case():
    """BatchNorm gives 10 +- 1: 7 times the next weight go through the ReLU into its bias."""
    model = nn.Sequential(
        nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 1)
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[0].weight.normal_(generator=torch.Generator().manual_seed(1))
        model[1].bias.copy_(torch.tensor([10.0, 0.0]))
        wanted = model(X)
    rounds = "even: {recover: equalize, absorb: true}"
    got = equalized(copy.deepcopy(model), rounds)
    plain = equalized(model)
    moved = plain[1].bias - got[1].bias
    torch.testing.assert_close(moved[0] / plain[1].bias[0], torch.tensor(0.7), rtol=1e-4, atol=0.0)
    assert moved[1] == 0
    gain = plain[3].weight[0, 0, 0, 0] * moved[0]
    torch.testing.assert_close(got[3].bias - plain[3].bias, gain[None])
    with torch.no_grad():
        torch.testing.assert_close(got(X), wanted, rtol=1e-2, atol=1e-1)
