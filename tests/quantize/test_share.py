"""Weight sharing: the paper's example, what stays as it was, and other methods around it."""

import pytest
import sharing_case as case
import torch
from torch import nn

import gracile
from gracile.analyze.layers import stored_bytes
from gracile.core.plan import Architecture, Plan, Share
from gracile.errors import BindError, PlanConflict, RecipeError
from gracile.quantize.codebook import Shared, restore
from gracile.quantize.kmeans import cluster_numbers, linear_start
from gracile.recipe.load import loads
from gracile.train.checkpoint import load_state, save_state

AT_END = "when: {at: end}"
FEW = "few: {prune: oneshot, weights: [second, head], sparsity: 0.6, when: {at: 0ep}}"


def values(w):
    return len(w.detach().unique())


# ------------------------------------------------------------------ figure 3


def test_the_clusters_of_figure_3():
    centroids, codes = cluster_numbers(case.WEIGHTS, linear_start(case.WEIGHTS, 4))
    torch.testing.assert_close(centroids, case.CENTROIDS, atol=1e-6, rtol=0)
    assert torch.equal(codes, case.CODES)


def test_the_gradient_of_figure_3_is_the_sum_over_a_cluster():
    shared = Shared(case.CENTROIDS, case.CODES)
    (shared(case.WEIGHTS) * case.GRADIENT).sum().backward()
    torch.testing.assert_close(shared.values.grad, torch.tensor([-0.03, 0.04, 0.02, 0.04]))


def test_a_step_of_training_is_that_of_figure_3():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(case.WEIGHTS)
    text = "m: {quantize: share, bits: 2, keep_zeros: false, when: {start: 0ep}, " + (
        "codebook_optimizer: sgd, codebook_lr: 1}"
    )
    s = gracile.Session(
        model,
        loads(f"recipe: 1\ntrain: {{epochs: 1}}\nmethods:\n  {text}\n", name="r.yaml"),
        torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.5),
        example=torch.eye(4),
        steps_per_epoch=1,
    )
    with s.epoch():
        s.loss((s.model(torch.eye(4)) * case.GRADIENT.T).sum()).backward()  # dL/dW = GRADIENT
        s.step()
    torch.testing.assert_close(s.parameter("0.weight").detach(), case.WEIGHTS)
    result = s.finish()
    torch.testing.assert_close(
        result.model[0].weight.detach(), case.TUNED[case.CODES], atol=1e-6, rtol=0
    )


def test_equation_2_figure_3_is_3_2_times_smaller():
    model = nn.Linear(4, 4, bias=False)
    plan = Plan(architecture=Architecture(name="m"))
    plan = plan.extended([Share(at="weight", key="k", levels=4)])
    assert 4 * 16 / stored_bytes(model, plan) == 3.2


# ------------------------------------------------------------------ the method


@pytest.mark.parametrize("init", ["linear", "density", "random"])
@pytest.mark.parametrize("bits", [1, 3])
def test_every_tensor_has_so_many_values(init, bits):
    s = case.session(f"m: {{quantize: share, bits: {bits}, init: {init}, {AT_END}}}", epochs=0)
    result = s.finish()
    for name in ("first", "second", "head"):
        assert values(result.model.get_parameter(f"{name}.weight")) <= 2**bits
    assert values(result.model.get_parameter("second.bias")) == 12


def test_what_a_plan_names_makes_the_weights():
    s = case.session(f"m: {{quantize: share, {AT_END}}}", epochs=0)
    result = s.finish()
    edits = result.plan.of_kind("share")
    assert {e.at for e in edits} == {"first.weight", "second.weight", "head.weight"}
    for e in edits:
        book, codes = (result.tensors[f"{e.key}.{part}"] for part in ("codebook", "codes"))
        assert e.levels == len(book) == 16
        assert torch.equal(restore(book, codes), result.model.get_parameter(e.at))
    rows = {r.name: r for r in result.ledger}
    assert rows["first.weight"].precision == "shared"
    assert rows["first.weight"].why == "16 values"


def test_fewer_different_weights_than_values_stay_exact():
    model = case.small()
    with torch.no_grad():
        model.head.weight.copy_((model.head.weight * 8).round() / 8)
    before = model.head.weight.detach().clone()
    s = case.session(f"m: {{quantize: share, weights: head, {AT_END}}}", model=model, epochs=0)
    assert torch.equal(s.finish().model.head.weight, before)


def test_tensors_that_gain_nothing_stay_float_and_say_why():
    model = case.small()
    with torch.no_grad():
        model.head.weight.fill_(0.25)
    entry = f"m: {{quantize: share, weights: [first, head], bits: 8, {AT_END}}}"
    result = case.session(entry, model=model, epochs=0).finish()
    rows = {r.name: r for r in result.ledger}
    assert "codes and codebook would take" in rows["first.weight"].why
    assert rows["head.weight"].reason == "no_gain"
    assert not result.plan.of_kind("share")


def test_training_moves_the_values_and_neither_codes_nor_stored_weights():
    s = case.session("m: {quantize: share, bits: 3, codebook_lr: 1e-2, when: {start: 1ep}}")
    case.train(s, 0, 2)
    shared = s.methods[0].shared
    stored = {a: s.parameter(a).detach().clone() for a in shared}
    codes = {a: x.codes.clone() for a, x in shared.items()}
    books = {a: x.codebook.detach().clone() for a, x in shared.items()}
    case.train(s, 2, 3)
    for a, w in stored.items():
        assert torch.equal(s.parameter(a), w)
        assert torch.equal(shared[a].codes, codes[a])
        assert not torch.equal(shared[a].codebook, books[a])
    result = s.finish()
    assert all(values(result.model.get_parameter(a)) == 8 for a in stored)


def test_without_training_of_the_codebook_only_the_rest_moves():
    entry = "m: {quantize: share, bits: 3, train: false, when: {start: 1ep}}"
    s = case.session(entry)
    case.train(s, 0, 2)
    before = {a: x.codebook.detach().clone() for a, x in s.methods[0].shared.items()}
    bias = s.parameter("second.bias").detach().clone()
    case.train(s, 2, 3)
    for a, x in s.methods[0].shared.items():
        assert torch.equal(x.codebook, before[a])
    assert not torch.equal(s.parameter("second.bias"), bias)


def test_a_codebook_of_halves_is_what_the_model_computes_with():
    s = case.session(f"m: {{quantize: share, codebook: float16, {AT_END}}}", epochs=0)
    result = s.finish()
    book = result.tensors["first.weight.shared.codebook"]
    assert book.dtype == torch.float16
    codes = result.tensors["first.weight.shared.codes"]
    assert torch.equal(restore(book.float(), codes), result.model.first.weight)


# ------------------------------------------------------------------ others around it


@pytest.mark.parametrize("when", ["{start: 1ep}", "{at: end}"])
def test_zeros_of_an_earlier_mask_stay_zero_and_outside_the_codebook(when):
    _, result = case.trained(FEW, f"m: {{quantize: share, bits: 2, when: {when}}}")
    keep = result.tensors["second.weight.mask"]
    w = result.model.second.weight.detach()
    assert torch.equal(w != 0, keep)
    assert values(w[keep]) == 4
    assert result.tensors["second.weight.shared.codebook"][0] == 0


def test_a_mask_that_comes_later_acts():
    late = FEW.replace("0ep", "2ep")
    _, result = case.trained("m: {quantize: share, bits: 2, when: {start: 1ep}}", late)
    keep = result.tensors["second.weight.mask"]
    w = result.model.second.weight.detach()
    assert not w[~keep].any()
    book, codes = (result.tensors[f"second.weight.shared.{p}"] for p in ("codebook", "codes"))
    assert torch.equal(restore(book, codes), w)


@pytest.mark.parametrize("first", [True, False])
def test_a_masked_tensor_without_a_zero_is_refused(first):
    shared = "m: {quantize: share, keep_zeros: false, when: {start: 1ep}}"
    methods = (FEW, shared) if first else (shared, FEW.replace("0ep", "2ep"))
    with pytest.raises(BindError, match=r"masks 'second.weight'.*keep_zeros: true"):
        case.trained(*methods)


@pytest.mark.parametrize("entry", ["share, bits: 3", "product, subspace: 4, words: 4"])
def test_codes_follow_a_cut(entry):
    s = case.session(f"m: {{quantize: {entry}, when: {{start: 1ep}}}}", case.CUT)
    case.train(s, 0, 2)
    whole = {a: s.overlays.effective(a).detach() for a in s.methods[0].shared}
    s.on_epoch_begin(2)
    for a, w in whole.items():
        maps = s.plan.to_original()
        for dim in (0, 1):
            if (a, dim) in maps:
                w = w.index_select(dim, torch.tensor(maps[a, dim]))
        torch.testing.assert_close(s.overlays.effective(a).detach(), w, rtol=0, atol=0)
    assert s.parameter("second.weight").shape[1] == 4


@pytest.mark.parametrize("entry", ["share, bits: 3", "product, subspace: 4, words: 4"])
def test_a_run_that_is_cut_and_resumed_ends_the_same(entry, tmp_path):
    methods = (f"m: {{quantize: {entry}, codebook_lr: 1e-2, when: {{start: 0ep}}}}", case.CUT)
    methods = (methods[0], methods[1].replace("2ep", "1ep"))
    _, whole = case.trained(*methods)
    first = case.session(*methods)
    case.train(first, 0, 2)
    save_state(tmp_path / "s.safetensors", first.state_dict())
    second = case.session(*methods)
    second.load_state_dict(load_state(tmp_path / "s.safetensors"))
    case.train(second, 2, 3)
    resumed = second.finish()
    assert resumed.plan == whole.plan
    for a, b in ((resumed.tensors, whole.tensors), (resumed.model, whole.model)):
        a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_two_entries_share_different_layers_with_different_bits():
    one = f"a: {{quantize: share, weights: [first], bits: 4, {AT_END}}}"
    two = f"b: {{quantize: share, weights: [second, head], bits: 2, {AT_END}}}"
    result = case.session(one, two, epochs=0).finish()
    levels = {e.at: e.levels for e in result.plan.of_kind("share")}
    assert levels == {"first.weight": 16, "second.weight": 4, "head.weight": 4}
    with pytest.raises(PlanConflict, match=r"both set values of 'first.weight'"):
        case.session(one, two.replace("[second, head]", "first"), epochs=0)


def test_integers_on_top_are_those_of_the_shared_values():
    ptq = f"q: {{quantize: ptq, activations: false, {AT_END}}}"
    result = case.session(f"m: {{quantize: share, bits: 3, {AT_END}}}", ptq, epochs=0).finish()
    assert values(result.model.second.weight) <= 8
    assert {r.name: r for r in result.ledger}["second.weight"].precision == "int8"


def test_several_firings_are_refused():
    with pytest.raises(RecipeError, match="weights are shared once"):
        case.session("m: {quantize: share, when: {start: 0ep, every: 1ep}}")


def test_the_onnx_artifact_holds_the_shared_values_as_floats(tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    s = case.session(f"m: {{quantize: share, bits: 3, {AT_END}}}", epochs=0)
    result = s.finish()
    artifact = gracile.export(result, "onnxruntime", tmp_path, example=case.batches(3)[0][0])
    weights = onnx.load(artifact.path).graph.initializer
    found = [onnx.numpy_helper.to_array(w) for w in weights]
    second = next(w for w in found if w.shape == (12, 8, 3, 3))
    assert len(set(second.flatten().tolist())) <= 8
