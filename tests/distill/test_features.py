"""Feature distillation in a session: which layers, what they lose, what surgery does to it."""

import distill_case as case
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.errors import BindError, RecipeError, UserError
from gracile.recipe.load import loads

FILTERS = (
    'filters: {prune: oneshot, weights: "**.inner.weight", granularity: filter, sparsity: 0.5, '
    "when: {at: 0ep}}"
)
THIN = "thin: {prune: thin, when: {at: 1ep}}"


def moved(s):
    """A student that is no longer its teacher."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in s.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return s


def by_hand(model, x):
    """What the layers of the network give, in eval mode."""
    model.eval()
    stem = model.stem(x)
    b = model.block
    inner = b.inner(stem)
    outer = b.outer(b.act(b.bn(inner)))
    out = F.relu(stem + outer)
    head = model.head(model.pool(out).flatten(1))
    return {
        "stem": stem,
        "inner": inner,
        "outer": outer,
        "add": stem + outer,
        "block": out,
        "head": head,
    }


def terms(s, **options):
    x, y = case.data(0)[0]
    mine, theirs = by_hand(s.model, x), by_hand(s.teacher, x)
    s.on_epoch_begin(0)
    hard, total = case.step(s, 0, 0, x, y, train=False, **options)
    return mine, theirs, hard, total


def test_layers_with_weights_learn_what_they_gave_before():
    s = moved(case.session("layers: {distill: features, weight: 3}"))
    mine, theirs, hard, total = terms(s)
    names = ("stem", "inner", "outer", "head")
    expected = hard + 3 * sum(F.mse_loss(mine[n], theirs[n]) for n in names)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize(
    ("at", "names"),
    [
        ("block", ["block"]),
        ("block.add", ["add"]),
        ("[block, stem]", ["block", "stem"]),
        ('"type:Conv2d"', ["stem", "inner", "outer"]),
        ('["type:Conv2d", "!stem"]', ["inner", "outer"]),
        ("{stem: block.outer, block: block.add}", [("stem", "outer"), ("block", "add")]),
        ("[block, block.relu]", ["block"]),  # one layer, whichever way it is named
    ],
)
def test_names_patterns_and_pairs_mean_layers(at, names):
    s = moved(case.session(f"f: {{distill: features, at: {at}}}"))
    mine, theirs, hard, total = terms(s)
    pairs = [n if isinstance(n, tuple) else (n, n) for n in names]
    torch.testing.assert_close(total, hard + sum(F.mse_loss(mine[a], theirs[b]) for a, b in pairs))


def test_gradients_are_those_of_the_loss_by_hand():
    s = moved(case.session("f: {distill: features, at: block.add, alpha: 0}", lr=0.0))
    x, y = case.data(0)[0]
    s.model.eval()
    theirs = by_hand(s.teacher, x)
    expected = torch.autograd.grad(
        F.mse_loss(by_hand(s.model, x)["add"], theirs["add"].detach()), s.model.stem.weight
    )[0]
    s.on_epoch_begin(0)
    case.step(s, 0, 0, x, y, train=False)
    torch.testing.assert_close(s.model.stem.weight.grad, expected)


def test_masked_weights_are_seen_masked():
    s = moved(case.session(FILTERS, "f: {distill: features, at: block.inner}"))
    x, y = case.data(0)[0]
    s.on_epoch_begin(0)
    keep = s.mask("block.inner.weight")
    assert not keep.all()
    theirs = by_hand(s.teacher, x)["inner"]
    with torch.no_grad():
        stem = s.model.stem(x)
        expected = F.mse_loss(F.conv2d(stem, s.model.block.inner.weight * keep, padding=1), theirs)
    hard, total = case.step(s, 0, 0, x, y, train=False)
    torch.testing.assert_close(total - hard, expected)


def test_the_first_stage_of_fitnets_leaves_what_lies_behind_alone():
    s = case.session(
        "hints: {distill: features, at: {block.inner: block.inner}, loss: fitnets, alpha: 0, "
        "regressor_lr: 0.01, when: {stop: 1ep}}",
        "kd: {distill: kd, when: {start: 1ep}}",
    )
    moved(s)
    (pair,) = s.methods[0].pairs
    before = {k: v.detach().clone() for k, v in s.model.state_dict().items()}
    regressor = pair.regressor.weight.detach().clone()
    case.train_epoch(s, 0)
    after = s.model.state_dict()
    assert torch.equal(before["head.weight"], after["head.weight"])
    assert torch.equal(before["block.outer.weight"], after["block.outer.weight"])
    assert not torch.equal(before["stem.weight"], after["stem.weight"])
    assert not torch.equal(regressor, pair.regressor.weight)
    assert s.terms["task"] == 0
    case.train_epoch(s, 1)
    assert not torch.equal(before["head.weight"], s.model.state_dict()["head.weight"])
    case.train_epoch(s, 2)
    result = s.finish()
    assert result.model.state_dict().keys() == before.keys()
    assert type(result.model) is case.Net
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in result.model.modules())


def test_a_regressor_learns_a_wider_teacher():
    torch.manual_seed(1)
    wide = case.Net(width=10)
    s = case.session(
        "f: {distill: features, at: block, loss: fitnets, teacher: wide, alpha: 0, "
        "regressor_lr: 0.02}",
        epochs=20,
        teachers={"wide": wide},
    )
    losses = []
    for epoch in range(s.epochs):
        case.train_epoch(s, epoch)
        losses.append(s.terms["f"])
    assert losses[-1] < 0.5 * losses[0]
    assert s.methods[0].pairs[0].regressor.weight.shape == (10, 6)


@pytest.mark.parametrize("loss", ["mse", "fitnets", "at", "rkd"])
def test_channels_cut_in_training_learn_from_those_that_are_left(loss):
    s = case.session(
        FILTERS, THIN, f"f: {{distill: features, at: [block.act, block.add], loss: {loss}}}"
    )
    case.train_epoch(s, 0)
    method = s.methods[-1]
    s.on_epoch_begin(1)
    (edit,) = s.plan.of_kind("remove")
    (keep,) = [m.keep for m in edit.group if (m.at, m.dim) == ("block.inner.weight", 0)]
    regressors = [p.regressor.weight.clone() for p in method.pairs if p.regressor]
    x, y = case.data(1)[0]
    case.step(s, 1, 0, x, y)
    assert [p.student for p in method.pairs] == ["block.act", "block.add"]
    if loss == "fitnets":
        assert method.pairs[0].regressor.weight.shape == (8, len(keep))
        assert method.pairs[1].regressor.weight.shape == regressors[1].shape
    elif loss == "mse":
        assert method.pairs[0].kept[1].tolist() == list(keep)
        assert method.pairs[1].kept == {}
    assert s.warnings == []


@pytest.mark.parametrize("loss", ["fitnets", "at", "rkd"])
def test_channels_cut_of_a_student_wider_than_its_teacher(loss):
    torch.manual_seed(1)
    s = case.session(
        FILTERS, THIN, f"f: {{distill: features, at: block.act, loss: {loss}, teacher: t}}",
        teachers={"t": case.Net(width=2)},
    )  # fmt: skip
    case.trained(s)
    assert s.terms["f"] > 0
    assert s.warnings == []


def test_after_a_cut_the_loss_is_that_of_the_masked_network_on_what_is_left():
    s = moved(case.session(FILTERS, THIN, "f: {distill: features, at: block.inner}", lr=0.0))
    case.train_epoch(s, 0)
    x, y = case.data(1)[0]
    wanted = by_hand(s.teacher, x)["inner"]
    s.on_epoch_begin(1)
    keep = list(s.plan.of_kind("remove")[0].group[0].keep)
    s.model.eval()
    got = s.model.block.inner(s.model.stem(x))
    hard, total = case.step(s, 1, 0, x, y, train=False)
    assert got.shape[1] == len(keep) < 8
    torch.testing.assert_close(total - hard, F.mse_loss(got, wanted[:, keep]))


@pytest.mark.parametrize("quantize", ["qat", "lsq", "dorefa"])
def test_a_network_that_is_trained_quantized_goes_on_learning(quantize):
    s = case.session(
        f"few: {{quantize: {quantize}, when: {{start: 1ep}}}}", "f: {distill: features, at: block}"
    )
    case.train_epoch(s, 0)
    case.train_epoch(s, 1)
    assert s.terms["f"] > 0
    assert s.methods[1].pairs
    case.train_epoch(s, 2)
    s.finish()


def test_a_block_that_is_left_out_learns_no_more_and_it_is_said():
    s = case.session(
        "depth: {prune: depth, count: 1, when: {at: 1ep}}",
        "f: {distill: features, at: [stem, block.inner]}",
    )
    case.trained(s)
    assert [p.student for p in s.methods[1].pairs] == ["stem"]
    assert ("features-left-out", "'f': nothing is learned at block.inner: of another shape than "
            "the teacher's, or no longer in the network.") in s.warnings  # fmt: skip


def test_two_entries_and_kd_share_one_forward_of_the_teacher():
    s = case.session(
        "a: {distill: features, at: stem}", "b: {distill: features, at: block}", "kd: {distill: kd}"
    )
    calls = []
    s.teacher.register_forward_hook(lambda *_: calls.append(1))
    case.train_epoch(s, 0)
    assert len(calls) == case.STEPS


def test_outside_its_span_nothing_is_read():
    s = case.session("f: {distill: features, when: {start: 1ep}}")
    case.train_epoch(s, 0)
    assert "f" not in s.terms
    case.train_epoch(s, 1)
    assert "f" in s.terms


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("at: blok", r"^r.yaml:4: 'f': 'blok' matches no layer in Net. Nearest: 'block'"),
        ("at: {blok: block}", r"^r.yaml:4: 'f': 'blok' is no layer of the student. Nearest"),
        ("at: {block: blok}", r"'blok' is no layer of the teacher 'original'. Nearest: 'block'"),
        ("at: {block: stem, stem: pool}", r"got \(2, 6, 8, 8\) of the student's 'stem' and "
         r"\(2, 6, 1, 1\) of 'pool' of the teacher 'original'. Pair layers"),
        ("at: head, loss: at", r"attention needs channels and positions"),
        ("at: '!**'", "leaves no layer"),
        ("when: {at: 1ep}", r"write when: \{start: 1ep\}"),
        ("at: 'type:LSTM'", "matches no layer"),
        ("teacher: big", r"no teacher is called 'big'"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_training(options, message):
    with pytest.raises(BindError, match=message):
        case.session(f"f: {{distill: features, {options}}}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("at: {}", r"^r.yaml:4: distill.f.at must pair layers"),
        ("at: {stem: 3}", r"distill.f.at.stem must be a layer's name, got 3"),
        ("loss: att", r"unknown feature_loss 'att'. Nearest: 'at'"),
        ("loss: {name: at, beto: 3}", r"has no key 'beto'"),
        ("teacher: [original, big]", r"distill.f.teacher must be one"),
        ("weight: 0", r"more than 0"),
        ("alpha: 2", r"in \[0, 1\]"),
    ],
)
def test_what_is_no_option_is_refused_by_the_recipe(options, message):
    with pytest.raises(RecipeError, match=message):
        case.session(f"f: {{distill: features, {options}}}")


def test_scaled_losses_do_not_reach_regressors():
    with pytest.raises(BindError, match="Use autocast: bf16"):
        case.session("f: {distill: features, loss: fitnets}", train=", autocast: fp16")


def test_networks_without_a_common_layer_are_refused():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(BindError, match="have no layer of one name"):
        case.session("f: {distill: features, teacher: t}", teachers={"t": teacher})


def test_nothing_left_and_no_task_is_an_error():
    s = case.session(
        "depth: {prune: depth, count: 1, when: {at: 1ep}}",
        "f: {distill: features, at: block.inner, alpha: 0}",
    )
    case.train_epoch(s, 0)
    with pytest.raises(UserError, match="nothing is left to train with"):
        case.train_epoch(s, 1)


def test_pairs_survive_yaml():
    text = "recipe: 1\ntrain: {epochs: 1}\nmethods:\n  f: {distill: features, at: {a: b, c: d}}\n"
    r = loads(text, name="r")
    assert loads(r.to_yaml(), name="again") == r
    assert r.methods["f"].options.at == (("a", "b"), ("c", "d"))
