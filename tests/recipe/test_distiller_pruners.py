"""Every pruner of Distiller with every argument of it and of its policy, as entries of a recipe."""

import pytest
from distiller_case import TEN, converted, methods, schedule
from hypothesis import given
from hypothesis import strategies as st

from gracile.core.schedule import Calendar, timetable
from gracile.errors import RecipeError
from gracile.recipe import loads
from gracile.recipe.document import dump

RANGE = {"start": "0ep", "stop": "10ep", "every": "1ep"}
W = "weights: [module.a.weight, module.b.weight]"
AB = ["a.weight", "b.weight"]
AGP = {"ramp": "agp", "initial": 0.1, "final": 0.6}
LEVELS = "initial_sparsity: 0.1, final_sparsity: 0.6"


def one(component, timing=TEN, args="", **more):
    (entry,) = methods("pruner", component, timing, args, **more)
    return entry


def refused(component, timing=TEN, args=""):
    with pytest.raises(RecipeError, match=r"^old\.yaml:\d+: ") as error:
        converted(schedule("pruner", component, timing, args))
    return str(error.value).split(": ", 1)[1]


# ------------------------------------------------------------------ every class


def test_magnitude():
    assert methods(
        "pruner", "class: MagnitudeParameterPruner, thresholds: {a.weight: 0.02, '*': 0.01}"
    ) == [
        {"prune": "threshold", "weights": "a.weight", "threshold": 0.02, "when": RANGE},
        {"prune": "threshold", "weights": ["**", "!a.weight"], "threshold": 0.01, "when": RANGE},
    ]
    zero = one("class: MagnitudeParameterPruner, thresholds: {'*': 0}")
    assert zero == {"prune": "keep_zeros", "weights": "**", "when": RANGE}
    assert "needs '*'" in refused("class: MagnitudeParameterPruner, thresholds: {a.weight: 0.1}")


def test_sparsity_level_and_the_levels_of_a_policy():
    component = (
        "class: SparsityLevelParameterPruner, levels: {a.weight: 0.5, b.weight: 0, '*': 0.25}"
    )
    entries = methods("pruner", component, "epochs: [4]")
    assert entries == [
        {"prune": "gradual", "weights": "a.weight", "sparsity": 0.5, "when": {"at": "4ep"}},
        {
            "prune": "gradual",
            "weights": ["**", "!a.weight", "!b.weight"],
            "sparsity": 0.25,
            "when": {"at": "4ep"},
        },
    ]
    (other,) = methods("pruner", component, "epochs: [4]", "levels: {b.weight: 0.75}")
    assert (other["weights"], other["sparsity"]) == ("b.weight", 0.75)


def test_sensitivity_has_an_entry_for_each_value():
    component = (
        "class: SensitivityPruner, sensitivities: {a.weight: 0.25, b.weight: 0.5, c.w: 0.25}"
    )
    assert methods("pruner", component) == [
        {"prune": "threshold", "weights": ["a.weight", "c.w"], "threshold": 0.25,
         "relative_to": "std", "when": RANGE},
        {"prune": "threshold", "weights": "b.weight", "threshold": 0.5,
         "relative_to": "std", "when": RANGE},
    ]  # fmt: skip


def test_splicing():
    component = (
        "class: SplicingPruner, sensitivities: {a.weight: 0.05}, low_thresh_mult: 0.9, "
        "hi_thresh_mult: 1.1, sensitivity_multiplier: 0.015"
    )
    args = "keep_mask: True, mini_batch_pruning_frequency: 1, mask_on_forward_only: True"
    assert one(component, TEN, args) == {
        "prune": "splicing", "weights": "a.weight", "sensitivity": 0.05, "low_mult": 0.9,
        "high_mult": 1.1, "growth": 0.015, "masked": "reset",
        "when": {"start": "0ep", "stop": "10ep", "every": "1mb"},
    }  # fmt: skip
    plain = one(component.replace(", sensitivity_multiplier: 0.015", ""), "epochs: [3]")
    assert "growth" not in plain
    assert plain["masked"] == "frozen"
    assert plain["when"] == {"at": "3ep"}
    grown = one(component, "epochs: [2, 4, 6]")
    assert grown["when"] == {"start": "2ep", "stop": "7ep", "every": "2ep"}
    assert "hi_thresh_mult must not be below" in refused(component.replace("1.1", "0.8"))
    assert "epochs must be evenly spaced" in refused(component, "epochs: [2, 4, 5]")


@pytest.mark.parametrize(
    ("group", "granularity"),
    [("2D", "kernel"), ("Rows", "row"), ("Cols", "column"), ("3D", "filter"),
     ("Filters", "filter"), ("Channels", "channel"), ("4D", "layer")],
)  # fmt: skip
def test_structures_go_by_a_threshold(group, granularity):
    component = (
        f"class: StructureParameterPruner, reg_regims: {{a.weight: [0.02, {group}]}}, "
        "threshold_criteria: Mean_Abs"
    )
    entry = one(component)
    assert entry == {
        "prune": "threshold", "weights": "a.weight", "threshold": 0.02,
        "granularity": granularity, "reduce": "mean_abs", "when": RANGE,
    }  # fmt: skip
    assert one(component.replace("Mean_Abs", "Max"))["reduce"] == "max"
    assert "Nearest: 'Max'" in refused(component.replace("Mean_Abs", "Maxx"))
    assert "Nearest: 'Rows'" in refused(component.replace(group, "Row"))


def test_agp():
    entry = one(f"class: AutomatedGradualPruner, {LEVELS}, {W}")
    assert entry == {"prune": "gradual", "weights": AB, "sparsity": AGP, "when": RANGE}
    whole = one("class: AutomatedGradualPruner, initial_sparsity: 0, final_sparsity: 0.5, " + W)
    assert whole["sparsity"]["initial"] == 0.0


def test_baidu():
    component = f"class: BaiduRNNPruner, q: 0.16, ramp_epoch_offset: 2, ramp_slope_mult: 2, {W}"
    timing = "starting_epoch: 4, ending_epoch: 20, frequency: 2"
    assert one(component, timing) == {
        "prune": "rnn", "weights": AB, "q": 0.16, "ramp_at": "2ep", "ramp_slope": 2.0,
        "when": {"start": "4ep", "stop": "20ep", "every": "2ep"},
    }  # fmt: skip
    assert "epochs must be a range for BaiduRNNPruner" in refused(component, "epochs: [1, 2]")
    assert "mini_batch_pruning_frequency is not told" in refused(
        component, TEN, "mini_batch_pruning_frequency: 2"
    )
    short = "starting_epoch: 4, ending_epoch: 5, frequency: 1"
    assert "must lie within the policy's 1 epochs, got 2" in refused(component, short)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(
    ("group", "granularity"),
    [("Filters", "filter"), ("3D", "filter"), ("Channels", "channel"), ("Rows", "column")],
)
def test_ranked_structures(norm, group, granularity):
    cls = f"{norm.upper()}RankedStructureParameterPruner"
    entry = one(f"class: {cls}, group_type: {group}, desired_sparsity: 0.5, {W}")
    assert entry == {
        "prune": "gradual", "weights": AB, "sparsity": 0.5, "criterion": norm,
        "granularity": granularity, "when": RANGE,
    }  # fmt: skip
    rising = one(f"class: {cls}_AGP, group_type: {group}, {LEVELS}, {W}")
    assert rising == {**entry, "sparsity": AGP}


def test_every_further_argument_of_ranked_structures():
    ranked = f"class: L1RankedStructureParameterPruner, desired_sparsity: 0.5, {W}"
    blocks = f"{ranked}, group_type: Blocks, kwargs: {{block_shape: [2, 8, 1, 1]}}"
    assert one(blocks)["granularity"] == {"name": "block", "filters": 2, "channels": 8}
    assert "noise" not in one(f"{blocks}, noise: 0.5", warns=["ignored"])
    entry = one(f"{ranked}, group_type: Filters, noise: 0.1, group_size: 4, group_dependency: null")
    assert (entry["noise"], entry["multiple_of"]) == (0.1, 4)
    leader = one(f"{ranked}, group_type: Filters, group_dependency: Leader", warns=["leader"])
    assert leader["rank_by"] == "listed"
    assert "kwargs must be {block_shape: [repetitions, depth, 1, 1]}" in refused(
        f"{ranked}, group_type: Blocks, kwargs: {{block_shape: [1, 8, 1, 2]}}"
    )
    assert "needs both of group_type: Blocks" in refused(f"{ranked}, group_type: Blocks")
    assert "has no counterpart here" in refused(
        f"{ranked}, group_type: Rows, group_dependency: Leader"
    )
    assert "must be 'Leader', or null, got 'Leder'" in refused(
        f"{ranked}, group_type: Filters, group_dependency: Leder"
    )
    assert "Nearest: 'Filters'" in refused(f"{ranked}, group_type: Filter")


@pytest.mark.parametrize(
    ("cls", "criterion", "warns"),
    [
        ("ActivationAPoZ", "apoz", []),
        ("ActivationMean", "mean_activation", ["fixed"]),
        ("Gradient", "taylor", ["fixed"]),
        ("Random", "random", []),
    ],
)
def test_filters_ranked_by_other_things(cls, criterion, warns):
    component = f"class: {cls}RankedFilterPruner, group_type: Filters, desired_sparsity: 0.5, {W}"
    entry = one(component, warns=warns)
    assert entry == {
        "prune": "gradual", "weights": AB, "sparsity": 0.5, "criterion": criterion,
        "granularity": "filter", "when": RANGE,
    }  # fmt: skip
    rising = f"class: {cls}RankedFilterPruner_AGP, group_type: 3D, {LEVELS}, {W}"
    assert one(rising, warns=warns) == {**entry, "sparsity": AGP}
    assert "group_type must be 'Filters' or '3D'" in refused(
        component.replace("Filters", "Channels")
    )


DROPPED = (
    "discard_masks_at_minibatch_end: True, use_double_copies: True, mask_on_forward_only: True"
)
OFTEN = f"mini_batch_pruning_frequency: 16, {DROPPED}"


def test_bernoulli():
    component = f"class: BernoulliFilterPruner, desired_sparsity: 0.1, group_type: Filters, {W}"
    entry = one(component, TEN, f"{OFTEN}, mask_gradients: True")
    assert entry == {
        "prune": "drop", "weights": AB, "sparsity": 0.1, "granularity": "filter",
        "when": {"start": "0ep", "stop": "10ep", "every": "16mb"},
    }  # fmt: skip
    assert one(component, TEN, OFTEN) == {**entry, "masked": "trained"}
    rising = f"class: BernoulliFilterPruner_AGP, {LEVELS}, group_type: Filters, {W}"
    assert one(rising, TEN, f"{OFTEN}, mask_gradients: True") == {**entry, "sparsity": AGP}
    kept = one(component, "epochs: [3]", warns=["approximated"])
    assert kept["lifetime"] == "span"
    assert kept["when"] == {"start": "3ep", "stop": "4ep", "every": "1ep"}
    assert "has no counterpart here" in refused(component + ", group_dependency: Leader")


def test_random_level():
    component = (
        f"class: RandomLevelStructureParameterPruner, sparsity_range: [0.1, 0.2], "
        f"group_type: Filters, {W}"
    )
    assert one(component, TEN, f"{OFTEN}, mask_gradients: True") == {
        "prune": "drop", "weights": AB, "range": [0.1, 0.2], "choose": "l1",
        "granularity": "filter", "rescale": False,
        "when": {"start": "0ep", "stop": "10ep", "every": "16mb"},
    }  # fmt: skip
    assert "must be [lowest, highest], got [0.3, 0.2]" in refused(component.replace("0.1", "0.3"))
    assert "sparsity_range must be a list of two" in refused(component.replace(", 0.2]", "]"))


def test_reconstruction_prunes_channels_and_fits_the_layer():
    component = (
        f"class: FMReconstructionChannelPruner, group_type: Channels, desired_sparsity: 0.5, {W}, "
        "ranking_noise: 0.1, group_size: 2"
    )
    assert methods("pruner", component, "epochs: [1]") == [
        {"prune": "gradual", "weights": AB, "sparsity": 0.5, "criterion": "l1",
         "granularity": "channel", "noise": 0.1, "multiple_of": 2, "when": {"at": "1ep"}},
        {"recover": "reconstruct", "weights": AB, "residual": False, "when": {"at": "1ep"}},
    ]  # fmt: skip
    assert "must be 'Channels', got 'Filters'" in refused(component.replace("Channels", "Filters"))


# ------------------------------------------------------------------ arguments of the policy

LEVEL = "class: SparsityLevelParameterPruner, levels: {a.weight: 0.5}"


@pytest.mark.parametrize(
    ("args", "masked", "lifetime", "warns"),
    [
        ("", "frozen", "run", []),
        ("keep_mask: True", "frozen", "run", []),
        ("use_double_copies: True", "frozen", "run", []),
        ("mask_on_forward_only: True", "reset", "span", []),
        ("mask_on_forward_only: True, keep_mask: True", "reset", "run", []),
        ("mask_on_forward_only: True, use_double_copies: True", "trained", "span", []),
        ("mask_on_forward_only: True, use_double_copies: True, keep_mask: True", "trained", "run",
         []),
        ("mask_on_forward_only: True, use_double_copies: True, mask_gradients: True", "frozen",
         "span", []),
        ("mask_on_forward_only: True, mask_gradients: True", "reset", "span", ["approximated"]),
        (f"{DROPPED}, mask_gradients: True", "frozen", "batch", []),
        (f"{DROPPED}, keep_mask: True", "trained", "batch", []),
        ("discard_masks_at_minibatch_end: True", "reset", "batch", ["approximated"]),
        ("fold_batchnorm: True", "frozen", "run", ["approximated"]),
        ("fold_batchnorm: False, skip_first_minibatch: False", "frozen", "run", []),
    ],
)  # fmt: skip
def test_what_masks_do_follows_from_the_flags(args, masked, lifetime, warns):
    entry = one(LEVEL, TEN, args, warns=warns)
    assert entry.get("masked", "frozen") == masked
    assert entry.get("lifetime", "run") == lifetime


def test_masks_that_end_need_a_range_and_epochs_between_are_told():
    forward = "mask_on_forward_only: True"
    assert one(LEVEL, "epochs: [2, 3]", forward)["when"] == {
        "start": "2ep", "stop": "4ep", "every": "1ep",
    }  # fmt: skip
    assert "epochs must be evenly spaced" in refused(LEVEL, "epochs: [2, 3, 5]", forward)
    spread = "starting_epoch: 0, ending_epoch: 9, frequency: 2"
    one(LEVEL, spread, forward, warns=["approximated"])


def test_the_first_mini_batch_can_be_skipped():
    skip = "skip_first_minibatch: True"
    assert one(LEVEL, "epochs: [0]", skip)["when"] == {"at": "1mb"}
    assert one(LEVEL, "epochs: [0, 2]", skip)["when"] == {"at": ["1mb", "2ep"]}
    assert one(LEVEL, "epochs: [1, 2]", skip)["when"] == {"at": ["1ep", "2ep"]}
    often = f"{skip}, mini_batch_pruning_frequency: 4"
    assert one(LEVEL, TEN, often)["when"] == {"start": "1mb", "stop": "10ep", "every": "4mb"}
    assert "cannot be told together" in refused(LEVEL, TEN, f"{skip}, mask_on_forward_only: True")


def test_pruning_within_epochs_needs_all_of_them():
    often = "mini_batch_pruning_frequency: 4"
    assert one(LEVEL, "epochs: [3, 4]", often)["when"] == {
        "start": "3ep", "stop": "5ep", "every": "4mb",
    }  # fmt: skip
    gap = "needs epochs without gaps. Set frequency: 1."
    assert gap in refused(LEVEL, "starting_epoch: 0, ending_epoch: 9, frequency: 2", often)
    assert gap in refused(LEVEL, "epochs: [3, 5]", often)
    assert one(LEVEL, TEN, "mini_batch_pruning_frequency: 0")["when"] == RANGE


# ------------------------------------------------------------------ firings and levels


@given(st.integers(0, 8), st.integers(1, 40), st.integers(1, 9), st.integers(1, 60))
def test_firings_and_levels_are_distillers(start, length, every, epochs):
    every = min(every, length)
    stop = start + length
    fired = list(range(start, stop, every))
    span = (stop - start - 1) // every * every
    if span == 0:
        return
    wanted = {  # Distiller's formula, epoch by epoch, as far as training goes
        (e, 0): 0.6 + (0.1 - 0.6) * (1 - (e - start) / span) ** 3 for e in fired if e < epochs
    }
    timing = f"starting_epoch: {start}, ending_epoch: {stop}, frequency: {every}"
    text = schedule("pruner", f"class: AutomatedGradualPruner, {LEVELS}, {W}", timing)
    data, _ = converted(text, epochs=epochs)
    if not wanted:
        assert data["methods"] == {}
        return
    options = loads(dump(data)).methods["c"].options
    table = timetable(options.when, Calendar(epochs, 7))
    got = [options.sparsity.at(table.progress(k)) for k in range(len(table))]
    assert dict(zip(table.instants, got, strict=True)) == pytest.approx(wanted, abs=1e-12)


def test_a_list_of_epochs_is_so_many_firings():
    entry = one(f"class: AutomatedGradualPruner, {LEVELS}, {W}", "epochs: [0, 2, 7]")
    assert entry["when"] == {"at": ["0ep", "2ep", "7ep"]}
    cut = one(LEVEL, "epochs: [0, 2, 7]", epochs=5)
    assert cut["when"] == {"at": ["0ep", "2ep"]}


def test_what_begins_after_training_is_left_out_and_what_ends_after_it_is_told():
    agp = f"class: AutomatedGradualPruner, {LEVELS}, {W}"
    assert methods("pruner", LEVEL, "epochs: [7]", epochs=7, warns=["too-late"]) == []
    cut = one(
        agp, "starting_epoch: 0, ending_epoch: 5, frequency: 1", epochs=3, warns=["cut-short"]
    )
    assert cut["sparsity"] == {
        "ramp": {"name": "multistep", "steps": [0.5, 1.0], "levels": pytest.approx([0.3890625])},
        "initial": pytest.approx(0.1),
        "final": pytest.approx(0.5375),
    }
    first = one(
        agp, "starting_epoch: 0, ending_epoch: 5, frequency: 1", epochs=1, warns=["cut-short"]
    )
    assert first["sparsity"] == pytest.approx(0.1)


def test_entries_are_in_the_order_of_the_policies():
    text = """\
pruners:
  one: {class: SparsityLevelParameterPruner, levels: {a.weight: 0.5}}
  two: {class: SparsityLevelParameterPruner, levels: {b.weight: 0.5}}
extensions:
  thin: {class: FilterRemover, thinning_func_str: remove_filters, arch: x, dataset: cifar10}
policies:
- {pruner: {instance_name: two}, epochs: [0]}
- {extension: {instance_name: thin}, epochs: [0]}
- {pruner: {instance_name: one}, epochs: [0]}
"""
    assert list(converted(text)[0]["methods"]) == ["two", "thin", "one"]
