"""Layers replaced by factors in a session: the same at full rank, trained, saved, exported."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gracile import Recipe, Session
from gracile.core.plan import Factorize, Plan
from gracile.errors import BindError, UserError, VerificationError
from gracile.graph import surgery
from gracile.nn.chain import layer_of
from gracile.nn.schemes import chain_of
from gracile.train.checkpoint import load_model, save_model

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.grouped(torch.relu(self.wide(x))))
        return self.head(torch.relu(self.depth(x)).mean((2, 3)))


def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model(X)
    return model


def session(model, *, end=True, **options):
    entry = {"lowrank": "factorize", "when": {"at": "end" if end else "0ep"}, **options}
    recipe = Recipe.build(methods={"r": entry}, train={"epochs": 0 if end else 1})
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return Session(
        model, recipe, optimizer, example=X, calibration=[X], steps_per_epoch=1, epochs=int(not end)
    )


FULL = {"rank": {"name": "fixed", "share": 1.0}, "round_to": 1}


def replaced(model, scheme, at, ranks=None):
    """Surgery by itself, at full rank or these."""
    from gracile.lowrank.scheme import factorize
    from gracile.nn.schemes import full_ranks

    module = model.get_submodule(at)
    layer = layer_of(module)
    ranks = ranks or full_ranks(scheme, layer)
    factors = factorize(scheme, module.weight.detach(), layer, ranks)
    edits = [Factorize(at=at, scheme=scheme, ranks=ranks)]
    return surgery.verified_apply(model, edits, examples=[X], factors={at: factors})


@pytest.mark.parametrize("scheme", ["svd", "tucker2", "scheme2"])
@pytest.mark.parametrize("at", ["stem", "wide", "grouped"])
def test_full_rank_computes_the_same(scheme, at):
    model = net()
    with torch.no_grad():
        expected = model.eval()(X)
        ready, report = replaced(net(), scheme, at)
        torch.testing.assert_close(ready.eval()(X), expected, rtol=1e-4, atol=1e-5)
    assert report.proof.checks == ("eval", "train")
    assert isinstance(ready.get_submodule(at), nn.Sequential)


def test_wrong_factors_or_ranks_are_refused_and_nothing_is_changed():
    model = net()
    edit = Factorize(at="wide", scheme="svd", ranks=(99,))
    with pytest.raises(UserError, match=r"rank 'rank' must be in 1\.\.24, got 99"):
        surgery.verified_apply(model, [edit], examples=[X], factors={"wide": ()})
    with pytest.raises(UserError, match=r"'wid' cannot be factorized: it is no module .*'wide'"):
        surgery.apply(model, [Factorize(at="wid", scheme="svd", ranks=(4,))], example=X)
    assert isinstance(model.wide, nn.Conv2d)


def test_a_forward_that_reads_the_weight_itself_is_rolled_back():
    class Direct(Net):
        def forward(self, x):
            return super().forward(x) + self.head.weight.sum()

    torch.manual_seed(0)
    model = Direct()
    with pytest.raises(VerificationError, match=r"'head'.*left as it was"):
        replaced(model, "svd", "head", (4,))
    assert isinstance(model.head, nn.Linear)


def test_a_tied_weight_stays_whole():
    model = net()
    model.other = nn.Linear(24, 10)
    model.other.weight = model.head.weight
    with pytest.raises(UserError, match=r"its weight is also 'other\.weight'"):
        surgery.apply(model, [Factorize(at="head", scheme="svd", ranks=(4,))], example=X)


def test_a_session_factorizes_what_gains_and_says_why_not():
    s = session(net(), rank={"name": "macs", "ratio": 0.5}, round_to=4)
    result = s.finish()
    edits = result.plan.of_kind("factorize")
    assert [e.at for e in edits] == ["stem", "wide", "grouped", "head"]
    assert all(r % 4 == 0 for e in edits for r in e.ranks)
    noted = {a: (reason, why) for a, _, _, reason, why, _ in s.notes}
    assert noted["depth.weight"][0] == "no_gain"
    by = {e.at: e for e in edits}
    shapes = {n: tuple(p.shape) for n, p in result.model.named_parameters()}
    assert shapes["wide.0.weight"] == (by["wide"].ranks[0], 16, 3, 3)
    assert shapes["wide.1.weight"] == (24, by["wide"].ranks[0], 1, 1)


def test_new_parameters_are_trained_and_old_ones_forgotten():
    model = net()
    s = session(model, end=False, weights="wide", rank={"name": "fixed", "share": 0.25})
    s.on_epoch_begin(0)
    s.on_minibatch_begin(0, 0, 1)
    held = [p for g in s.optimizer.param_groups for p in g["params"]]
    names = {id(p): n for n, p in s.model.named_parameters()}
    assert {names[id(p)] for p in held} == set(names.values())
    before = s.model.wide[0].weight.detach().clone()
    s.before_backward_pass(0, 0, 1, s.model(X).square().mean()).backward()
    s.before_parameter_optimization(0, 0, 1)
    s.optimizer.step()
    assert not torch.equal(s.model.wide[0].weight, before)


@pytest.mark.parametrize(
    ("scheme", "ranks"), [("tucker2", [8, 12]), ("bicluster", [2, 2, 4, 4]), ("svd_data", [8])]
)
def test_saved_and_loaded_computes_the_same(tmp_path, scheme, ranks):
    rank = {"name": "fixed", "ranks": ranks}
    made = session(net(), weights="wide", scheme=scheme, rank=rank, round_to=1).finish()
    assert made.plan.of_kind("factorize")
    save_model(tmp_path, made)
    back = load_model(tmp_path, X, factory=lambda: SimpleNamespace(model=net()))
    with torch.no_grad():
        torch.testing.assert_close(back.model(X), made.model.eval()(X), rtol=0, atol=0)
    assert Plan.load(tmp_path / "plan.json") == made.plan


def test_fitting_to_data_is_nearer_on_data():
    def error(**options):
        model, original = net(), net().eval()
        made = session(model, weights="wide", rank={"name": "fixed", "share": 0.25}, **options)
        with torch.no_grad():
            return float((made.finish().model.eval()(X) - original(X)).norm())

    plain = error()
    assert error(fit=True) < plain
    assert error(scheme="svd_data") < plain


def test_masked_weights_are_factorized_as_they_are_seen():
    methods = {
        "m": {"prune": "oneshot", "weights": "wide", "sparsity": 0.5, "when": {"at": "0ep"}},
        "r": {"lowrank": "factorize", "weights": "wide", **FULL, "scheme": "tucker2",
              "rank": {"name": "fixed", "ranks": [12, 16]}, "when": {"at": "0ep"}},
    }  # fmt: skip
    recipe = Recipe.build(methods=methods, train={"epochs": 1})
    s = Session(net(), recipe, example=X, steps_per_epoch=1)
    s.on_epoch_begin(0)
    s.on_minibatch_begin(0, 0, 1)
    assert s.plan.of_kind("factorize")
    assert not s.mask_edits("m")


def test_a_block_with_factors_in_it_may_be_left_out_later():
    class Residual(Net):
        def forward(self, x):
            x = torch.relu(self.bn(self.stem(x)))
            x = torch.relu(self.wide(x))
            return self.head((x + self.grouped(x)).mean((2, 3)))

    torch.manual_seed(0)
    s = session(Residual(), weights="grouped", rank={"name": "fixed", "share": 0.5}, round_to=1)
    s.apply([Factorize(by="r", at="grouped", scheme="svd", ranks=(3,))], factors=given(s))
    (block,) = s.blocks
    s.skip(block.id, by="d")
    assert "grouped" not in dict(s.model.named_modules())


def given(s):
    """Factors of the layer `grouped`, of rank 3."""
    from gracile.lowrank.scheme import factorize

    module = s.model.grouped
    return {"grouped": factorize("svd", module.weight.detach(), layer_of(module), (3,))}


def test_what_is_predicted_stays_fixed():
    rank = {"name": "fixed", "share": 0.1}
    model = session(net(), weights="wide", scheme="denil", rank=rank).finish().model
    fixed = [not layer.weight.requires_grad for layer in model.wide]
    assert fixed == [True, *[False] * (len(fixed) - 1)]


def test_what_no_layer_takes_is_refused_at_bind():
    with pytest.raises(BindError, match="no layer of Net can be factorized by 'tucker2'"):
        session(net(), weights="head", scheme="tucker2")
    chain = chain_of("svd", layer_of(net().wide), (8,))
    assert [layer.weight_shape for layer in chain.layers] == [(8, 16, 3, 3), (24, 8, 1, 1)]


def test_a_bias_joins_the_group_of_the_old_bias():
    model = net()
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1]
    others = [p for n, p in model.named_parameters() if p.dim() == 1]
    recipe = Recipe.build(
        methods={"r": {"lowrank": "factorize", "weights": ["wide", "head"], "when": {"at": "0ep"},
                       "rank": {"name": "fixed", "share": 0.25}, "round_to": 1}},
        train={"epochs": 1},
    )  # fmt: skip
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, 0.1)
    s = Session(model, recipe, optimizer, example=X, steps_per_epoch=1)
    s.on_epoch_begin(0)
    names = {id(p): n for n, p in s.model.named_parameters()}
    first, second = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert {"wide.0.weight", "wide.1.weight", "head.0.weight"} <= first
    assert {"wide.1.bias", "head.1.bias"} <= second
    assert not {n for n in first if n.endswith("bias")}


def test_a_frozen_bias_stays_frozen():
    model = net()
    model.wide.bias.requires_grad_(False)
    made = session(model, weights="wide", rank={"name": "fixed", "share": 0.25}).finish().model
    assert not made.wide[1].bias.requires_grad
    assert made.wide[1].weight.requires_grad


@pytest.mark.parametrize("rule", ["energy", "evbmf"])
def test_whitened_ranks_are_those_of_the_responses(rule):
    """Inputs of which one channel alone is alive: responses have rank 9, the kernel's area."""
    x = torch.zeros(4, 16, 12, 12)
    x[:, 3] = X[:, 0]

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.head = nn.Conv2d(16, 24, 3, padding=1), nn.Linear(24, 10)

        def forward(self, x):
            return self.head(self.wide(x).mean((2, 3)))

    def rank(**more):
        torch.manual_seed(0)
        options = {"share": 0.9999} if rule == "energy" else {"least": 1}
        entry = {"lowrank": "factorize", "weights": "wide", "scheme": "svd_data", "round_to": 1,
                 "rank": {"name": rule, **options}, "when": {"at": "end"}, **more}  # fmt: skip
        model = One()
        recipe = Recipe.build(methods={"r": entry}, train={"epochs": 0})
        made = Session(model, recipe, example=x, calibration=[x], epochs=0).finish()
        edits = made.plan.of_kind("factorize")
        return edits[0].ranks[0] if edits else 24

    assert rank(whitened=True) <= 9
    assert rank(whitened=True) < rank() or rule == "evbmf"
    with pytest.raises(UserError, match=r"whitened is for the rules energy and evbmf"):
        session(net(), whitened=True)
