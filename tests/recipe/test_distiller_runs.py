"""Schedules of Distiller, converted and run on networks small enough to work every mask out."""

import pytest
import torch
from distiller_case import TEN, Convs, Row, kept, schedule, session, step

X = torch.ones(2, 4)
IMAGE = torch.ones(2, 1, 4, 4)


def test_agp_masks_the_smallest_at_each_level():
    # levels 0.2, 0.8 - 0.6 / 8 = 0.725, 0.8 of ten weights: floor to 2, 7, 8
    text = schedule(
        "pruner",
        "class: AutomatedGradualPruner, initial_sparsity: 0.2, final_sparsity: 0.8, "
        "weights: [module.fc.weight]",
        "starting_epoch: 1, ending_epoch: 6, frequency: 2",
    )
    s = session(text, Row([float(i) for i in range(1, 11)]), torch.ones(2, 10), epochs=7)
    gone = [0, 2, 2, 7, 7, 8, 8]
    assert kept(s, "fc.weight") == [[0] * k + [1] * (10 - k) for k in gone]


def test_filters_are_ranked_by_their_norm_and_masked_in_the_epoch_of_the_list():
    text = schedule(
        "pruner",
        "class: L1RankedStructureParameterPruner, group_type: Filters, desired_sparsity: 0.5, "
        "weights: [module.a.weight]",
        "epochs: [1]",
    )
    s = session(text, Convs(a=[-4.0, 1.0, 3.0, -2.0]), IMAGE)
    assert kept(s, "a.weight") == [[1, 1, 1, 1], [1, 0, 1, 0]]


def test_sensitivity_keeps_the_threshold_of_its_first_epoch():
    # std of 3, -3, 1, -1 is sqrt(20 / 3) = 2.58; half of it is 1.29
    text = schedule(
        "pruner",
        "class: SensitivityPruner, sensitivities: {module.fc.weight: 0.5}",
        "starting_epoch: 0, ending_epoch: 4, frequency: 2",
    )
    s = session(text, Row([3.0, -3.0, 1.0, -1.0]), X)
    s.on_epoch_begin(0)
    assert s.own_mask("c", "fc.weight").int().tolist() == [[1, 1, 0, 0]]
    s.parameter("fc.weight").data[0, 0] = 1.2
    s.on_epoch_begin(1)
    assert s.own_mask("c", "fc.weight").int().tolist() == [[1, 1, 0, 0]]
    s.on_epoch_begin(2)
    assert s.own_mask("c", "fc.weight").int().tolist() == [[0, 1, 0, 0]]


def test_splicing_takes_back_what_has_grown():
    # mean of |w| is 2.5: below 2 goes, from 3 on comes back, between stays as it is
    text = schedule(
        "pruner",
        "class: SplicingPruner, sensitivities: {module.fc.weight: 0.0}, low_thresh_mult: 0.8, "
        "hi_thresh_mult: 1.2",
        "starting_epoch: 0, ending_epoch: 4, frequency: 1",
        "mask_on_forward_only: True, use_double_copies: True, keep_mask: True",
    )
    s = session(text, Row([1.0, 2.0, 3.0, 4.0]), X)
    found = []
    for epoch, (w0, w1) in enumerate([(1.0, 2.0), (2.9, 1.9), (3.0, 2.5), (3.0, 3.0)]):
        s.parameter("fc.weight").data[0, :2] = torch.tensor([w0, w1])
        s.on_epoch_begin(epoch)
        found.append(s.own_mask("c", "fc.weight")[0, :2].int().tolist())
    assert found == [[0, 1], [0, 0], [1, 0], [1, 1]]


def test_baidus_threshold_grows_in_two_slopes():
    # theta = 2 * 1.3 / (2 * 2 + 3 * 3) = 0.2: 0.2, 0.4, then 0.6 + 0.4 (n + 1): 1.0, 1.4, 1.8
    text = schedule(
        "pruner",
        "class: BaiduRNNPruner, q: 1.3, ramp_epoch_offset: 2, ramp_slope_mult: 2, "
        "weights: [fc.weight]",
        "starting_epoch: 1, ending_epoch: 6, frequency: 1",
    )
    s = session(text, Row([0.1, 0.3, 0.5, 1.2, 1.5, 2.0]), torch.ones(2, 6))
    gone = [0, 1, 2, 3, 4, 5]
    assert kept(s, "fc.weight") == [[0] * k + [1] * (6 - k) for k in gone]


def test_group_lasso_with_a_threshold_zeroes_rows_and_masks_them_at_the_end():
    text = schedule(
        "regularizer",
        "class: GroupLassoRegularizer, reg_regims: {module.fc.weight: [0.2, Rows]}, "
        "threshold_criteria: Mean_Abs",
        "starting_epoch: 0, ending_epoch: 2, frequency: 1",
        "keep_mask: True",
    )
    s = session(text, Row([3.0, 4.0], [0.1, 0.1]), torch.ones(2, 2), epochs=3)
    s.on_epoch_begin(0)
    assert step(s, torch.ones(2, 2), 0) == pytest.approx(0.2 * (5 + 0.02**0.5))
    assert s.parameter("fc.weight").tolist()[1] == [0.0, 0.0]  # their mean is not above 0.2
    s.parameter("fc.weight").data[1] = 0.3
    assert step(s, torch.ones(2, 2), 1) == pytest.approx(0.2 * (5 + 0.18**0.5))
    assert s.parameter("fc.weight").data[1].tolist() == pytest.approx([0.3, 0.3])
    s.parameter("fc.weight").data[1] = 0.2
    s.on_epoch_begin(1)
    step(s, torch.ones(2, 2), 0, 1)
    assert s.masked_by("c") == []
    step(s, torch.ones(2, 2), 1, 1)
    assert s.own_mask("c", "fc.weight").int().tolist() == [[1, 1], [0, 0]]
    s.on_epoch_begin(2)
    assert step(s, torch.ones(2, 2), 0, 2) == 0.0


LEADER = """\
pruners:
  filters:
    class: L1RankedStructureParameterPruner
    group_type: Filters
    desired_sparsity: 0.5
    group_dependency: Leader
    weights: [module.a.weight, module.b.weight]
extensions:
  thin: {class: FilterRemover, thinning_func_str: remove_filters, arch: x, dataset: cifar10}
policies:
- {pruner: {instance_name: filters}, epochs: [1]}
- {extension: {instance_name: thin}, epochs: [1]}
"""


def test_followers_lose_the_leaders_filters_and_the_remover_cuts_them_out():
    model = Convs(a=[4.0, 1.0, 3.0, 2.0], b=[1.0, 4.0, 3.0, 2.0])  # sums: 5, 5, 6, 4
    s = session(LEADER, model, IMAGE)
    s.on_epoch_begin(0)
    whole = model.last.weight.detach().clone()
    assert s.model.a.weight.shape[0] == 4
    s.on_epoch_begin(1)
    assert s.model.a.weight.flatten().tolist() == [4.0, 3.0]
    assert s.model.b.weight.flatten().tolist() == [1.0, 3.0]
    assert torch.equal(s.model.last.weight, whole[:, [0, 2]])
    s.on_minibatch_begin(1, 0, 2)
    s.on_epoch_end(1)
    assert [e.kind for e in s.finish().plan.edits] == ["remove"]


SSL = """\
regularizers:
  lasso:
    class: GroupLassoRegularizer
    reg_regims: {module.a.weight: [0.2, Filters]}
    threshold_criteria: Mean_Abs
extensions:
  thin: {class: FilterRemover, thinning_func_str: remove_filters, arch: x, dataset: cifar10}
policies:
- {extension: {instance_name: thin}, epochs: [1]}
- {regularizer: {instance_name: lasso}, starting_epoch: 0, ending_epoch: 2, frequency: 1}
"""


def test_what_a_regularizer_has_zeroed_is_cut_in_the_middle_of_its_span():
    s = session(SSL, Convs(a=[4.0, 0.1, 3.0, 0.2]), IMAGE)
    s.on_epoch_begin(0)
    for batch in range(2):
        step(s, IMAGE, batch)
    s.on_epoch_end(0)
    s.on_epoch_begin(1)
    assert s.model.a.weight.flatten().tolist() == pytest.approx([4.0, 3.0])
    assert step(s, IMAGE, 0, 1) == pytest.approx(0.2 * 7)


def test_the_rate_of_the_optimizer_jumps_and_then_stands_still():
    text = schedule(
        "lr_scheduler",
        "class: ExponentialLR, gamma: 0.5",
        "starting_epoch: 2, ending_epoch: 4, frequency: 1",
    )
    s = session(text, Row([1.0, 2.0]), torch.ones(2, 2), epochs=6, lr=0.8)
    rates = []
    for epoch in range(6):
        s.on_epoch_begin(epoch)
        s.on_minibatch_begin(epoch, 0, 2)
        rates.append(s.optimizer.param_groups[0]["lr"])
        s.on_epoch_end(epoch)
    assert rates == pytest.approx([0.8, 0.8, 0.8, 0.1, 0.05, 0.05])


def test_a_converted_schedule_fires_as_distiller_would():
    text = schedule("pruner", "class: SparsityLevelParameterPruner, levels: {'*': 0.5}", TEN)
    s = session(text, Row([1.0, 2.0, 3.0, 4.0]), X)
    assert kept(s, "fc.weight") == [[0, 0, 1, 1]] * 10
    assert s.fired == {"c": 10}


# ------------------------------------------------------------------ compat: strict

LEVEL = "class: SparsityLevelParameterPruner, levels: {module.fc.weight: %s}"


@pytest.mark.parametrize(
    ("level", "strict", "mask"),
    [
        (0.25, False, [0, 1, 1, 1]),
        (0.25, True, [0, 0, 1, 1]),  # both ones are not above the threshold 1
        (0.5, False, [0, 0, 1, 1]),
        (0.75, True, [0, 0, 0, 1]),
        (0.2, True, [1, 1, 1, 1]),  # less than one weight
    ],
)
def test_ties_at_the_level_go_together_only_when_strict(level, strict, mask):
    text = schedule("pruner", LEVEL % level, "epochs: [0]")
    s = session(text, Row([1.0, -1.0, 2.0, 3.0]), X, strict=strict)
    assert kept(s, "fc.weight") == [mask]


@pytest.mark.parametrize(("strict", "mask"), [(False, [0, 1, 1]), (True, [0, 0, 1])])
def test_filters_of_equal_norm_too(strict, mask):
    text = schedule(
        "pruner",
        "class: L2RankedStructureParameterPruner, group_type: Filters, desired_sparsity: 0.4, "
        "weights: [a.weight]",
        "epochs: [0]",
    )
    s = session(text, Convs(a=[2.0, -2.0, 5.0]), IMAGE, strict=strict)
    assert kept(s, "a.weight") == [mask]
    s.on_epoch_end(0)
    assert sum(e.kind == "mask" for e in s.finish().plan.edits) == 2  # the filters, their reader


@pytest.mark.parametrize(
    ("strict", "gone"),
    [
        (True, [2, 2, 7, 7, 8, 8]),  # 0.2, 0.725, 0.8: one level an epoch
        (False, [2, 4, 6, 7, 7, 8]),  # 0.8 - 0.6 (1 - k / 5)^3: 0.2, 0.493, 0.67, 0.762, 0.795, 0.8
    ],
)
def test_a_level_within_an_epoch_stands_still_only_when_strict(strict, gone):
    text = schedule(
        "pruner",
        "class: AutomatedGradualPruner, initial_sparsity: 0.2, final_sparsity: 0.8, "
        "weights: [fc.weight]",
        "starting_epoch: 0, ending_epoch: 3, frequency: 1",
        "mini_batch_pruning_frequency: 1",
    )
    x = torch.ones(2, 10)
    s = session(text, Row([float(i) for i in range(1, 11)]), x, strict=strict)
    found = []
    for epoch in range(3):
        s.on_epoch_begin(epoch)
        for batch in range(2):
            step(s, x, batch, epoch)
            found.append(int((~s.own_mask("c", "fc.weight")).sum()))
    assert found == gone


def test_a_schedule_cut_short_has_the_same_levels_when_strict():
    text = schedule(
        "pruner",
        "class: AutomatedGradualPruner, initial_sparsity: 0.2, final_sparsity: 0.8, "
        "weights: [fc.weight]",
        "starting_epoch: 0, ending_epoch: 3, frequency: 1",
        "mini_batch_pruning_frequency: 1",
    )
    s = session(
        text, Row([float(i) for i in range(1, 11)]), torch.ones(2, 10), strict=True, epochs=2
    )
    assert [sum(row) for row in kept(s, "fc.weight")] == [8, 3]
