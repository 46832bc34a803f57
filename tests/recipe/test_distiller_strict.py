"""Defects of Distiller that `compat: strict` brings back, each with and without, worked by hand."""

import pytest
import torch
from distiller_case import TEN, Convs, Row, converted, kept, methods, schedule, session, step
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gracile.core.schedule import Calendar, When, timetable
from gracile.recipe import loads
from gracile.recipe.document import dump
from gracile.recipe.explain import timetable_rows

X = torch.ones(2, 2)
IMAGE = torch.ones(2, 1, 4, 4)
BOTH = pytest.mark.parametrize("strict", [False, True])


class Two(nn.Module):
    """Two linear layers side by side, of weights 1 and 3 each."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Linear(2, 1, bias=False) for _ in range(2))
        for layer in (self.a, self.b):
            layer.weight.data = torch.tensor([[1.0, 3.0]])

    def forward(self, x):
        return self.a(x) + self.b(x)


def pull(s, x, epoch, batch):
    """One step on the sum of the outputs: of X, the gradient of every weight is 2."""
    steps = s.calendar.steps
    s.on_minibatch_begin(epoch, batch, steps)
    s.optimizer.zero_grad()
    s.before_backward_pass(epoch, batch, steps, s.model(x).sum()).backward()
    s.before_parameter_optimization(epoch, batch, steps)
    s.optimizer.step()
    s.on_minibatch_end(epoch, batch, steps)


def epoch_of(s, epoch, x=X):
    s.on_epoch_begin(epoch)
    for batch in range(s.calendar.steps):
        pull(s, x, epoch, batch)
    s.on_epoch_end(epoch)


def rounded(s, address):
    return [round(v, 4) for v in s.parameter(address).flatten().tolist()]


# ------------------------------------------------------------------ flags of masks

TWO = """\
pruners:
  p: {class: SparsityLevelParameterPruner, levels: {a.weight: 0.5}}
  q: {class: SparsityLevelParameterPruner, levels: {b.weight: 0.5}}
policies:
- {pruner: {instance_name: p, args: {%s}}, epochs: [0]}
- {pruner: {instance_name: q, args: {%s}}, starting_epoch: 1, ending_epoch: 2, frequency: 1}
"""
ONE_EPOCH = "starting_epoch: 1, ending_epoch: 2, frequency: 1"
FORWARD = "mask_on_forward_only: True"


def masks_of_a(text, *, strict, epochs=3):
    """What is kept of `a` in each epoch, its first weight after it, and the plan's edits."""
    s = session(text, Two(), X, lr=0.1, strict=strict, epochs=epochs)
    masks, firsts = [], []
    for epoch in range(epochs):
        s.on_epoch_begin(epoch)
        masks.append(s.own_mask("p", "a.weight").flatten().int().tolist())
        for batch in range(2):
            pull(s, X, epoch, batch)
        firsts.append(rounded(s, "a.weight")[0])
        s.on_epoch_end(epoch)
    return masks, firsts, [e.at for e in s.finish().plan.edits]


def test_the_flags_of_the_second_policy_overwrite_those_of_the_first():
    text = TWO % ("", FORWARD)
    assert masks_of_a(text, strict=False) == ([[0, 1]] * 3, [1.0] * 3, ["a.weight"])
    # 0 after each step; then 0 at each mini-batch and a step of -0.2; then free
    wanted = ([[0, 1], [0, 1], [1, 1]], [0.0, -0.2, -0.6], [])
    assert masks_of_a(text, strict=True) == wanted


def test_a_second_policy_without_flags_makes_masks_of_the_forward_pass_permanent():
    text = TWO % (FORWARD, "")
    assert masks_of_a(text, strict=False) == (
        [[0, 1], [1, 1], [1, 1]],
        [-0.2, -0.6, -1.0],
        ["b.weight"],
    )
    masks, firsts, edits = masks_of_a(text, strict=True)
    assert (masks, firsts) == ([[0, 1]] * 3, [-0.2, 0.0, 0.0])
    assert sorted(edits) == ["a.weight", "b.weight"]


def test_keep_mask_of_the_second_policy_keeps_those_of_the_first():
    masks, firsts, edits = masks_of_a(TWO % ("", f"{FORWARD}, keep_mask: True"), strict=True)
    assert (masks, firsts) == ([[0, 1]] * 3, [0.0, -0.2, 0.0])
    assert sorted(edits) == ["a.weight", "b.weight"]


def test_discarding_masks_discards_all_of_them():
    text = TWO % ("", f"{FORWARD}, use_double_copies: True, discard_masks_at_minibatch_end: True")
    assert masks_of_a(text, strict=False)[0] == [[0, 1]] * 3
    s = session(text, Two(), X, lr=0.1, strict=True, epochs=3)
    epoch_of(s, 0)
    assert s.masked_by("p") == ["a.weight"]
    s.on_epoch_begin(1)
    pull(s, X, 1, 0)
    assert s.masked_by("p") == s.masked_by("q") == []


def test_masks_without_flags_are_zero_in_the_weights_but_not_in_the_momentum():
    text = schedule("pruner", "class: SparsityLevelParameterPruner, levels: {a.weight: 0.5}",
                    "epochs: [0]")  # fmt: skip
    s = session(text, Two(), X, strict=True)
    s.optimizer = torch.optim.SGD(s.model.parameters(), lr=0.1, momentum=0.5)
    epoch_of(s, 0)
    assert rounded(s, "a.weight") == [0.0, 2.5]  # 3 - 0.1 * 2 - 0.1 * (2 + 0.5 * 2)
    buffer = s.optimizer.state[s.parameter("a.weight")]["momentum_buffer"]
    assert buffer.tolist() == [[3.0, 3.0]]


def test_two_policies_of_the_same_epochs_lose_the_second_copies():
    copies = f"{FORWARD}, use_double_copies: True"
    text = (TWO % (copies, copies)).replace("epochs: [0]", ONE_EPOCH)
    for strict, masked in [(False, "trained"), (True, "reset")]:
        data, _ = converted(text, strict=strict)
        assert [e["masked"] for e in data["methods"].values()] == [masked] * 2
    alone = "class: SparsityLevelParameterPruner, levels: {a.weight: 0.5, b.weight: 0.25}"
    entries = methods("pruner", alone, TEN, copies, strict=True)
    assert [e["masked"] for e in entries] == ["trained"] * 2


def test_a_run_of_shared_flags_goes_on_as_if_not_interrupted():
    text = TWO % (FORWARD, f"{FORWARD}, use_double_copies: True, keep_mask: True")

    def new():
        return session(text, Two(), X, lr=0.1, strict=True, epochs=3)

    for stop in (1, 2):
        whole, first, second = new(), new(), new()
        for epoch in range(3):
            epoch_of(whole, epoch)
        for epoch in range(stop):
            epoch_of(first, epoch)
        second.load_state_dict(first.state_dict())
        for epoch in range(stop, 3):
            epoch_of(second, epoch)
        ends = [s.finish() for s in (whole, second)]
        assert ends[0].plan == ends[1].plan
        for a, b in zip(*(e.model.state_dict().values() for e in ends), strict=True):
            assert torch.equal(a, b)


THIN = """\
pruners:
  c: {class: L1RankedStructureParameterPruner, group_type: Filters, desired_sparsity: 0.5,
      weights: [a.weight]}
  q: {class: SparsityLevelParameterPruner, levels: {last.weight: 0.75}}
extensions:
  thin: {class: FilterRemover, thinning_func_str: remove_filters, arch: x, dataset: cifar10}
policies:
- {pruner: {instance_name: c}, epochs: [0]}
- pruner: {instance_name: q, args: {mask_on_forward_only: True, keep_mask: True}}
  starting_epoch: 0
  ending_epoch: 2
  frequency: 1
- {extension: {instance_name: thin}, epochs: [1]}
"""


def test_masks_of_shared_flags_are_cut_like_others():
    s = session(THIN, Convs(a=[4.0, 1.0, 3.0, 2.0]), IMAGE, strict=True, epochs=3)
    for epoch in range(3):
        epoch_of(s, epoch, IMAGE)
    result = s.finish()
    assert result.model.a.weight.flatten().tolist() == pytest.approx([4.0, 3.0])
    # of eight weights six go, four of them with their filters
    assert int((result.model.last.weight == 0).sum()) == 2


# ------------------------------------------------------------------ keep_mask and the last epoch

LEVEL = "class: SparsityLevelParameterPruner, levels: {fc.weight: 0.5}"


@pytest.mark.parametrize(
    ("timing", "strict", "lasting"),
    [
        ("starting_epoch: 0, ending_epoch: 4, frequency: 2", False, True),
        ("starting_epoch: 0, ending_epoch: 4, frequency: 2", True, False),  # 3 is none of 0, 2
        ("starting_epoch: 0, ending_epoch: 3, frequency: 2", True, True),
        ("epochs: [1, 3]", True, True),
        ("starting_epoch: 0, ending_epoch: 7, frequency: 1", True, False),  # training ends before
    ],
)
def test_keep_mask_needs_an_epoch_before_the_end(timing, strict, lasting):
    text = schedule("pruner", LEVEL, timing, f"{FORWARD}, keep_mask: True")
    s = session(text, Row([1.0, 2.0]), X, strict=strict, epochs=6)
    for epoch in range(6):
        epoch_of(s, epoch)
    assert [e.kind for e in s.finish().plan.edits] == ["mask"] * lasting


@pytest.mark.parametrize(("strict", "kept"), [(False, True), (True, False)])
def test_keep_mask_of_a_regularizer_too(strict, kept):
    component = (
        "class: GroupLassoRegularizer, reg_regims: {a.weight: [0.1, Rows]}, threshold_criteria: Max"
    )
    for stop, wanted in [(4, kept), (3, True)]:
        timing = f"starting_epoch: 0, ending_epoch: {stop}, frequency: 2"
        entries = methods("regularizer", component, timing, "keep_mask: True", strict=strict)
        assert [e["keep_mask"] for e in entries] == [False, wanted]


# ------------------------------------------------------------------ rankings


def test_the_filters_that_fire_most_go_and_come_back_as_zeros():
    # activations are the weights; in epoch 1 that of the pruned filter is 0
    text = schedule(
        "pruner",
        "class: ActivationMeanRankedFilterPruner, group_type: Filters, desired_sparsity: 0.25, "
        "weights: [a.weight]",
        "starting_epoch: 0, ending_epoch: 2, frequency: 1",
    )
    found = {}
    for strict in (False, True):
        s = session(text, Convs(a=[1.0, 2.0, 3.0, 4.0]), IMAGE, strict=strict)
        s.on_epoch_begin(0)
        found[strict] = [s.own_mask("c", "a.weight").flatten().int().tolist()]
        step(s, IMAGE, 0)
        s.on_epoch_begin(1)
        found[strict].append(s.own_mask("c", "a.weight").flatten().int().tolist())
        last = rounded(s, "a.weight")
    assert found[False] == [[0, 1, 1, 1]] * 2
    assert found[True] == [[1, 1, 1, 0], [1, 1, 0, 1]]
    assert last == [1.0, 2.0, 3.0, 0.0]


@pytest.mark.parametrize(("strict", "mask"), [(False, [0, 1, 1, 1]), (True, [1, 1, 1, 0])])
def test_filters_ranked_by_the_signed_sum_of_gradient_and_weight(strict, mask):
    # gradient * weight is 64 * 1, -2, 3, -4
    text = schedule(
        "pruner",
        "class: GradientRankedFilterPruner, group_type: Filters, desired_sparsity: 0.25, "
        "weights: [a.weight]",
        "epochs: [1]",
    )
    model = Convs(a=[1.0, 1.0, 1.0, 1.0])
    model.last.weight.data = torch.tensor([[1.0, -2.0, 3.0, -4.0]] * 2).reshape(2, 4, 1, 1)
    s = session(text, model, IMAGE, strict=strict)
    epoch_of(s, 0, IMAGE)
    s.on_epoch_begin(1)
    assert s.own_mask("c", "a.weight").flatten().int().tolist() == mask


def test_neither_is_told_as_fixed_when_strict():
    for cls in ("ActivationMean", "Gradient"):
        component = (
            f"class: {cls}RankedFilterPruner, group_type: 3D, desired_sparsity: 0.5, "
            "weights: [a.weight]"
        )
        methods("pruner", component, warns=["fixed"])
        methods("pruner", component, strict=True)


@pytest.mark.parametrize(("strict", "gone"), [(False, 3), (True, 2)])
def test_group_size_rounds_what_goes(strict, gone):
    # floor(0.6 * 5) = 3: two are left, an even number; or three go and become two
    text = schedule(
        "pruner",
        "class: L1RankedStructureParameterPruner, group_type: Filters, desired_sparsity: 0.6, "
        "group_size: 2, weights: [a.weight]",
        "epochs: [0]",
    )
    s = session(text, Convs(a=[1.0, 2.0, 3.0, 4.0, 5.0]), IMAGE, strict=strict)
    assert kept(s, "a.weight") == [[0] * gone + [1] * (5 - gone)]


@BOTH
def test_the_leader_is_the_first_of_the_list(strict):
    text = schedule(
        "pruner",
        "class: L1RankedStructureParameterPruner, group_type: Filters, desired_sparsity: 0.5, "
        "group_dependency: Leader, weights: [b.weight, a.weight]",
        "epochs: [0]",
    )
    model = Convs(a=[4.0, 1.0, 3.0, 2.0], b=[1.0, 4.0, 3.0, 2.0])
    s = session(text, model, IMAGE, strict=strict)
    assert kept(s, "a.weight") == kept(s, "b.weight") == [[0, 1, 1, 0]]


# ------------------------------------------------------------------ quantization


@pytest.mark.parametrize("mode", ["SYMMETRIC", "SYMMETRIC_RESTRICTED", "ASYMMETRIC_SIGNED",
                                  "{activations: SYMMETRIC, weights: SYMMETRIC}"])  # fmt: skip
@pytest.mark.parametrize("cls", ["QuantAwareTrain", "NCFQuantAwareTrain"])
def test_every_mode_of_training_is_asymmetric(cls, mode):
    name = "QuantAwareTrainRangeLinearQuantizer" if cls == "QuantAwareTrain" else f"{cls}Quantizer"
    component = f"class: {name}, bits_activations: 8, bits_weights: 8, mode: {mode}"
    (entry,) = methods("quantizer", component, strict=True)
    assert (entry["symmetric"], entry["weight_symmetric"]) == (False, False)
    (entry,) = methods("quantizer", component)
    even = mode != "ASYMMETRIC_SIGNED"
    assert (entry["symmetric"], entry["weight_symmetric"]) == (even, even)


def test_after_training_the_mode_counts():
    data, _ = converted("quantizers: {q: {class: PostTrainLinearQuantizer}}", strict=True)
    assert (data["compat"], data["methods"]["q"]["symmetric"]) == ("strict", True)


# ------------------------------------------------------------------ hybrid schedules

HYBRID = """\
pruners:
  p: {class: SparsityLevelParameterPruner, levels: {fc.weight: 0.25}}
regularizers:
  c:
    class: GroupLassoRegularizer
    reg_regims: {fc.weight: [0.01, Rows]}
    threshold_criteria: Mean_Abs
policies:
- regularizer: {instance_name: c, args: {keep_mask: %s}}
  starting_epoch: 1
  ending_epoch: 2
  frequency: 1
- {pruner: {instance_name: p}, epochs: [0, 1]}
"""


def test_a_thresholding_regularizer_takes_the_pruners_mask_away():
    for strict in (False, True):
        s = session(HYBRID % "False", Row([3.0, 4.0], [1.0, 5.0]), X, strict=strict, epochs=3)
        masks = []
        for epoch in range(3):
            s.on_epoch_begin(epoch)
            for batch in range(2):
                masks.append(s.mask("fc.weight"))
                step(s, X, batch, epoch)
        masked = [m is not None and m.int().tolist() == [[1, 1], [0, 1]] for m in masks]
        assert masked == [True] * 3 + ([False] * 3 if strict else [True] * 3)
        assert rounded(s, "fc.weight")[2] == (0.0 if strict else 1.0)


def test_the_mask_it_keeps_takes_the_place_of_the_pruners():
    model = Row([3.0, 4.0], [0.001, 0.002])  # the second row goes, one weight of it did before
    s = session(HYBRID % "True", model, X, strict=True, epochs=3)
    for epoch in range(3):
        s.on_epoch_begin(epoch)
        for batch in range(2):
            step(s, X, batch, epoch)
    assert s.mask("fc.weight").int().tolist() == [[1, 1], [0, 0]]
    assert [(e.by, e.sparsity) for e in s.finish().plan.edits] == [("c", 0.5)]


# ------------------------------------------------------------------ firings within an epoch


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 7))
def test_firings_are_distillers(start, length, every, steps):
    wanted = [
        (epoch, batch)
        for epoch in range(start, start + length)
        for batch in range(steps)
        if batch == 0 or (epoch * steps + batch) % every == 0
    ]
    when = When(start=f"{start}ep", stop=f"{start + length}ep", every=f"{every}mb")
    table = timetable(when, Calendar(start + length, steps), strict=True)
    assert list(table.instants) == wanted


def test_they_are_counted_from_the_start_of_training_and_each_epoch_begins_with_one():
    when = When(start="1ep", stop="3ep", every="3mb")
    calendar = Calendar(3, 4)
    strict = timetable(when, calendar, strict=True)
    assert strict.instants == ((1, 0), (1, 2), (2, 0), (2, 1))
    assert [strict.progress(k) for k in range(4)] == [0, 0, 1, 1]
    assert timetable(when, calendar).instants == ((1, 0), (1, 3), (2, 2))
    skipped = When(start="1mb", stop="2ep", every="3mb")
    assert timetable(skipped, calendar, strict=True).instants == ((0, 1), (0, 3), (1, 0), (1, 2))


@pytest.mark.parametrize(
    ("strict", "levels"),
    [(True, [0.2, 0.2, 0.725, 0.725, 0.8, 0.8]),
     (False, [0.2, 0.4928, 0.6704, 0.7616, 0.7952, 0.8])],
)  # fmt: skip
def test_the_level_of_dropped_filters_is_that_of_the_epoch(strict, levels):
    component = (
        "class: BernoulliFilterPruner_AGP, initial_sparsity: 0.2, final_sparsity: 0.8, "
        "group_type: Filters, weights: [a.weight]"
    )
    args = f"mini_batch_pruning_frequency: 1, {FORWARD}, discard_masks_at_minibatch_end: True"
    timing = "starting_epoch: 0, ending_epoch: 3, frequency: 1"
    data, _ = converted(schedule("pruner", component, timing, args), strict=strict)
    rows = timetable_rows(loads(dump(data)), Calendar(3, 2))
    assert [r.levels["sparsity"] for r in rows] == pytest.approx(levels)


@pytest.mark.parametrize(("strict", "kept_of"), [(False, [2, 1, 1]), (True, [2, 2, 1])])
def test_splicing_grows_by_whole_epochs(strict, kept_of):
    # below 0.8 (2.5 + 1.291 * 0.2 (1 + 8 e)) = 2.21, 3.03, 3.86 of e = 0, 1/2, 1
    text = schedule(
        "pruner",
        "class: SplicingPruner, sensitivities: {fc.weight: 0.2}, low_thresh_mult: 0.8, "
        "hi_thresh_mult: 1.2, sensitivity_multiplier: 8",
        "starting_epoch: 0, ending_epoch: 2, frequency: 1",
        f"mini_batch_pruning_frequency: 1, {FORWARD}, use_double_copies: True, keep_mask: True",
    )
    x = torch.ones(2, 4)
    s = session(text, Row([1.0, 2.0, 3.0, 4.0]), x, strict=strict)
    found = []
    for epoch in range(2):
        s.on_epoch_begin(epoch)
        for batch in range(2):
            step(s, x, batch, epoch)
            found.append(int(s.own_mask("c", "fc.weight").sum()))
    assert found[:3] == kept_of
