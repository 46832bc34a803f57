"""`regularize: penalty` in a session: the term, the threshold, the mask at the end, the span."""

import pytest
import regularize_case as case
import torch

from gracile.errors import BindError, RecipeError
from gracile.regularize.penalties.group_lasso import group_lasso

LASSO = "penalty: group_lasso, granularity: filter"
SPARSE = f"m: {{regularize: penalty, weights: a, {LASSO}, strength: 0.05, threshold: 0.01"
WEAK = [i not in (2, 5) for i in range(8)]  # what group lasso leaves of `Plain.a`


def term(s, epoch=0, batch=0):
    s.on_epoch_begin(epoch)
    s.on_minibatch_begin(epoch, batch, case.STEPS)
    task = torch.ones((), requires_grad=True)
    return s.before_backward_pass(epoch, batch, case.STEPS, task) - task


def sparse(options="", **more):
    return case.session(f"{SPARSE}{options}}}", net=case.Plain, **more)


def filters_left(weight):
    return weight.flatten(1).ne(0).any(1)


def test_the_term_is_the_strength_times_the_sum_over_the_selected_weights():
    s = case.session(f'm: {{regularize: penalty, weights: "type:Conv2d", {LASSO}, strength: 0.5}}')
    norms = [s.parameter(f"{n}.weight").detach().flatten(1).norm(dim=1).sum() for n in "ab"]
    torch.testing.assert_close(term(s), 0.5 * sum(norms))
    assert s.terms["m"] == pytest.approx(0.5 * float(sum(norms)))


def test_what_a_mask_hides_is_not_penalized():
    s = case.session("m: {regularize: penalty, weights: a, penalty: l1, strength: 1}")
    keep = torch.ones_like(s.parameter("a.weight"), dtype=torch.bool)
    keep[:4] = False
    s.set_mask("other", "a.weight", keep)
    term(s).backward()
    grad = s.parameter("a.weight").grad
    assert torch.equal(grad[:4], torch.zeros(4, 3, 3, 3))
    assert torch.equal(grad[4:], s.parameter("a.weight")[4:].sign())


def test_outside_its_span_it_is_silent_and_weights_are_left_alone():
    s = sparse(", when: {start: 1ep, stop: 3ep}")
    with torch.no_grad():
        s.parameter("a.weight")[7] *= 1e-3
    case.train(s, 0)
    assert "m" not in s.terms
    assert filters_left(s.parameter("a.weight")).all()
    case.train(s, 1, 2)
    assert "m" in s.terms
    assert not filters_left(s.own_mask("m", "a.weight"))[7]
    case.train(s, 3)
    assert "m" not in s.terms


def test_the_strength_follows_its_ramp_once_an_epoch():
    ramp = "{ramp: linear, initial: 0, final: 3}"
    s = case.session(
        f"m: {{regularize: penalty, weights: a, penalty: l1, strength: {ramp}, "
        "when: {start: 0ep, stop: 4ep}}"
    )
    size = s.parameter("a.weight").abs().sum()
    for epoch, factor in enumerate((0, 1, 2, 3)):
        torch.testing.assert_close(term(s, epoch), factor * size)
    assert [v for _, v in s.history["strength/m"]] == [0.0, 1.0, 2.0, 3.0]


# ------------------------------------------------------------------ group lasso and its threshold


def test_group_lasso_drives_whole_filters_to_zero_which_are_masked_and_cut():
    s = case.session(
        "m: {regularize: penalty, weights: [a, b], penalty: group_lasso, strength: 0.05, "
        "threshold: 0.015, when: {start: 0ep, stop: 3ep}}",
        "thin: {prune: thin, when: {at: 3ep}}",
        net=case.Plain,
    )
    start = s.parameter("a.weight").detach().abs().flatten(1).mean(1)
    assert start.min() > 0.02  # far from the threshold
    case.train(s, 0, 1, 2)
    left = {n: filters_left(s.parameter(f"{n}.weight")) for n in "ab"}
    assert left["a"].tolist() == WEAK
    assert left["b"].all()
    assert s.own_mask("m", "a.bias").tolist() == WEAK
    assert torch.equal(s.own_mask("m", "b.weight").flatten(2).any(2), left["a"].expand(6, 8))
    before = s.model.eval()(torch.ones(1, 3, 6, 6)).detach()
    s.on_epoch_begin(3)
    assert (s.model.a.out_channels, s.model.b.out_channels) == (6, 6)
    torch.testing.assert_close(s.model.eval()(torch.ones(1, 3, 6, 6)), before)


def test_without_the_number_of_steps_the_span_ends_with_its_last_epoch():
    s = sparse(", when: {start: 0ep, stop: 3ep}", steps=None)
    masked = []
    case.train(s, 0, 1, 2, sees=lambda s: masked.extend(s.masked_by("m")))
    assert masked == []
    assert s.own_mask("m", "a.bias").tolist() == WEAK


def test_without_a_threshold_nothing_is_zero_and_nothing_masked():
    s = case.session(f"m: {{regularize: penalty, weights: a, {LASSO}, strength: 0.02}}")
    case.train(s, *range(case.EPOCHS))
    assert s.parameter("a.weight").ne(0).all()
    assert len(s.finish().plan) == 0


def test_the_threshold_acts_after_the_step_and_before_the_next_forward():
    s = sparse()
    after_step, before_forward = [], []

    def small(w):
        size = w.detach().abs().flatten(1).mean(1)
        return ((size > 0) & (size <= 0.01)).any().item()

    s.model.register_forward_pre_hook(lambda m, _: before_forward.append(small(m.a.weight)))
    case.train(s, 0, 1, 2, sees=lambda s: after_step.append(small(s.parameter("a.weight"))))
    assert any(after_step)
    assert not any(before_forward[1:])


@pytest.mark.parametrize(
    ("measure", "size"), [("mean_abs", 0.2), ("max", 0.3), ("l1", 0.4), ("l2", 0.1**0.5)]
)
@pytest.mark.parametrize(("factor", "zero"), [(1.01, True), (0.99, False)])
def test_a_group_not_above_the_threshold_becomes_zero(measure, size, factor, zero):
    s = case.session(
        "m: {regularize: penalty, weights: head, penalty: l1, granularity: row, strength: 1e-6, "
        f"threshold: {factor * size}, threshold_on: {measure}}}"
    )
    with torch.no_grad():
        s.parameter("head.weight").fill_(9.0)
        s.parameter("head.weight")[2] = torch.tensor([0.1, -0.3, 0.0, 0.0, 0.0, 0.0])
        if measure == "mean_abs":  # 0.2 of six weights
            s.parameter("head.weight")[2] = torch.tensor([0.2, -0.2, 0.2, -0.2, 0.2, -0.2])
    s.on_epoch_begin(0)
    s.on_minibatch_begin(0, 0, case.STEPS)
    s.on_minibatch_end(0, 0, case.STEPS)
    assert filters_left(s.parameter("head.weight")).tolist() == [True, True, not zero, True]


def test_threshold_strength_is_the_strength_of_the_moment():
    ramp = "{ramp: linear, initial: 0, final: 0.3}"
    s = case.session(
        f"m: {{regularize: penalty, weights: head, penalty: l1, granularity: row, strength: {ramp},"
        " threshold: strength, when: {start: 0ep}}"
    )
    with torch.no_grad():
        s.parameter("head.weight").copy_(torch.tensor([[0.05], [0.15], [0.25], [9]]).expand(4, 6))
    left = []
    for epoch in range(case.EPOCHS):
        s.on_epoch_begin(epoch)
        s.on_minibatch_begin(epoch, 0, case.STEPS)
        s.on_minibatch_end(epoch, 0, case.STEPS)
        left.append(int(filters_left(s.parameter("head.weight")).sum()))
    assert left == [4, 3, 2, 1]


def test_zeroed_filters_stay_zero_against_the_momentum_that_is_left():
    s = sparse(momentum=0.95)
    case.train(s, 0, 1, 2)
    assert filters_left(s.parameter("a.weight")).tolist() == WEAK
    moved = []
    case.train(s, 3, sees=lambda s: moved.append(filters_left(s.parameter("a.weight")).all()))
    assert any(moved)  # the step moves them, the threshold puts them back
    assert filters_left(s.parameter("a.weight")).tolist() == WEAK


def test_keep_mask_false_leaves_zeros_but_no_mask():
    s = case.train(sparse(", keep_mask: false"), *range(case.EPOCHS))
    result = s.finish()
    assert filters_left(result.model.a.weight).tolist() == WEAK
    assert len(result.plan) == 0


def test_the_mask_is_told_in_the_plan_and_the_curve():
    s = case.train(sparse(), *range(case.EPOCHS))
    result = s.finish()
    edits = {e.at: e for e in result.plan.of_kind("mask")}
    assert set(edits) == {"a.weight", "a.bias", "b.weight"}
    assert edits["a.weight"].sparsity == pytest.approx(0.25)
    assert result.tensors["a.bias.mask"].tolist() == WEAK
    assert s.history["zero-groups/m"][-1] == (4.0, 0.25)


def test_training_that_ends_inside_the_span_keeps_its_zeros():
    s = case.train(sparse(), 0, 1, 2)
    assert s.masked_by("m") == []
    assert s.finish().tensors["a.bias.mask"].tolist() == WEAK


@pytest.mark.parametrize("resumed", [False, True])
def test_after_the_span_the_mask_stays_whatever_the_stored_weights_do(resumed):
    s = case.train(sparse(", when: {start: 0ep, stop: 3ep}"), 0, 1, 2)
    with torch.no_grad():
        s.parameter("a.weight")[2] = 1.0
    if resumed:
        state, s = s.state_dict(), sparse(", when: {start: 0ep, stop: 3ep}")
        s.load_state_dict(state)
    result = s.finish()
    assert filters_left(result.tensors["a.weight.mask"]).tolist() == WEAK
    assert filters_left(result.model.a.weight).tolist() == WEAK


def test_what_another_mask_hides_keeps_its_stored_values():
    s = sparse()
    keep = torch.ones_like(s.parameter("a.weight"), dtype=torch.bool)
    keep[2] = False
    s.set_mask("other", "a.weight", keep)
    case.train(s, *range(case.EPOCHS))
    assert s.parameter("a.weight")[2].ne(0).all()
    assert s.own_mask("m", "a.bias").nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 6, 7]


# ------------------------------------------------------------------ whole channels


def zero_and_finish(s, **rows):
    """The last mini-batch of training, with some slices zero: {weight: (dim, indices)}."""
    with torch.no_grad():
        for name, (dim, index) in rows.items():
            s.parameter(f"{name}.weight").index_fill_(dim, torch.tensor(index), 0.0)
    s.on_epoch_begin(case.EPOCHS - 1)
    s.on_minibatch_begin(case.EPOCHS - 1, case.STEPS - 1, case.STEPS)
    s.on_minibatch_end(case.EPOCHS - 1, case.STEPS - 1, case.STEPS)
    return s


def test_a_channel_nobody_reads_is_masked_as_a_whole_and_changes_nothing():
    s = case.session(
        "m: {regularize: penalty, weights: b, penalty: group_lasso, granularity: channel, "
        "strength: 1e-6, threshold: 1e-6}",
    )
    with torch.no_grad():
        s.parameter("b.weight")[:, [1, 5]] = 0.0
    x = torch.randn(2, 3, 6, 6)
    before = s.model.eval()(x).detach()
    zero_and_finish(s)
    assert (~filters_left(s.own_mask("m", "a.weight"))).nonzero().flatten().tolist() == [1, 5]
    torch.testing.assert_close(s.model.eval()(x), before)


def test_a_filter_of_a_residual_stream_goes_only_with_all_that_write_its_channel():
    s = case.session(
        f"m: {{regularize: penalty, weights: [a, b], {LASSO}, strength: 1e-6, threshold: 1e-6}}",
        net=case.Residual,
    )
    zero_and_finish(s, a=(0, [1, 2]), b=(0, [2, 6]))
    assert (~s.own_mask("m", "norm.bias")).nonzero().flatten().tolist() == [2]
    assert (~filters_left(s.own_mask("m", "a.weight"))).nonzero().flatten().tolist() == [1, 2]
    notes = {n[0]: n[4] for n in s.notes if n[5] == "m"}
    assert notes == dict.fromkeys(
        ("a.weight", "b.weight"),
        "1 zero filters cannot be cut: other layers still make these channels",
    )


def test_layers_that_write_a_part_of_the_channels_decide_about_that_part():
    s = case.session(
        f"m: {{regularize: penalty, weights: [a, b, c], {LASSO}, strength: 1e-6, threshold: 1e-6}}",
        net=case.Half,
    )
    zero_and_finish(s, a=(0, [1, 2]), b=(0, [2]), c=(0, [1, 3, 6]))
    read = s.own_mask("m", "head.weight").all(0)
    assert (~read).nonzero().flatten().tolist() == [1, 6]
    notes = {n[0]: n[4].partition(":")[0] for n in s.notes if n[5] == "m"}
    assert notes == dict.fromkeys(("a.weight", "c.weight"), "1 zero filters cannot be cut")


def test_a_protected_channel_is_noted_and_only_its_weight_is_masked():
    s = case.session(
        "m: {regularize: penalty, weights: head, penalty: group_lasso, strength: 1e-6, "
        "threshold: 1e-6}"
    )
    zero_and_finish(s, head=(0, [3]))
    assert s.own_mask("m", "head.bias").all()
    assert not s.own_mask("m", "head.weight")[3].any()
    assert [n[4] for n in s.notes if n[0] == "head.weight"] == [
        "1 zero filters cannot be cut: it is an output of the model"
    ]


def test_a_layer_without_anything_left_is_a_warning():
    s = case.session(
        "m: {regularize: penalty, weights: b, penalty: group_lasso, granularity: layer, "
        "strength: 1e-6, threshold: 1e-6}",
        net=case.Residual,
    )
    zero_and_finish(s, b=(0, list(range(8))))
    assert ("layer-is-zero", "'m': nothing is left of 'b.weight'.") in s.warnings
    assert not s.own_mask("m", "b.weight").any()


def test_of_a_layer_that_is_zero_one_channel_stays_for_the_cut():
    s = case.session(
        f"m: {{regularize: penalty, weights: a, {LASSO}, strength: 1e-6, threshold: 1e-6}}"
    )
    zero_and_finish(s, a=(0, list(range(8))))
    assert not s.own_mask("m", "a.weight").any()
    assert s.own_mask("m", "norm.bias").sum() == 1
    assert [n[4] for n in s.notes if n[0] == "a.weight"] == [
        "1 zero filters cannot be cut: a layer keeps one channel"
    ]


# ------------------------------------------------------------------ stop, resume, cut


def test_resumed_goes_on_with_the_strength_of_the_last_firing():
    text = (
        "m: {regularize: penalty, weights: a, penalty: l1, "
        "strength: {ramp: linear, initial: 1, final: 3}, when: {start: 0ep, every: 2ep}}"
    )
    state = case.train(case.session(text), 0, 1, 2).state_dict()
    s = case.session(text)
    s.load_state_dict(state)
    size = s.parameter("a.weight").detach().abs().sum()
    torch.testing.assert_close(term(s, 3).detach(), 3 * size)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumed_equals_uninterrupted_across_ramp_threshold_and_mask(stop):
    methods = (
        "m: {regularize: penalty, weights: [a, b], penalty: group_lasso, threshold: 0.015, "
        "strength: {ramp: linear, initial: 0.05, final: 0.1}, when: {start: 0ep, stop: 3ep}}",
        "thin: {prune: thin, when: {at: 3ep}}",
    )
    whole = case.train(case.session(*methods, net=case.Plain), *range(case.EPOCHS))
    first = case.train(case.session(*methods, net=case.Plain), *range(stop))
    second = case.session(*methods, net=case.Plain)
    second.load_state_dict(first.state_dict())
    case.train(second, *range(stop, case.EPOCHS))
    a, b = whole.finish(), second.finish()
    assert a.plan == b.plan
    assert a.plan.of_kind("remove")
    case.assert_same(a.model.state_dict(), b.model.state_dict())
    assert a.history == b.history


def test_it_follows_a_cut_in_mid_training():
    s = case.session(
        f"m: {{regularize: penalty, weights: [a, b], {LASSO}, strength: 0.01, threshold: 1e-6}}",
        "cut: {prune: structure, ratio: 0.5, when: {at: 1ep}}",
    )
    case.train(s, 0)
    s.on_epoch_begin(1)
    s.on_minibatch_begin(1, 0, case.STEPS)
    task = torch.zeros((), requires_grad=True)
    got = s.before_backward_pass(1, 0, case.STEPS, task)
    want = sum(
        group_lasso(w, torch.arange(len(w)).reshape(-1, 1, 1, 1).expand(w.shape))
        for w in (s.model.a.weight, s.model.b.weight)
    )
    assert s.model.a.out_channels < 8
    torch.testing.assert_close(got, 0.01 * want)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("weights: a, penalty: l1, strength: 0", "strength must be more than 0, got 0"),
        ("weights: a, penalty: l3, strength: 1", "unknown penalty 'l3'"),
        ("weights: a, penalty: {name: lp, q: 1}, strength: 1", "no key 'q'. Known: eps, p"),
        (
            "weights: a, penalty: l1, strength: {ramp: linear, final: 0}",
            "final must be more than 0",
        ),
        (
            "weights: a, penalty: l1, strength: {ramp: linear, initial: -1, final: 1}",
            "initial must be a number, not below 0, got -1",
        ),
        ("weights: a, penalty: l1, strength: {ramp: linear, final: 1}", "ramp .* needs 'when'"),
        ("weights: a, penalty: l1, strength: {ramp: linear}", "needs 'final'"),
        ("weights: a, penalty: l1, strength: 1, threshold: low", "'none' or 'strength' or a num"),
        ("weights: a, penalty: l1, strength: 1, threshold: 0", "more than 0, got 0"),
        ("weights: a, penalty: l1, strength: 1, threshold_on: min", "'mean_abs', 'max'"),
        ("weights: a, strength: 1", "needs 'penalty'|penalty"),
    ],
)
def test_wrong_options_are_refused_with_their_line(options, text):
    with pytest.raises(RecipeError, match=rf"^r.yaml:4: .*{text}"):
        case.recipe(f"m: {{regularize: penalty, {options}}}")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("weights: c, penalty: l1, strength: 1", "'c' matches no tensor"),
        ("weights: a, penalty: l1, strength: 1, when: {at: 1ep}", r"write when: \{start: 1ep\}"),
        ("weights: a, penalty: l1, strength: 1, when: {at: end}", "'m': .*; leave it out"),
        (
            "weights: a, penalty: {name: lp, p: 0.0}, strength: 1",
            r"'m': penalty lp does not fit 'a.weight' .*: p and eps must be > 0",
        ),
        (
            "weights: b, penalty: l1, strength: 1, granularity: {name: block, channels: 3}",
            r"'m': granularity block does not fit 'b.weight' of shape \(6, 8, 3, 3\): a block of",
        ),
        (
            "weights: norm, penalty: l1, strength: 1, granularity: channel",
            r"'m': granularity channel does not fit 'norm.weight' of shape \(8,\)",
        ),
        (
            "weights: a, penalty: group_variance, strength: 1, granularity: layer",
            "penalty group_variance does not fit .* at least two groups",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_training(options, text):
    with pytest.raises(BindError, match=rf"^r.yaml:4: .*{text}"):
        case.session(f"m: {{regularize: penalty, {options}}}")


def test_without_training_it_is_refused():
    with pytest.raises(BindError, match=r"acts during training, but train\.epochs is 0"):
        case.session("m: {regularize: penalty, weights: a, penalty: l1, strength: 1}", epochs=0)
