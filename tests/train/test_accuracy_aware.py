"""Accuracy-aware training, with validation labels made so that the accuracy is known by hand."""

import pytest
import torch
import train_case as case
from hypothesis import given, settings
from hypothesis import strategies as st

import gracile
from gracile.benchmark.processor import sums_saturate
from gracile.errors import BindError, RecipeError, UserError
from gracile.recipe.load import loads
from gracile.train.accuracy_aware import AccuracyAware
from gracile.train.loop import make_optimizer
from gracile.train.session import Session

N = 40
X = torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(3))
RAMP = "sparsity: {{ramp: linear, initial: 0, final: {}}}, when: {{start: 0ep, stop: 3ep}}"
MASK = "mask: {{prune: gradual, weights: head, scores_from: dense, " + RAMP + "}}"


class Run:
    """Sessions of one recipe; a session's accuracy on the validation data is `rule(session)`."""

    def __init__(self, rule, *methods, accuracy, epochs=3):
        lines = "".join(f"  {m}\n" for m in methods)
        text = f"recipe: 1\ntrain: {{epochs: {epochs}}}\naccuracy: {accuracy}\nmethods:\n{lines}"
        self.recipe, self.rule = loads(text, name="r.yaml"), rule
        self.sessions, self.started = [], False

    def make(self):
        model = case.net()
        self.sessions.append(
            Session(
                model,
                self.recipe,
                make_optimizer(model, self.recipe.train),
                example=X[:2],
                steps_per_epoch=case.STEPS,
                calibration=[X[:8]],
            )
        )
        return self.sessions[-1]

    def val(self):
        s = self.sessions[-1]
        share = self.rule(s) if self.started else 1.0
        self.started = True
        with torch.no_grad():
            y = s.model.eval()(X).argmax(1)
        wrong = torch.arange(N) >= round(share * N)
        return [(X, torch.where(wrong, (y + 1) % case.CLASSES, y))]

    def fit(self):
        return AccuracyAware(self.make, case.Batches(), val=self.val, progress=False).fit()


def masked(s):
    keep = s.mask("head.weight")
    return 0.0 if keep is None else 1 - float(keep.float().mean())


def tried(s):
    return [round(v, 4) for _, v in s.history["accuracy/level"]]


# ------------------------------------------------------------------ early exit


EARLY = "{{mode: early_exit, max_drop: {}}}"


def planned(*shares):
    return lambda s: shares[s.epoch_number]


def test_training_stops_at_the_first_epoch_within_the_drop():
    shares = planned(0.5, 0.6, 0.85, 0.9, 1.0)
    s = Run(shares, MASK.format(0.5), accuracy=EARLY.format(10), epochs=5).fit()
    assert s.epochs == 4
    assert [v for _, v in s.history["val_top1"]] == [0.5, 0.6, 0.85, 0.9]
    assert not s.warnings
    assert masked(s) == 0.5
    assert s.finish().plan.of_kind("mask")[0].sparsity == 0.5


def test_an_epoch_before_the_last_level_does_not_count():
    run = Run(lambda s: 1.0, MASK.format(0.5), accuracy=EARLY.format(1), epochs=4)
    assert run.fit().epochs == 3


def test_the_drop_may_be_relative():
    accuracy = "{mode: early_exit, max_drop: 10, relative: true}"
    run = Run(planned(0.0, 0.0, 0.4, 0.45), MASK.format(0.5), accuracy=accuracy, epochs=4)
    run.started, run.rule = True, lambda s, later=run.rule: later(s) if s.fired["mask"] else 0.5
    assert run.fit().epochs == 4  # 0.5 * 0.9 = 0.45


def test_without_success_the_most_accurate_epoch_comes_back():
    weights = {}

    def rule(s):
        weights[s.epoch_number] = s.parameter("stem.weight").detach().clone()
        return (0.9, 0.9, 0.3, 0.7, 0.6)[s.epoch_number]

    run = Run(rule, MASK.format(0.5), accuracy=EARLY.format(5), epochs=5)
    s = run.fit()
    assert s.epochs == 4
    assert torch.equal(s.parameter("stem.weight"), weights[3])
    assert any(code == "accuracy-missed" and "70.00%" in text for code, text in s.warnings)
    s.finish()


# ------------------------------------------------------------------ adaptive


ADAPTIVE = "{{mode: adaptive, max_drop: {}, patience: 1}}"


def level(s):
    return s.methods[0].options.sparsity.final if s.fired["mask"] else 0.0


@pytest.mark.parametrize(
    ("final", "levels"),
    [
        # the accuracy is 1 - level: 0.3 is the highest level within 30 points
        (0.1, [0.1, 0.2, 0.3, 0.4, 0.35, 0.325]),
        (0.5, [0.5, 0.4, 0.3, 0.35, 0.325]),
    ],
)
def test_the_level_rises_while_the_accuracy_holds_and_the_step_shrinks(final, levels):
    s = Run(lambda s: 1 - level(s), MASK.format(final), accuracy=ADAPTIVE.format(30)).fit()
    assert tried(s) == levels
    assert s.methods[0].options.sparsity.final == 0.3
    assert masked(s) == pytest.approx(9 / 32)  # floor(0.3 * 32) of the head's weights
    assert not s.warnings
    s.finish()


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([5, 20, 45, 70]), st.sampled_from([0.1, 0.3, 0.6]))
def test_the_level_found_holds_and_one_smallest_step_more_does_not(drop, final):
    s = Run(lambda s: 1 - level(s), MASK.format(final), accuracy=ADAPTIVE.format(drop)).fit()
    found = level(s)
    steps = round(drop / 2.5)  # 40 samples: the accuracy has steps of 2.5 points
    if found >= 0.05 and not s.warnings:
        assert round(40 * (1 - found)) >= 40 - steps
        assert round(40 * (1 - found - 0.025)) < 40 - steps or found + 0.025 > 0.95
    else:
        assert drop == 5


def test_what_failed_leaves_no_trace():
    states, epochs = {}, {}

    def rule(s):
        level = s.methods[0].options.sparsity.final
        states[level] = {k: v.clone() for k, v in s.model.state_dict().items()}
        epochs.setdefault(level, []).append(len(s.history.get("val_top1", [])))
        return 1.0 if level <= 0.25 else 0.0

    s = Run(rule, MASK.format(0.25), accuracy="{mode: adaptive, max_drop: 5, patience: 2}").fit()
    assert tried(s) == [0.25, 0.35, 0.3, 0.275]
    assert [epochs[level] for level in (0.35, 0.3, 0.275)] == [[3, 4]] * 3  # all from epoch 3
    case.assert_same(dict(s.model.state_dict()), states[0.25])
    assert masked(s) == 0.25


def test_each_failure_halves_the_learning_rate_of_the_next_try():
    rates = []

    def rule(s):
        rates.append(s.optimizer.param_groups[0]["lr"])
        return 1.0 if s.methods[0].options.sparsity.final <= 0.25 else 0.0

    Run(rule, MASK.format(0.25), accuracy=ADAPTIVE.format(5)).fit()
    assert sorted(set(rates), reverse=True) == [0.01, 0.005, 0.0025]


def test_cuts_are_taken_back_as_well():
    def width(s):
        return dict(s.model.named_modules())["inner"].out_channels

    structure = "cut: {prune: structure, ignore: stem, ratio: 0.25, when: {at: 0ep}}"
    accuracy = "{mode: adaptive, max_drop: 50, step: 0.25, min_step: 0.2, patience: 1}"
    s = Run(lambda s: width(s) / 12, structure, accuracy=accuracy, epochs=1).fit()
    assert tried(s) == [0.25, 0.5, 0.75]
    assert width(s) == 6
    result = s.finish()
    assert result.model(X[:2]).shape == (2, case.CLASSES)
    assert len(result.plan.of_kind("remove")) == 2


def test_quantization_beside_it_goes_back_too():
    def rule(s):
        return 1.0 if s.methods[0].options.sparsity.final <= 0.25 else 0.0

    qat = "int8: {quantize: qat, when: {start: 0ep}}"
    s = Run(rule, MASK.format(0.25), qat, accuracy=ADAPTIVE.format(5)).fit()
    result = s.finish()
    assert {e.bits for e in result.plan.of_kind("bits")} == {8, 8 - sums_saturate()}
    assert result.plan.of_kind("mask")[0].sparsity == 0.25


def test_no_level_at_all_is_told():
    s = Run(lambda s: 0.0, MASK.format(0.15), accuracy=ADAPTIVE.format(5)).fit()
    assert tried(s) == [0.15, 0.05]
    assert [code for code, _ in s.warnings] == ["accuracy-missed"]


def test_the_entry_may_be_named():
    other = "other: {prune: oneshot, weights: inner, sparsity: 0.5, when: {at: 0ep}}"
    accuracy = "{mode: adaptive, max_drop: 100, method: mask, patience: 1, max_level: 0.3}"
    s = Run(lambda s: 0.5, MASK.format(0.2), other, accuracy=accuracy).fit()
    levels = {m.id: m.options.sparsity.final for m in s.methods}
    assert levels == {"mask": 0.3, "other": 0.5}


# ------------------------------------------------------------------ what is refused, and the API


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: 0}\naccuracy: {mode: early_exit, max_drop: 1}", r"s:3: accuracy.*epochs"),
        ("train: {epochs: 1}\naccuracy: {mode: early_exit}", "needs 'max_drop'"),
        ("train: {epochs: 1}\naccuracy: {mode: early, max_drop: 1}", "Nearest: 'early_exit'"),
        (
            "train: {epochs: 1}\naccuracy: {mode: adaptive, max_drop: 1, method: no}",
            "accuracy.method must name an entry, got 'no'",
        ),
    ],
)
def test_wrong_recipes_are_refused_with_their_line(text, message):
    with pytest.raises(RecipeError, match=message):
        loads(f"recipe: 1\n{text}\n", name="s")


def test_a_recipe_with_it_is_written_and_read_back():
    recipe = Run(None, MASK.format(0.2), accuracy=ADAPTIVE.format(5)).recipe
    assert loads(recipe.to_yaml()) == recipe
    built = gracile.Recipe.build(
        train={"epochs": 1}, accuracy={"mode": "early_exit", "max_drop": 1.0}
    )
    assert built.accuracy.patience == 3


def test_what_cannot_be_varied_is_refused():
    run = Run(lambda s: 1.0, case.KD, accuracy=ADAPTIVE.format(5))
    with pytest.raises(BindError, match="use mode: early_exit"):
        run.fit()
    accuracy = "{mode: adaptive, max_drop: 1, method: kd}"
    run = Run(lambda s: 1.0, MASK.format(0.2), case.KD, accuracy=accuracy)
    with pytest.raises(BindError, match=r"'kd' has no level to vary\. Known: mask"):
        run.fit()


def test_compress_does_it_on_a_copy():
    model = case.net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    accuracy = "{mode: adaptive, max_drop: 100, max_level: 0.5}"
    recipe = Run(None, MASK.format(0.25), accuracy=accuracy).recipe
    loader = list(case.Batches())
    with pytest.raises(UserError, match="goes by validation data"):
        gracile.compress(model, recipe, example=X[:2], train=loader)
    result = gracile.compress(model, recipe, example=X[:2], train=loader, val=loader)
    assert result.plan.of_kind("mask")[0].sparsity == pytest.approx(14 / 32)  # floor(0.45 * 32)
    case.assert_same(dict(model.state_dict()), before)
