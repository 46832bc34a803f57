"""The Session: six call-backs or three short forms, timetables kept, learning rates as written."""

import math

import pytest
import torch
import train_case as case
from torch.nn import functional as F

from gracile.core.plan import Mask, Remove
from gracile.errors import BindError, GracileError, UserError
from gracile.recipe.load import loads
from gracile.train.session import Session

EVERYTHING = (case.FILTERS, case.THIN, case.ELEMENTS, case.KD, case.PTQ)


@pytest.mark.parametrize("methods", [(), (case.KD,), EVERYTHING], ids=["none", "kd", "everything"])
def test_short_forms_equal_the_six_call_backs(methods):
    long = case.by_callbacks(case.session(*methods))
    short = case.by_short_forms(case.session(*methods))
    assert long.plan == short.plan
    case.assert_same(long.model.state_dict(), short.model.state_dict())
    case.assert_same(long.tensors, short.tensors)
    assert long.history == short.history


def test_without_methods_it_trains_as_a_plain_loop():
    plain = case.net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(case.EPOCHS):
        torch.manual_seed(epoch)
        plain.train()
        for x, y in case.Batches():
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
    result = case.by_callbacks(case.session())
    case.assert_same(result.model.state_dict(), plain.state_dict())
    assert len(result.plan) == 0


def test_short_forms_accumulate_as_the_recipe_says():
    """Two half batches a step: the same gradient as one whole batch (no BatchNorm, no dropout)."""

    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, case.CLASSES))

    whole, halves = net(), net()
    sgd = torch.optim.SGD(whole.parameters(), lr=0.05, momentum=0.9)
    s = Session(
        halves,
        case.recipe(train="{epochs: 1, accumulate: 2}"),
        torch.optim.SGD(halves.parameters(), lr=0.05, momentum=0.9),
        example=torch.zeros(2, 3, 8, 8),
        steps_per_epoch=2 * case.STEPS,
    )
    with s.epoch():
        for x, y in case.Batches():
            sgd.zero_grad()
            F.cross_entropy(whole(x), y).backward()
            sgd.step()
            for part in (slice(0, 4), slice(4, 8)):
                s.loss(F.cross_entropy(s.model(x[part]), y[part])).backward()
                s.step()
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_epoch_that_ends_in_mid_accumulation_still_steps():
    model = case.net()
    s = Session(
        model,
        case.recipe(train="{epochs: 1, accumulate: 3}"),
        torch.optim.SGD(model.parameters(), lr=0.1),
        example=torch.zeros(2, 3, 8, 8),
        steps_per_epoch=4,
    )
    seen = []
    with s.epoch():
        for x, y in case.Batches():
            before = model.head.bias.clone()
            s.loss(F.cross_entropy(s.model(x), y)).backward()
            s.step()
            seen.append(not torch.equal(before, model.head.bias))
    assert seen == [False, False, True, True]


# ------------------------------------------------------------------ learning rates


def rates(train: str, **options) -> list[float]:
    s = case.session(train=train, **options)
    seen = []
    real = s.optimizer.step
    s.optimizer.step = lambda: (seen.append(s.optimizer.param_groups[0]["lr"]), real())[1]
    case.by_callbacks(s)
    return seen


def test_cosine_per_step_is_the_closed_form():
    total = case.EPOCHS * case.STEPS
    train = "{epochs: 3, lr: {class: CosineAnnealingLR, interval: step}}"
    want = [0.05 * (1 + math.cos(math.pi * t / total)) / 2 for t in range(total)]
    assert rates(train) == pytest.approx(want, rel=1e-12)


def test_step_lr_counts_epochs():
    train = "{epochs: 3, lr: {class: StepLR, step_size: 1, gamma: 0.5}}"
    assert rates(train) == pytest.approx([0.05] * 4 + [0.025] * 4 + [0.0125] * 4)


def test_one_cycle_equals_torchs_scheduler_and_cycles_momentum():
    model = case.net()
    mine = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    s = case.session(
        model=model, optimizer=mine, train="{epochs: 3, lr: {class: OneCycleLR, max_lr: 0.2}}"
    )
    parameter = torch.nn.Parameter(torch.zeros(1))
    other = torch.optim.SGD([parameter], lr=0.05, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(other, max_lr=0.2, total_steps=12)
    for epoch in range(3):
        s.on_epoch_begin(epoch)
        for batch in range(case.STEPS):
            s.on_minibatch_begin(epoch, batch, case.STEPS)
            for key in ("lr", "momentum"):
                assert mine.param_groups[0][key] == pytest.approx(
                    other.param_groups[0][key], rel=1e-12
                )
            other.step()
            if (epoch, batch) != (2, 3):
                theirs.step()


def test_groups_keep_their_ratio():
    model = case.net()
    groups = [
        {"params": model.stem.parameters(), "lr": 0.1},
        {"params": model.head.parameters(), "lr": 0.01},
    ]
    s = case.session(
        model=model,
        optimizer=torch.optim.SGD(groups, lr=0.1),
        train="{epochs: 3, lr: {class: ExponentialLR, gamma: 0.1}}",
    )
    s.on_epoch_begin(1)
    s.on_minibatch_begin(1, 0, case.STEPS)
    assert [g["lr"] for g in s.optimizer.param_groups] == pytest.approx([0.01, 0.001])


def test_a_step_of_accumulated_batches_counts_once_for_the_schedule():
    s = case.session(
        train="{epochs: 1, accumulate: 2, lr: {class: LinearLR, start_factor: 1.0, "
        "end_factor: 0.5, total_iters: 2, interval: step}}"
    )
    s.on_epoch_begin(0)
    seen = []
    for batch in range(case.STEPS):
        s.on_minibatch_begin(0, batch, case.STEPS)
        seen.append(s.optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([0.05, 0.05, 0.0375, 0.0375])


# ------------------------------------------------------------------ the end, and what is refused


@pytest.mark.parametrize(
    ("methods", "epochs", "text"),
    [
        ((case.FILTERS,), 1, r"'filters' fired 1 of 2 times"),
        ((case.FILTERS, case.THIN), 2, r"'thin' fired 0 of 1 times"),
        (("q: {quantize: qat, when: {start: 1ep}}",), 1, r"'q' fired 0 of"),
    ],
)
def test_finishing_before_the_timetable_ended_is_an_error(methods, epochs, text):
    s = case.session(*methods)
    with pytest.raises(GracileError, match=text + r".*before its timetable did.* 3 epochs"):
        case.by_callbacks(s, epochs=epochs)


def test_several_times_at_the_end_go_in_turns(monkeypatch):
    fired = []
    one = Session._fire_one
    monkeypatch.setattr(
        Session, "_fire_one", lambda s, m, p: (fired.append((m.id, p)), one(s, m, p))
    )
    ramp = "{ramp: linear, initial: 0.25, final: 0.75}"
    model = case.net()
    dense = sum(p.numel() for p in model.parameters())
    s = Session(
        model,
        case.recipe(
            f"cut: {{prune: structure, ratio: {ramp}, when: {{at: end, times: 3}}}}",
            "again: {recover: batch_norm, when: {at: end, times: 2}}",
            "int8: {quantize: ptq, when: {at: end}}",
            train="{epochs: 0}",
        ),
        example=torch.zeros(2, 3, 8, 8),
        calibration=[x for x, _ in case.Batches()],
    )
    result = s.finish()
    assert fired == [
        ("cut", 0.0),
        *(("cut", 0.5), ("again", 0.0)),
        *(("cut", 1.0), ("again", 1.0), ("int8", 1.0)),
    ]
    assert sum(p.numel() for p in result.model.parameters()) < 0.5 * dense
    assert len({e.at for e in result.plan.of_kind("bits") if e.role == "weight"}) >= 3


def test_finishing_twice_is_an_error():
    s = case.session()
    case.by_callbacks(s)
    with pytest.raises(UserError, match="called before"):
        s.finish()


def test_a_loop_of_another_length_is_refused():
    s = case.session()
    s.on_epoch_begin(0)
    with pytest.raises(UserError, match=r"made for 4 mini-batches per epoch, the loop has 5"):
        s.on_minibatch_begin(0, 0, 5)


def test_epoch_and_step_say_what_they_need():
    model = case.net()
    s = Session(model, case.recipe(), None, example=torch.zeros(2, 3, 8, 8))
    with pytest.raises(UserError, match="steps_per_epoch"), s.epoch():
        pass
    with pytest.raises(UserError, match="needs an optimizer"):
        s.step()


def test_calibration_may_come_at_the_end():
    model = case.net()
    s = Session(model, case.recipe(train="{epochs: 0}"), example=torch.zeros(2, 3, 8, 8))
    assert len(s.finish(calibration=[torch.zeros(2, 3, 8, 8)]).plan) == 0
    with pytest.raises(BindError, match=r"r\.yaml:5: 'int8' .*needs calibration data"):
        Session(model, case.recipe(case.PTQ, train="{epochs: 0}"), example=torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("methods", "text"),
    [
        (("a: {prune: oneshot, weights: nope, sparsity: 0.5, when: {at: 0ep}}",), "5: 'a': 'nope'"),
        (("a: {prune: thin, when: {at: 9ep}}",), "5: 'a': when .* never fires in 3 epoch"),
        ((case.KD, "b: {distill: kd, when: {at: 1ep}}"), "6: 'b': distillation acts over a span"),
        (
            (case.PTQ, "b: {quantize: ptq}"),
            r"6: 'int8' \(line 5\) and 'b' \(line 6\) both set bits",
        ),
        (
            (case.PTQ, "b: {quantize: qat, when: {start: 1ep}, after: int9}"),
            "6: 'b': after must name an entry before it, got 'int9'. Nearest: 'int8'",
        ),
        (
            ("b: {quantize: ptq, after: later}", "later: {quantize: qat, when: {start: 1ep}}"),
            "5: 'b': after must name an entry before it, got 'later'. There is none",
        ),
        (("b: {quantize: ptq, profile: tpu}",), "5: 'b': .*tpu"),
    ],
)
def test_what_cannot_be_bound_is_refused_with_file_and_line(methods, text):
    model = case.net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"^r\.yaml:{text}"):
        case.session(*methods, model=model)
    case.assert_same(before, model.state_dict())  # and no overlay is left behind


def test_a_refused_model_can_be_used_again():
    model = case.net()
    bad = "b: {quantize: ptq, weights: nope}"
    with pytest.raises(BindError):
        case.session(case.ELEMENTS, bad, model=model)
    assert not model._forward_hooks
    assert case.by_callbacks(case.session(case.ELEMENTS, model=model)).plan.of_kind("mask")


def test_a_schedule_that_ends_too_early_is_refused_and_leaves_the_model_alone():
    model = case.net()
    train = "{epochs: 3, lr: {class: OneCycleLR, max_lr: 0.1, total_steps: 5}}"
    with pytest.raises(BindError, match=r"^r\.yaml:3: train\.lr: OneCycleLR ends after 5 steps"):
        case.session(case.ELEMENTS, model=model, train=train)
    assert not model._forward_hooks


def test_a_recipe_made_in_python_is_named_by_its_entry():
    from gracile.recipe.schema import Recipe

    recipe = Recipe.build(
        train={"epochs": 1},
        methods={"m": {"prune": "oneshot", "weights": "x", "sparsity": 0.5, "when": {"at": "0ep"}}},
    )
    with pytest.raises(BindError, match=r"^<python>: 'm': 'x' matches no tensor"):
        Session(case.net(), recipe, example=torch.zeros(2, 3, 8, 8), steps_per_epoch=1)


# ------------------------------------------------------------------ what methods see


def test_curves_carry_the_moment():
    s = case.session(case.FILTERS)
    case.by_callbacks(s)
    assert s.history["sparsity/filters"] == [(0.0, pytest.approx(0.1)), (1.0, pytest.approx(0.5))]


def test_masks_of_two_methods_intersect():
    s = case.session()
    a = torch.ones(case.CLASSES, 8, dtype=torch.bool)
    b = a.clone()
    a[0], b[:, 0] = False, False
    s.set_mask("a", "head.weight", a)
    s.set_mask("b", "head.weight", b)
    assert torch.equal(s.mask("head.weight"), a & b)
    assert torch.equal(s.own_mask("a", "head.weight"), a)
    assert [e.sparsity for m in "ab" for e in s.mask_edits(m)] == [0.25, 0.125]
    effective = s.overlays.effective("head.weight")
    assert torch.equal(effective != 0, a & b)
    assert bool((s.parameter("head.weight") != 0).all())  # stored as it was


def test_generators_differ_by_purpose_and_repeat():
    s, again = case.session(), case.session()
    draw = [torch.rand(3, generator=x.generator(p, 1)).tolist() for x in (s, again) for p in "ab"]
    assert draw[0] == draw[2] != draw[1] == draw[3]


def test_a_warning_is_kept_once():
    s = case.session()
    s.warn("a", "text")
    s.warn("a", "text")
    s.warn("a", "other")
    assert s.warnings == [("a", "text"), ("a", "other")]


def test_a_stored_state_of_another_network_is_refused():
    state = case.session().state_dict()
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    s = Session(other, case.recipe(), example=torch.zeros(2, 3, 8, 8))
    with pytest.raises(UserError, match="another network"):
        s.load_state_dict(state)


def test_edits_come_in_order_of_kind_with_numbered_ids():
    result = case.by_callbacks(case.session(*EVERYTHING))
    kinds = [e.kind for e in result.plan]
    assert kinds == sorted(kinds, key=["remove", "mask", "bits"].index)
    assert [e.id for e in result.plan] == [f"e{i}" for i in range(len(kinds))]
    assert {type(e) for e in result.plan} >= {Remove, Mask}
    assert {e.by for e in result.plan} == {"thin", "few", "int8"}


def test_a_loop_of_ones_own_is_told_that_it_ignores_the_accuracy_asked_for():
    recipe = loads(
        "recipe: 1\naccuracy: {mode: early_exit, max_drop: 1}\ntrain: {epochs: 1}\n"
        "methods:\n  m: {prune: oneshot, weights: '0', sparsity: 0.5, when: {at: 0ep}}\n",
        name="r.yaml",
    )
    model = torch.nn.Sequential(torch.nn.Linear(4, 2))
    s = Session(model, recipe, example=torch.zeros(2, 4), steps_per_epoch=1)
    s.on_epoch_begin(0)
    assert [code for code, _ in s.finish().warnings] == ["accuracy-ignored"]
