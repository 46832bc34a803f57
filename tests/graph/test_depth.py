"""Residual blocks: found in any network, left out = multiplied by zero, what goes really goes."""

import copy

import pytest
import torch
from depth_nets import NETS, Branch, Shared, build
from torch import nn

from gracile.core.plan import Mask, Skip
from gracile.errors import BindError, UserError, VerificationError
from gracile.graph import skip as skipping
from gracile.graph.capture import capture
from gracile.graph.dependency import channel_groups
from gracile.graph.depth import blocks, skip_edits
from gracile.graph.surgery import apply, remove_edits, verified_apply

IMAGE = (2, 3, 6, 6)


def found(model, x):
    return {b.id: b for b in blocks(model, capture(model, x))}


def edits_of(model, x, ids):
    return skip_edits(model, capture(model, x), ids, "test")


def test_a_resnet_block_is_its_addition_and_a_projected_one_stays():
    known = found(*build("resnet20"))
    assert list(known) == [f"layer{i}.{k}.add" for i in (1, 2, 3) for k in range(3)]
    b = known["layer1.0.add"]
    assert (b.identity, b.branch, b.last) == ("relu", "layer1.0.bn2", ("layer1.0.bn2.weight",))
    assert b.parameters == 2 * 9 * 16 * 16 + 4 * 16
    assert b.macs == 2 * 9 * 16 * 16 * 32 * 32
    assert "not an identity" in known["layer2.0.add"].protected
    assert [i for i, b in known.items() if b.protected] == ["layer2.0.add", "layer3.0.add"]


def test_attention_and_mlp_are_two_blocks_and_a_position_is_none():
    known = found(*build("transformer"))
    assert list(known) == ["layers.0.add", "layers.0.add_1", "layers.1.add", "layers.1.add_1"]
    assert known["layers.0.add"].last == ("layers.0.attn.out_proj.weight",)
    assert known["layers.0.add_1"].last == ("layers.0.mlp.2.weight",)
    assert known["layers.0.add_1"].gone == (
        "layers.0.norm2", "layers.0.mlp.0", "layers.0.mlp.1", "layers.0.mlp.2", "layers.0.mlp.3",
    )  # fmt: skip


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [False, True])
def test_left_out_is_multiplied_by_zero(name, training):
    model, x = build(name)
    known = {i: b for i, b in found(model, x).items() if b.protected is None}
    ids = list(known)[1:3]
    if name == "mobilenet":
        ids = ["features.5.add", "features.6.add"]  # the second hands on what the first did
    masked = copy.deepcopy(model)
    for id in ids:
        for module in [m for n, m in masked.named_modules() if n == known[id].branch]:
            module.register_forward_hook(lambda _m, _i, out: out * 0)
    if name == "transformer":  # the branch of an attention is a part of what its module returns
        masked.layers[1].attn.register_forward_hook(lambda _m, _i, out: (out[0] * 0, out[1]))
    new, report = verified_apply(model, edits_of(model, x, ids), examples=[x])
    assert report.proof.checks == ("eval", "train")
    assert report.removed == sum(known[i].parameters for i in ids)
    for m in (masked, new):
        m.train(training)
        for d in m.modules():
            if isinstance(d, nn.Dropout):
                d.p = 0.0
    torch.testing.assert_close(new(x), masked(x), rtol=1e-5, atol=1e-5)
    after = masked.state_dict()
    for key, value in new.state_dict().items():
        torch.testing.assert_close(value, after[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_what_goes_is_in_no_name_and_the_rest_keeps_its_names_and_tensors(name):
    model, x = build(name)
    keys, original = list(model.state_dict()), dict(model.named_parameters())
    id = next(i for i, b in found(model, x).items() if b.protected is None)
    (edit,) = edits_of(model, x, [id])
    new = apply(model, [edit], example=x)
    gone = set(keys) - set(new.state_dict())
    assert gone == {k for k in keys if any(k.startswith(p + ".") for p in edit.gone)}
    assert set(keys) - gone == set(new.state_dict())
    assert all(p is original[n] for n, p in new.named_parameters())
    assert list(model.state_dict()) == keys  # the model it was made from is whole
    again = copy.deepcopy(new)
    assert list(again.state_dict()) == list(new.state_dict())
    assert torch.equal(again(x), new(x))
    assert not [n for n, m in new.named_modules() if n.startswith(id.rpartition(".")[0] + ".conv")]


def test_an_optimizer_forgets_what_goes_and_training_goes_on():
    model, x = build("resnet20")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model.train()(x).square().mean().backward()
    optimizer.step()
    model, _ = verified_apply(
        model, edits_of(model, x, ["layer3.2.add"]), examples=[x], optimizer=optimizer
    )
    left = set(model.parameters())
    assert set(optimizer.param_groups[0]["params"]) == left == set(optimizer.state)
    optimizer.zero_grad()
    before = model.conv1.weight.clone()
    model.train()(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model.conv1.weight)


def test_channels_and_blocks_go_in_one_list_and_again_in_any_order():
    model, x = build("resnet20")
    groups = channel_groups(model, capture(model, x))
    gone = {g.id: [0, 2] for g in groups if g.protected is None}
    removes = remove_edits(groups, gone, "test")
    skips = edits_of(model, x, ["layer1.1.add", "layer3.2.add"])
    twin = copy.deepcopy(model)
    new, report = verified_apply(model, [*removes, *skips], examples=[x])
    assert report.edits == len(removes) + 2
    assert torch.equal(apply(twin, [*removes, *skips], example=x)(x), new(x))
    groups = channel_groups(new, capture(new, x))
    more = remove_edits(groups, {groups[0].id: [1]}, "test")
    smaller, _ = verified_apply(new, more, examples=[x])
    assert smaller(x).shape == (2, 10)


def test_a_layer_of_two_blocks_goes_with_the_second_of_them():
    model, x = Shared(), torch.randn(3, 3)
    assert [b.parameters for b in found(model, x).values()] == [0, 0]
    one, two = edits_of(model, x, ["add", "add_1"])
    assert (one.nodes, one.gone) == (("f",), ())
    assert (two.nodes, two.gone) == (("f_1",), ("f",))
    half, _ = verified_apply(model, [one], examples=[x])
    assert "f.weight" in half.state_dict()
    new, _ = verified_apply(model, [one, two], examples=[x])
    assert sorted(new.state_dict()) == ["head.bias", "head.weight", "stem.bias", "stem.weight"]
    torch.testing.assert_close(new(x), model.head(torch.relu(model.stem(x))))


def test_a_failing_list_leaves_everything_as_it_was(monkeypatch):
    model, x = build("resnet20")
    state = copy.deepcopy(model.state_dict())
    groups = channel_groups(model, capture(model, x))
    removes = remove_edits(groups, {groups[0].id: [0]}, "test")
    skips = edits_of(model, x, ["layer1.1.add"])
    monkeypatch.setattr(skipping, "_multiply_by_zero", lambda module, cut: None)
    with pytest.raises(VerificationError, match=r"'layer1.1.add'.*eval.*'layer1.1.relu2'"):
        verified_apply(model, [*removes, *skips], examples=[x])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


REFUSED = {
    "projected": (lambda m, x: m.g(x) + m.f(x), "not an identity"),
    "broadcast": (lambda m, x: x.mean((2, 3), keepdim=True) + 0 * m.f(x) + x, None),
    "scaled": (lambda m, x: torch.add(m.f(x), x, alpha=2), "multiplied by a number"),
    "read elsewhere": (lambda m, x: [y := m.f(x), (x + y) * y][1], "read elsewhere"),
    "in-place branch": (lambda m, x: x + m.f(m.relu_(x)), "changes its input in place"),
    "in-place sum": (lambda m, x: [y := m.relu_(x + m.f(x)), y * m.g(x)][1], "in place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_left_out_says_why(name):
    forward, why = REFUSED[name]
    model, x = Branch(forward).eval(), torch.randn(IMAGE)
    reasons = [b.protected for b in found(model, x).values()]
    assert any(why in (r or "") for r in reasons) if why else None in reasons


def test_a_network_that_is_one_block_keeps_its_weights():
    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return x + self.f(x)

    (b,) = found(Denoiser(), torch.randn(IMAGE)).values()
    assert "no weight would be left" in b.protected


def test_wrong_blocks_are_refused_with_the_nearest():
    model, x = build("resnet20")
    with pytest.raises(UserError, match=r"no residual block 'layer1.0.ad'.*'layer1.0.add'"):
        edits_of(model, x, ["layer1.0.ad"])
    with pytest.raises(UserError, match="cannot be left out: the shortcut is not an identity"):
        edits_of(model, x, ["layer2.0.add"])
    with pytest.raises(UserError, match="no residual block"):
        apply(model, [Skip(block="nowhere")], example=x)
    with pytest.raises(UserError, match="not 'mask'"):
        apply(model, [Mask(at="w", key="w.mask", sparsity=0.5)], example=x)


def test_a_forward_that_cannot_be_followed_has_no_blocks():
    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(3, 3)

        def forward(self, x):
            return x + self.f(x) if float(x.detach().sum()) > 1e9 else self.f(x)

    model, x = Blind(), torch.randn(2, 3)
    graph = capture(model, x)
    assert graph.how == "modules"
    assert blocks(model, graph) == []
    with pytest.raises(BindError, match="no block can be left out"):
        skip_edits(model, graph, ["add"], "test")
