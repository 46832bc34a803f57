"""What a schedule of Distiller may say, and how it is refused: file, line, nearest name."""

import re

import pytest
from distiller_case import TEN, converted, methods, schedule
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_damage import damaged

from gracile.errors import RecipeError
from gracile.recipe import loads
from gracile.recipe.distiller import convert
from gracile.recipe.distiller.grammar import CLASSES, FUNCTION, SECTIONS
from gracile.recipe.distiller.names import by_value, listed, plain_name
from gracile.recipe.distiller.regularizers import runs
from gracile.recipe.document import dump

AGP = (
    "class: AutomatedGradualPruner, initial_sparsity: 0.1, final_sparsity: 0.5, "
    "weights: [fc.weight]"
)
FILE = """\
version: 1
pruners:
  agp:
    class: AutomatedGradualPruner
    initial_sparsity: 0.1
    final_sparsity: 0.5
    weights: [module.fc.weight]
lr_schedulers:
  rate:
    class: StepLR
    step_size: 45
policies:
  - pruner:
      instance_name: agp
      args: {keep_mask: True}
    starting_epoch: 0
    ending_epoch: 10
    frequency: 1
  - lr_scheduler:
      instance_name: rate
    epochs: [5]
"""


def refused(text):
    with pytest.raises(RecipeError) as error:
        convert(text, "old.yaml")
    assert "\n" not in str(error.value)
    return str(error.value)


WRONG = [
    ("version: 1", "versoin: 1", "1: the schedule has no key 'versoin'. Nearest: 'version'."),
    ("pruners:", "pruner:", "2: the schedule has no key 'pruner'. Nearest: 'pruners'."),
    ("AutomatedGradualPruner", "AutomatedGradualPruning",
     "4: pruners.agp.class must be a class of Distiller, got 'AutomatedGradualPruning'. Nearest:"),
    ("    class: AutomatedGradualPruner\n", "", "3: pruners.agp needs 'class'"),
    ("AutomatedGradualPruner", "OrderedDict", "4: pruners.agp.class must be a class of Distiller"),
    ("AutomatedGradualPruner", "GroupLassoRegularizer",
     "3: pruners.agp is a regularizer (GroupLassoRegularizer). Move it to 'regularizers'."),
    ("final_sparsity", "finl_sparsity",
     "6: pruners.agp has no argument 'finl_sparsity'. Nearest: 'final_sparsity'."),
    ("    final_sparsity: 0.5\n", "",
     "3: pruners.agp needs 'final_sparsity' for AutomatedGradualPruner."),
    ("0.5", "50%", "6: pruners.agp.final_sparsity must be a number in [0, 1), got '50%'."),
    ("0.5", "1.0", "6: pruners.agp.final_sparsity must be a number in [0, 1), got 1.0."),
    ("0.5", "0.1", "6: pruners.agp.final_sparsity must be more than initial_sparsity, got 0.1."),
    ("[module.fc.weight]", "[]", "7: pruners.agp.weights must be a parameter's name or a list"),
    ("[module.fc.weight]", "[module.*.weight]",
     "7: pruners.agp.weights names 'module.*.weight', but Distiller has no patterns"),
    ("[module.fc.weight]", "[module]", "7: pruners.agp.weights names 'module', but"),
    ("StepLR", "StepLr", "10: lr_schedulers.rate.class must be a class of Distiller, got 'StepLr'. "
     "Nearest: 'StepLR'."),
    ("step_size: 45", "step_size: 4.5",
     "11: lr_schedulers.rate.step_size must be a whole number >= 1, got 4.5."),
    ("  - pruner:", "  - prune:", "13: policies.0 has no key 'prune'. Nearest: 'pruner'."),
    ("    starting_epoch: 0", "    extension: {instance_name: x}\n    starting_epoch: 0",
     "13: policies.0 has pruner and extension. Give each a policy of its own."),
    ("instance_name: agp", "instance_name: agb",
     "14: policies.0.pruner.instance_name must name a pruner of this file, got 'agb'. "
     "Nearest: 'agp'."),
    ("instance_name: agp\n", "instance: agp\n",
     "14: policies.0.pruner has no key 'instance'. Nearest: 'instance_name'."),
    ("instance_name: rate", "args: {}", "19: policies.1.lr_scheduler needs 'instance_name'."),
    ("keep_mask: True", "keep_masks: True",
     "15: policies.0.pruner.args has no key 'keep_masks'. Nearest: 'keep_mask'."),
    ("keep_mask: True", "keep_mask: 1",
     "15: policies.0.pruner.args.keep_mask must be true or false, got 1."),
    ("keep_mask: True", "levels: {fc.weight: 0.1}",
     "15: policies.0.pruner.args.levels has no meaning for AutomatedGradualPruner."),
    ("keep_mask: True", "mask_gradients: True",
     "15: policies.0.pruner.args.mask_gradients needs mask_on_forward_only: true."),
    ("    starting_epoch: 0\n", "", "13: policies.0 needs 'starting_epoch', or epochs: [...]."),
    ("starting_epoch: 0", "starting_epoch: -1",
     "16: policies.0.starting_epoch must be a whole number >= 0, got -1."),
    ("starting_epoch: 0", "starting_epoch: 10",
     "17: policies.0.ending_epoch must be more than starting_epoch (10), got 10."),
    ("frequency: 1", "frequency: 11",
     "18: policies.0.frequency must be in [1, 10], the length of the range, got 11."),
    ("frequency: 1", "frequency: 0", "18: policies.0.frequency must be in [1, 10]"),
    ("[5]", "[]", "21: policies.1.epochs must be a list of epochs that rise, got []."),
    ("[5]", "[5, 5]", "21: policies.1.epochs must be a list of epochs that rise, got [5, 5]."),
    ("    weights: [module.fc.weight]", "    weights: !!python/name:os.system",
     "7: tags are not allowed in a recipe"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "says"), WRONG, ids=lambda x: str(x)[:40])
def test_a_wrong_schedule_is_refused_by_line_and_nearest_name(old, new, says):
    assert old in FILE
    assert refused(FILE.replace(old, new, 1)).startswith(f"old.yaml:{says}")


def test_a_whole_section_or_policy_of_another_shape_is_refused():
    assert refused("pruners: [a]\npolicies: []").startswith("old.yaml:1: pruners must be a mapping")
    assert refused("pruners: {a: 3}\npolicies: []").startswith("old.yaml:1: pruners.a must be a ma")
    assert refused("policies: {}").startswith("old.yaml:1: policies must be a list, got {}")
    assert refused("version: 1").startswith("old.yaml:1: the schedule needs 'policies'.")
    assert refused("policies:\n- pruner: null\n  epochs: [1]").startswith(
        "old.yaml:2: policies.0.pruner must be a mapping, got null."
    )
    assert refused("policies:\n- epochs: [1]").startswith(
        "old.yaml:2: policies.0 needs one of pruner"
    )


def test_two_quantizers_are_refused():
    two = "quantizers:\n  a: {class: DorefaQuantizer}\n  b: {class: WRPNQuantizer}\npolicies: []"
    assert refused(two) == "old.yaml:3: quantizers.b is a second quantizer. Keep one of the two."


def test_the_untouched_file_is_accepted_with_names_made_plain():
    data, warnings = converted(FILE)
    assert warnings == []
    assert data["methods"]["agp"]["weights"] == "fc.weight"
    assert list(data) == ["recipe", "train", "methods"]
    assert data["train"]["epochs"] == 10


def test_version_may_be_absent_or_anything_and_a_text_is_one_name():
    text = FILE.removeprefix("version: 1\n").replace("[module.fc.weight]", "module.fc.weight")
    assert converted(text) == converted(FILE)
    assert converted(FILE.replace("version: 1", "version: [x, 2]")) == converted(FILE)


def test_what_no_policy_uses_is_left_out_with_a_warning():
    text = FILE.replace("lr_schedulers:", "  more: {" + AGP + "}\nlr_schedulers:")
    found = convert(text, "old.yaml")
    assert found.warnings == (
        ("unused", "old.yaml:8: pruners.more is used by no policy and left out."),
    )
    assert list(found.document.data["methods"]) == ["agp"]


def test_of_a_key_that_comes_twice_the_last_counts_with_a_warning():
    text = """\
pruners:
  s:
    class: SensitivityPruner
    sensitivities:
      module.a.weight: 0.25
      module.b.weight: 0.5
      module.a.weight: 0.75
policies:
  - {pruner: {instance_name: s}, epochs: [0]}
"""
    found = convert(text, "old.yaml")
    assert found.warnings == (
        ("duplicate-key",
         "old.yaml:7: 'module.a.weight' was on line 5 already; this one counts."),
    )  # fmt: skip
    entries = found.document.data["methods"].values()
    assert [(e["weights"], e["threshold"]) for e in entries] == [
        ("a.weight", 0.75),
        ("b.weight", 0.5),
    ]
    wrong = text.replace("0.75", "x")
    assert refused(wrong).startswith("old.yaml:7: pruners.s.sensitivities.module.a.weight must be")


def test_numbers_with_an_exponent_are_numbers():
    component = "class: L1Regularizer, reg_regims: {a.weight: 1e-6}"
    assert methods("regularizer", component)[0]["strength"] == 1e-6


def test_epochs_stand_above_a_range_and_say_so():
    timing = f"epochs: [2], {TEN}"
    (entry,) = methods("pruner", AGP, timing, warns=["ignored", "ignored", "ignored", "fixed"])
    assert entry["when"] == {"at": "2ep"}


def test_args_that_mean_nothing_are_told():
    text = schedule("lr_scheduler", "class: ExponentialLR, gamma: 0.9", args="x: 1")
    assert converted(text)[1] == ["ignored"]


def test_ids_are_made_of_names_and_never_twice():
    text = """\
extensions:
  a b.c: {class: FilterRemover, thinning_func_str: remove_filters, arch: x, dataset: y}
policies:
- {extension: {instance_name: a b.c}, epochs: [1]}
- {extension: {instance_name: a b.c}, epochs: [3]}
- {extension: {instance_name: a b.c}, epochs: [5]}
"""
    data, codes = converted(text)
    assert list(data["methods"]) == ["a_b_c", "a_b_c_2", "a_b_c_3"]
    assert codes == ["zeros-stay"] * 3


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_refuses_what_it_has_no_argument_for_and_functions(name):
    section = next(s for s, kind in SECTIONS.items() if kind == CLASSES[name].kind)
    component = f"{section}: {{c: {{class: {name}, nothing_such: 1}}}}\npolicies: []"
    assert refused(component).startswith(f"old.yaml:1: {section}.c has no argument 'nothing_such'.")
    for key, rule in CLASSES[name].args.items():
        if rule is FUNCTION:
            text = f"{section}: {{c: {{class: {name}, {key}: floor}}}}\npolicies: []"
            assert refused(text).startswith(
                f"old.yaml:1: {section}.c.{key} must be left out, as it"
            )


LONG = (
    FILE
    + """\
  - {regularizer: {instance_name: lasso, args: {keep_mask: True}}, epochs: [0, 1, 4]}
  - {pruner: {instance_name: ranked, args: {mini_batch_pruning_frequency: 4}}, epochs: [3, 4]}
  - {pruner: {instance_name: cut, args: {mask_on_forward_only: True}}, epochs: [3]}
  - {quantizer: {instance_name: q}, starting_epoch: 0, ending_epoch: 5, frequency: 1}
  - {extension: {instance_name: thin}, epochs: [4]}
regularizers:
  lasso:
    class: GroupLassoRegularizer
    reg_regims: {module.a.weight: [0.1, Channels+4D], b.weight: [0.2, 2D]}
    threshold_criteria: Max
extensions:
  thin: {class: FilterRemover, thinning_func_str: remove_filters, arch: x, dataset: mnist}
quantizers:
  q:
    class: QuantAwareTrainRangeLinearQuantizer
    bits_activations: 8
    bits_weights: 8
    mode: {activations: SYMMETRIC, weights: SYMMETRIC}
    overrides: {conv1: {bits_weights: 4}, layer.*: {bits_weights: null}}
"""
).replace(
    "lr_schedulers:",
    """\
  ranked:
    class: L1RankedStructureParameterPruner_AGP
    initial_sparsity: 0.1
    final_sparsity: 0.5
    group_type: Blocks
    kwargs: {block_shape: [1, 8, 1, 1]}
    weights: [conv.weight]
  cut: {class: MagnitudeParameterPruner, thresholds: {'*': 0.1, fc.weight: 0}}
lr_schedulers:""",
)


@settings(max_examples=300, deadline=None)
@given(damaged(LONG))
def test_a_damaged_schedule_becomes_a_recipe_or_is_refused_by_its_line(text):
    try:
        data = convert(text, "old.yaml").document.data
    except RecipeError as error:
        said = str(error)
    else:
        assert list(data) == ["recipe", "train", "methods"]
        loads(dump(data), "new.yaml")
        return
    assert re.match(r"old\.yaml:\d+: .", said), said


def test_the_undamaged_one_becomes_a_recipe():
    assert len(converted(LONG)[0]["methods"]) == 12


# ------------------------------------------------------------------ names

NAMES = [
    ("module.conv1.weight", "conv1.weight"),
    ("features.module.0.weight", "features.0.weight"),
    ("classifier.1.weight", "classifier.1.weight"),
    ("submodule.0.weight", "submodule.0.weight"),
    ("module.module_list.0.weight", "module_list.0.weight"),
    ("module.backbone.fpn.inner_blocks.2.weight", "backbone.fpn.inner_blocks.2.0.weight"),
    ("backbone.fpn.layer_blocks.0.bias", "backbone.fpn.layer_blocks.0.0.bias"),
    ("rpn.head.conv.weight", "rpn.head.conv.0.0.weight"),
    ("rpn.head.cls_logits.weight", "rpn.head.cls_logits.weight"),
    ("roi_heads.mask_head.mask_fcn1.weight", "roi_heads.mask_head.0.0.weight"),
    ("module.roi_heads.mask_head.mask_fcn4.bias", "roi_heads.mask_head.3.0.bias"),
    ("roi_heads.mask_predictor.mask_fcn_logits.weight",
     "roi_heads.mask_predictor.mask_fcn_logits.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), NAMES)
def test_names_are_those_of_the_bare_network_today(old, new):
    assert plain_name(old) == new
    assert plain_name(new) == new


def test_listed_names_come_once():
    assert listed(["module.a.weight", "a.weight", "b.weight"]) == ["a.weight", "b.weight"]


@given(st.dictionaries(st.sampled_from(["a", "b", "module.c", "d", "*"]), st.integers(0, 3)))
def test_by_value_names_every_parameter_once_and_the_star_the_rest(values):
    found = by_value(values)
    named = [(n, v) for v, selector in found if selector[0] != "**" for n in selector]
    assert sorted(named) == sorted((plain_name(n), v) for n, v in values.items() if n != "*")
    stars = [(v, selector) for v, selector in found if selector[0] == "**"]
    others = [f"!{plain_name(n)}" for n in values if n != "*"]
    assert stars == ([(values["*"], ["**", *others])] if "*" in values else [])


@given(st.sets(st.integers(0, 30), min_size=1), st.sets(st.integers(0, 30)))
def test_runs_cover_exactly_the_epochs_and_none_crosses_a_cut(epochs, cuts):
    found = list(runs(sorted(epochs), cuts))
    assert [e for start, stop in found for e in range(start, stop)] == sorted(epochs)
    assert all(cut not in range(start + 1, stop) for start, stop in found for cut in cuts)
