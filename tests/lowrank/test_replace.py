"""Layers replaced by blocks in a session: proven, trained, saved, cut, quantized, exported."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gracile import Recipe, Session, registry
from gracile.benchmark.runtimes.base import load
from gracile.core.plan import Plan, Replace
from gracile.errors import BindError, PlanConflict, UserError, VerificationError
from gracile.graph import surgery
from gracile.latency.difference import Point
from gracile.latency.replacement import program
from gracile.latency.table import Table
from gracile.latency.unit import Setting
from gracile.nn.blocks import Residual, block_of, build_block, standing_for
from gracile.train.applied import apply_plan
from gracile.train.checkpoint import load_model, load_state, save_model, save_state

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A stem, a wide layer, one of equal sides, and a head of two layers that reads every pixel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.same = nn.Conv2d(24, 24, 3, padding=1)
        self.classifier = nn.Sequential(
            nn.Dropout(0.1), nn.Linear(24 * 36, 32), nn.ReLU(), nn.Linear(32, 10)
        )

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.same(torch.relu(self.wide(x))))
        return self.classifier(torch.flatten(x, 1))


def net(kind=Net):
    torch.manual_seed(0)
    model = kind()
    with torch.no_grad():
        model(X)
    return model


def session(model, *, end=True, more=None, **options):
    entry = {"lowrank": "replace", "when": {"at": "end" if end else "0ep"}, **options}
    methods = {"r": entry, **(more or {})}
    recipe = Recipe.build(methods=methods, train={"epochs": 0 if end else 2})
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return Session(
        model, recipe, optimizer, example=X, calibration=[X], steps_per_epoch=1,
        epochs=0 if end else 2,
    )  # fmt: skip


def trained(s, epochs=2):
    for epoch in range(epochs):
        s.model.train()
        s.on_epoch_begin(epoch)
        s.on_minibatch_begin(epoch, 0, 1)
        s.model.train()
        torch.manual_seed(epoch)
        loss = nn.functional.cross_entropy(s.model(X), torch.arange(4))
        loss = s.before_backward_pass(epoch, 0, 1, loss)
        s.optimizer.zero_grad()
        loss.backward()
        s.before_parameter_optimization(epoch, 0, 1)
        s.optimizer.step()
        s.on_minibatch_end(epoch, 0, 1)
        s.on_epoch_end(epoch)
    return s


BLOCKS = [
    "separable",
    {"name": "separable", "norm": True, "activation": "relu"},
    {"name": "grouped", "groups": 4, "pointwise": True},
    "grouped",
    "bottleneck",
    {"name": "bottleneck", "expand": False, "norm": True},
    {"name": "inverted_residual", "expand": 2},
    "global_pool",
]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_saved_and_loaded_computes_the_same(tmp_path, block):
    made = trained(session(net(), block=block, end=False)).finish()
    assert made.plan.of_kind("replace")
    save_model(tmp_path, made)
    back = load_model(tmp_path, X, factory=lambda: SimpleNamespace(model=net()))
    with torch.no_grad():
        torch.testing.assert_close(back.model(X), made.model.eval()(X), rtol=0, atol=0)
    assert Plan.load(tmp_path / "plan.json") == made.plan


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_proof_compares_shapes_and_everything_around(block):
    s = session(net(), block=block)
    made = s.finish().model
    assert made(X).shape == (4, 10)
    at = {e.at for e in s.plan.of_kind("replace")}
    whole = {"name": "x"} | (block if isinstance(block, dict) else {"name": block})
    assert at <= {"stem", "wide", "same"} or whole["name"] == "global_pool"
    for path in at:
        assert isinstance(made.get_submodule(path), nn.Sequential)


def test_plan_and_ledger_say_what_and_why():
    s = session(net(), block={"name": "inverted_residual", "expand": 2})
    result = s.finish()
    (last,) = [e for e in result.plan if e.at == "same"]
    assert (last.kind, last.with_, last.by) == ("replace", "inverted_residual", "r")
    assert last.args == {"expand": 2, "residual": True, "norm": True, "activation": "relu6"}
    assert isinstance(result.model.same, Residual)
    assert not isinstance(result.model.wide, Residual)
    noted = {a: (reason, why) for a, _, _, reason, why, _ in s.notes}
    assert noted["classifier.1.weight"][0] == "unsupported"
    rows = {r.name: r for r in result.ledger}
    assert (rows["same.0.weight"].structure, rows["same.0.weight"].by) == ("replaced", "r")


def test_where_nothing_is_gained_the_layer_stays():
    s = session(net(), block={"name": "inverted_residual", "expand": 6}, weights="wide")
    assert not s.finish().plan.of_kind("replace")
    ((_, _, _, reason, why, _),) = s.notes
    assert reason == "no_gain"
    assert "of 124,416 MACs" in why


def test_layers_are_replaced_in_equal_parts_over_firings():
    s = session(net(), weights=["wide", "same"], end=False)
    entry = {"lowrank": "replace", "weights": ["wide", "same"], "when": {"start": "0ep"}}
    recipe = Recipe.build(methods={"r": entry}, train={"epochs": 2})
    s = Session(net(), recipe, s.optimizer, example=X, steps_per_epoch=1, epochs=2)
    s.on_epoch_begin(0)
    assert [e.at for e in s.plan] == []  # progress 0 of 2 firings
    s.on_minibatch_begin(0, 0, 1)
    s.on_minibatch_end(0, 0, 1)
    s.on_epoch_end(0)
    s.on_epoch_begin(1)
    assert [e.at for e in s.plan] == ["wide", "same"]


def test_new_parameters_are_trained():
    s = session(net(), end=False, weights="wide", block={"name": "separable", "norm": True})
    s.on_epoch_begin(0)
    held = {id(p) for g in s.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in s.model.parameters()}
    assert [type(m) for m in s.model.wide] == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]


@pytest.mark.parametrize("block", BLOCKS[1:3], ids=str)
def test_resumed_equals_uninterrupted(tmp_path, block):
    whole = trained(session(net(), block=block, fit=True, end=False)).finish()
    first = trained(session(net(), block=block, fit=True, end=False), 1)
    save_state(tmp_path / "s.safetensors", first.state_dict())
    second = session(net(), block=block, fit=True, end=False)
    second.load_state_dict(load_state(tmp_path / "s.safetensors"))
    second.model.train()
    second.on_epoch_begin(1)
    second.on_minibatch_begin(1, 0, 1)
    torch.manual_seed(1)
    loss = nn.functional.cross_entropy(second.model(X), torch.arange(4))
    second.before_backward_pass(1, 0, 1, loss)
    second.optimizer.zero_grad()
    loss.backward()
    second.before_parameter_optimization(1, 0, 1)
    second.optimizer.step()
    second.on_minibatch_end(1, 0, 1)
    second.on_epoch_end(1)
    resumed = second.finish()
    assert resumed.plan == whole.plan
    state = whole.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in resumed.model.state_dict().items())


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_fitting_is_nearer_to_what_the_network_gave(block):
    def error(fit):
        model, original = net(), net().eval()
        made = session(model, block=block, fit=fit).finish().model.eval()
        with torch.no_grad():
            return float((made(X) - original(X)).norm())

    assert error(True) < error(False)


# --- heads


def test_a_whole_head_becomes_one_layer_over_means():
    result = session(net(), block="global_pool").finish()
    (edit,) = result.plan
    assert (edit.at, edit.args) == ("classifier", {"image": [24, 6, 6], "linear": True})
    kinds = [type(m).__name__ for m in result.model.classifier]
    assert kinds == ["Unflatten", "AdaptiveAvgPool2d", "Flatten", "Linear"]
    assert tuple(result.model.classifier[3].weight.shape) == (10, 24)


def test_one_layer_of_a_head_is_replaced_by_itself():
    result = session(net(), block="global_pool", weights="classifier.1").finish()
    (edit,) = result.plan
    assert edit.at == "classifier.1"
    assert tuple(result.model.classifier[1][3].weight.shape) == (32, 24)
    with pytest.raises(BindError, match=r"'classifier\.3\.weight': it does not read a flattened"):
        session(net(), block="global_pool", weights="classifier.3")


def test_a_flatten_behind_another_order_of_dims_is_not_taken_for_an_image():
    class Last(Net):
        def forward(self, x):
            x = torch.relu(self.same(torch.relu(self.wide(torch.relu(self.stem(x))))))
            return self.classifier(torch.relu(x.permute(0, 2, 3, 1)).flatten(1))

    with pytest.raises(BindError, match="does not read a flattened image"):
        session(net(Last), block="global_pool")


def test_what_another_entry_does_to_a_layer_of_the_head_is_a_conflict():
    other = {"lowrank": "factorize", "weights": "classifier.3", "when": {"at": "end"}}
    with pytest.raises(PlanConflict, match=r"classifier\.3"):
        session(net(), block="global_pool", more={"f": other})


# --- what comes later


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_channels_are_cut_through_a_block(block):
    s = session(net(), block=block, end=False)
    s.on_epoch_begin(0)
    inside = tuple(f"{e.at}." for e in s.plan.of_kind("replace"))
    free = [g for g in s.groups if g.protected is None]
    s.cut({g.id: range(len(g.units) // 4) for g in free}, by="t")
    cut = {m.at for e in s.plan.of_kind("remove") for m in e.group}
    assert any(a.startswith(inside) and a.endswith("weight") for a in cut)
    assert s.model(X).shape == (4, 10)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_exported_computes_the_same(tmp_path, runtime, block):
    result = session(net(), block=block).finish()
    write = registry.get("exporter", runtime).obj
    model = result.model.eval()
    loaded = load(write(model, result.plan, result.tensors, X[:2], tmp_path / "m", {}))
    with torch.no_grad():
        expected = model(X)
    (got,) = loaded.run(X)
    # sums in another order: float32, about 1e-6 of values of magnitude 1
    torch.testing.assert_close(torch.tensor(got), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_quantized_in_training_afterwards(tmp_path, block):
    more = {"int8": {"quantize": "qat", "when": {"start": "1ep"}}}
    s = trained(session(net(), block=block, end=False, more=more))
    result = s.finish()
    on_grids = {e.at for e in result.plan.of_kind("bits") if e.role == "weight"}
    for edit in result.plan.of_kind("replace"):
        inside = [n for n, p in result.model.named_parameters() if n.startswith(f"{edit.at}.")]
        weights = [n for n in inside if result.model.get_parameter(n).ndim > 1]
        assert set(weights) <= on_grids
    save_model(tmp_path, result)
    back = load_model(tmp_path, X, factory=lambda: SimpleNamespace(model=net()))
    with torch.no_grad():
        torch.testing.assert_close(back.model(X), result.model.eval()(X), rtol=0, atol=0)


def test_after_quantizers_it_is_refused():
    more = {"int8": {"quantize": "ptq", "when": {"at": "0ep"}}}
    methods = {**more, "r": {"lowrank": "replace", "when": {"at": "1ep"}}}
    recipe = Recipe.build(methods=methods, train={"epochs": 2})
    model = net()
    s = Session(model, recipe, example=X, calibration=[X], steps_per_epoch=1)
    s.on_epoch_begin(0)
    s.on_minibatch_begin(0, 0, 1)
    s.on_minibatch_end(0, 0, 1)
    s.on_epoch_end(0)
    with pytest.raises(UserError, match="quantized already"):
        s.on_epoch_begin(1)


# --- refused


def test_a_forward_that_reads_the_weight_itself_is_rolled_back():
    class Direct(Net):
        def forward(self, x):
            return super().forward(x) + self.same.weight.sum()

    model = net(Direct)
    block = build_block(block_of("separable", standing_for(model.same), {}))
    tensors = {"same": [torch.ones_like(t) for t in block.state_dict().values()]}
    edit = Replace.model_validate({"at": "same", "with": "separable"})
    with pytest.raises(VerificationError, match=r"'same'.*left as it was"):
        surgery.verified_apply(model, [edit], examples=[X], factors=tensors)
    assert isinstance(model.same, nn.Conv2d)


def test_edits_that_do_not_fit_are_refused():
    def apply(**edit):
        surgery.apply(net(), [Replace.model_validate(edit)], example=X)

    with pytest.raises(UserError, match=r"'wid' cannot be replaced: it is no module .*'wide'"):
        apply(at="wid", **{"with": "separable"})
    with pytest.raises(UserError, match="unknown block 'seperable'"):
        apply(at="wide", **{"with": "seperable"})
    edit = Replace.model_validate({"at": "wide", "with": "separable"})
    with pytest.raises(UserError, match=r"has 3 tensors, got 1"):
        surgery.apply(net(), [edit], example=X, factors={"wide": [torch.zeros(1)]})


def test_a_plan_with_blocks_is_not_put_on_original_weights():
    plan = session(net()).finish().plan
    with pytest.raises(UserError, match="of kind 'replace', which this version cannot apply"):
        apply_plan(net(), plan, X)


# --- chosen by times


def priced(path, price):
    """A table of this machine: a price for each unit of the network with and without a block."""
    model, other = net().eval(), session(net(), weights="wide").finish().model
    here, units = program(model, X, Setting("openvino", "", ""))
    units |= program(other, X, here)[1]
    table = Table()
    table.at(here).points |= {u: Point(price(u), 0.0, 14, 1.0) for u in units}
    table.save(path)


def test_only_what_the_table_predicts_to_be_faster_is_replaced(tmp_path):
    path = tmp_path / "t.jsonl"
    priced(path, lambda unit: unit.weights / 1e3)
    assert session(net(), weights="wide", latency=str(path)).finish().plan.of_kind("replace")
    priced(path, lambda unit: 1.0)
    s = session(net(), weights="wide", latency=str(path))
    assert not s.finish().plan.of_kind("replace")
    ((_, _, _, reason, why, _),) = s.notes
    assert reason == "no_gain"
    assert "would take" in why
    assert "as it is" in why


def test_what_the_table_cannot_tell_is_kept_with_a_warning(tmp_path):
    path = tmp_path / "t.jsonl"
    priced(path, lambda unit: 1.0)
    s = session(net(), weights="same", latency=str(path))
    assert not s.finish().plan.of_kind("replace")
    assert [code for code, _ in s.warnings] == ["latency"]
    assert "knows nothing of" in s.warnings[0][1]


def test_a_table_that_is_not_there_is_refused_at_bind():
    with pytest.raises(UserError, match="no such table"):
        session(net(), latency="nowhere.jsonl")


def test_a_head_is_fitted_with_its_bias():
    """Least squares: what is left is orthogonal to means and to 1."""
    model, original = net(), net().eval()
    made = session(model, block="global_pool", fit=True).finish().model.eval()
    held = {}
    made.classifier.register_forward_hook(lambda m, args, out: held.update(x=args[0]))
    with torch.no_grad():
        left = (made(X) - original(X)).double()
    means = held["x"].double().reshape(4, 24, -1).mean(2)
    assert float(left.sum(0).abs().max()) < 1e-4
    assert float((means.mT @ left).abs().max()) < 1e-4
