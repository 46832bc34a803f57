"""Regularizers, extensions, quantizers and learning rates of Distiller as parts of a recipe."""

import pytest
from distiller_case import SECTIONS, TEN, converted, methods, schedule

from gracile import registry
from gracile.core import lr
from gracile.errors import RecipeError
from gracile.recipe import loads
from gracile.recipe.distiller import convert
from gracile.recipe.distiller.grammar import LR_SCHEDULERS, PRUNERS, QUANTIZERS, REGULARIZERS
from gracile.recipe.document import dump

SPAN = {"start": "0ep", "stop": "10ep"}


def refused(kind, component, timing=TEN, args=""):
    with pytest.raises(RecipeError, match=r"^old\.yaml:\d+: ") as error:
        converted(schedule(kind, component, timing, args))
    return str(error.value).split(": ", 1)[1]


# ------------------------------------------------------------------ regularizers


def test_l1():
    component = "class: L1Regularizer, reg_regims: {a.weight: 0.1, b.weight: 0.2, c.weight: 0.1}"
    first, second = methods("regularizer", component)
    assert first == {
        "regularize": "penalty", "weights": ["a.weight", "c.weight"], "penalty": "l1",
        "granularity": "element", "strength": 0.1, "when": SPAN,
    }  # fmt: skip
    assert second == {**first, "weights": "b.weight", "strength": 0.2}
    zeroing, _ = methods("regularizer", f"{component}, threshold_criteria: anything")
    zeroed = {"threshold": "strength", "threshold_on": "mean_abs", "keep_mask": False}
    assert zeroing == first | zeroed
    kept, _ = methods(
        "regularizer", f"{component}, threshold_criteria: anything", TEN, "keep_mask: True"
    )
    assert kept == first | zeroed | {"keep_mask": True}


LASSO = {"name": "group_lasso", "eps": 1e-8}


@pytest.mark.parametrize(
    ("group", "parts"),
    [
        ("2D", [("kernel", "group_lasso")]),
        ("Rows", [("row", "group_lasso")]),
        ("Cols", [("column", "group_lasso")]),
        ("Rows+Cols", [("row", "group_lasso"), ("column", "group_lasso")]),
        ("Cols+Rows", [("column", "group_lasso"), ("row", "group_lasso")]),
        ("Channels", [("channel", LASSO)]),
        ("Filters", [("filter", "group_lasso")]),
        ("3D", [("filter", "group_lasso")]),
        ("4D", [("layer", "group_lasso")]),
        ("Channels+4D", [("channel", LASSO), ("layer", "group_lasso")]),
        ("4D+Channels", [("layer", "group_lasso"), ("channel", LASSO)]),
    ],
)
def test_group_lasso(group, parts):
    component = f"class: GroupLassoRegularizer, reg_regims: {{a.weight: [0.1, {group}]}}"
    entries = methods("regularizer", component)
    assert [(e["granularity"], e["penalty"]) for e in entries] == parts
    assert all("threshold" not in e for e in entries)
    maxed = methods("regularizer", f"{component}, threshold_criteria: Max")
    assert all((e["threshold"], e["threshold_on"]) == ("strength", "max") for e in maxed)
    assert "Nearest: 'Mean_Abs'" in refused(
        "regularizer", f"{component}, threshold_criteria: MeanAbs"
    )
    assert "must be '2D' or" in refused("regularizer", component.replace(group, "5D"))


def test_group_variance():
    component = "class: GroupVarianceRegularizer, reg_regims: {a.weight: [8e-6, Channels]}"
    (entry,) = methods("regularizer", component)
    assert entry == {
        "regularize": "penalty", "weights": "a.weight", "penalty": "group_variance",
        "granularity": "channel", "strength": 8e-6, "when": SPAN,
    }  # fmt: skip
    assert "must be 'Channels', got 'Filters'" in refused(
        "regularizer", component.replace("Channels", "Filters")
    )
    assert "has no argument 'threshold_criteria'" in refused(
        "regularizer", f"{component}, threshold_criteria: Max"
    )


def test_a_strength_of_zero_is_left_out_and_a_star_refused():
    zero = "class: L1Regularizer, reg_regims: {a.weight: 0, b.weight: 0.1}"
    assert len(methods("regularizer", zero, warns=["ignored"])) == 1
    star = "class: L1Regularizer, reg_regims: {'*': 0.1}"
    assert "names '*', but Distiller has no patterns" in refused("regularizer", star)


def test_only_the_epochs_of_the_policy_count():
    component = (
        "class: GroupLassoRegularizer, reg_regims: {a.weight: [0.1, Filters]}, "
        "threshold_criteria: Max"
    )
    timing = "starting_epoch: 2, ending_epoch: 7, frequency: 2"
    entries = methods("regularizer", component, timing, "keep_mask: True")
    assert [(e["when"]["start"], e["when"]["stop"], e["keep_mask"]) for e in entries] == [
        ("2ep", "3ep", False), ("4ep", "5ep", False), ("6ep", "7ep", True),
    ]  # fmt: skip
    cut = methods("regularizer", component, timing, "keep_mask: True", epochs=5)
    assert len(cut) == 2


THINNING = """\
regularizers:
  lasso:
    class: GroupLassoRegularizer
    reg_regims: {a.weight: [0.1, Channels]}
    threshold_criteria: Mean_Abs
extensions:
  thin: {class: ChannelRemover, thinning_func_str: remove_channels, arch: x, dataset: cifar10}
policies:
- {extension: {instance_name: thin}, epochs: [8]}
- regularizer: {instance_name: lasso, args: {keep_mask: True}}
  starting_epoch: 0
  ending_epoch: 10
  frequency: 1
"""


def test_a_regularizer_lays_masks_where_an_extension_cuts():
    data, codes = converted(THINNING)
    assert codes == []
    entries = list(data["methods"].items())
    assert entries[0] == ("thin", {"prune": "thin", "when": {"at": "8ep"}})
    spans = [(e["when"], e["keep_mask"]) for _, e in entries[1:]]
    assert spans == [
        ({"start": "0ep", "stop": "8ep"}, True), ({"start": "8ep", "stop": "10ep"}, True),
    ]  # fmt: skip
    none = THINNING.replace("    threshold_criteria: Mean_Abs\n", "")
    assert [e["when"] for e in converted(none)[0]["methods"].values()][1:] == [SPAN]


# ------------------------------------------------------------------ extensions


@pytest.mark.parametrize("cls", ["StructureRemover", "FilterRemover", "ChannelRemover"])
@pytest.mark.parametrize("fn", ["remove_filters", "remove_channels", "contract_model"])
def test_removers_thin_at_each_epoch(cls, fn):
    component = f"class: {cls}, thinning_func_str: {fn}, arch: resnet20_cifar, dataset: cifar10"
    nothing_before = ["zeros-stay"]
    assert methods("extension", component, "epochs: [3]", warns=nothing_before) == [
        {"prune": "thin", "when": {"at": "3ep"}}
    ]
    assert methods("extension", component, "epochs: [3, 7]", warns=nothing_before) == [
        {"prune": "thin", "when": {"at": ["3ep", "7ep"]}}
    ]
    assert "Nearest: 'remove_filters'" in refused(
        "extension", component.replace(fn, "remove_filter")
    )


# ------------------------------------------------------------------ quantizers


def test_ptq_needs_no_policy_and_no_training():
    data, codes = converted("quantizers: {q: {class: PostTrainLinearQuantizer}}")
    assert codes == []
    assert data["train"]["epochs"] == 0
    assert data["methods"] == {
        "q": {"quantize": "ptq", "bits": 8, "symmetric": True, "weight_symmetric": True,
              "per_channel": False, "observer": "min_max", "when": {"at": "end"}},
    }  # fmt: skip


def test_ptq_comes_after_training_whatever_its_policy_says():
    text = schedule("quantizer", "class: PostTrainLinearQuantizer")
    (entry,) = methods("quantizer", "class: PostTrainLinearQuantizer", warns=["fixed"])
    assert entry["when"] == {"at": "end"}
    assert converted(text)[0]["train"]["epochs"] == 10


PTQ = """\
quantizers:
  q:
    class: PostTrainLinearQuantizer
    bits_activations: 8
    bits_parameters: 6
    mode: {activations: ASYMMETRIC_UNSIGNED, weights: symmetric_restricted}
    per_channel_wts: True
    %s
"""


@pytest.mark.parametrize(
    ("line", "warns", "more"),
    [
        ("bits_accum: 32", [], {}),
        ("bits_accum: 16", ["ignored"], {}),
        ("model_activation_stats: stats/r18.yaml", ["beside-recipe"], {"ranges": "stats/r18.yaml"}),
        ("clip_acts: None", [], {}),
        ("clip_acts: avg", [], {"observer": "mean_extremes"}),
        ("clip_acts: N_STD\n    clip_n_stds: 2.5", [],
         {"observer": {"name": "three_sigma", "n": 2.5, "spread": "std"}}),
        ("clip_acts: GAUSS", [], {"observer": {"name": "aciq", "distribution": "gauss"}}),
        ("clip_acts: Laplace\n    also_clip_weights: True", [],
         {"observer": {"name": "aciq", "distribution": "laplace"},
          "weight_observer": {"name": "aciq", "distribution": "laplace"}}),
        ("clip_half_range: True", [], {}),
        ("scale_approx_mult_bits: 8", ["ignored"], {}),
        ("also_clip_weights: True", [], {}),
        ("save_fp_weights: True", [], {}),
        ("inputs_quant_auto_fallback: False", [], {}),
        ("fpq_module: null", [], {}),
        ("fp16: False", [], {}),
        ("overrides:", [], {}),
    ],
)  # fmt: skip
def test_every_argument_of_ptq(line, warns, more):
    data, codes = converted(PTQ % line)
    assert codes == warns
    entry = data["methods"]["q"]
    assert entry == {
        "quantize": "ptq", "bits": 8, "weight_bits": 6, "symmetric": False,
        "weight_symmetric": True, "per_channel": True, "observer": "min_max",
        "when": {"at": "end"}, **more,
    }  # fmt: skip


@pytest.mark.parametrize("line", ["fp16: True", "fpq_module: 16", "fpq_module: '32'"])
def test_half_precision_has_no_counterpart(line):
    with pytest.raises(RecipeError, match=r"old.yaml:8: quantizers.q.fp\w+ has no counterpart"):
        converted(PTQ % line)


WRONG = [
    ("bits_activations: 17", "bits_activations must be in [2, 16], or 32 for none, got 17"),
    ("bits_parameters: 1", "bits_parameters must be in [2, 16], or 32 for none, got 1"),
    ("bits_activations: 0", "bits_activations must be a whole number >= 1, or null, got 0"),
    ("mode: SYMETRIC", "mode must be SYMMETRIC or"),
    ("clip_acts: AVERAGE", "clip_acts must be 'NONE' or"),
    ("clip_acts: N_STD", "clip_acts is N_STD and needs clip_n_stds"),
    ("overrides: {conv1: {acts: 4}}", "overrides.conv1 has no key 'acts'"),
    ("overrides: {'conv(': {bits_weights: 4}}", "overrides.conv( is no regular expression"),
    ("overrides: {conv1: {input_overrides: {0: {from_outputs: True}}}}",
     "input_overrides.0 has no key 'from_outputs'. Nearest: 'from_output'"),
    ("bits_parameters: null", "quantizes no weights, which recipes cannot tell"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "says"), WRONG)
def test_wrong_arguments_of_ptq(line, says):
    with pytest.raises(RecipeError, match=r"^old\.yaml:1: quantizers\.q") as error:
        converted(f"quantizers: {{q: {{class: PostTrainLinearQuantizer, {line}}}}}")
    assert says in str(error.value)


def test_overrides_choose_weights_and_their_bits():
    text = """\
quantizers:
  q:
    class: PostTrainLinearQuantizer
    bits_activations: 8
    overrides:
      layer.*conv.*: {bits_weights: 4}
      module.conv1: {bits_weights: null, bits_activations: null}
      .*conv2: {bits_weights: 8}
      fc: {bits_weights: 4}
      relu1: {bits_activations: 4}
      add: {input_overrides: {0: {clip_acts: AVG}, 1: {from_output: True}}}
"""
    data, codes = converted(text)
    assert codes == ["approximated", "approximated"]
    (entry,) = data["methods"].values()
    assert (entry["bits"], "weights" in entry, "activations" in entry) == (8, False, False)
    assert entry["overrides"] == [
        {"weights": r"re:(?:conv1)\.weight", "bits": "float"},
        {
            "weights": r"re:(?:fc|(?!(?:conv1)\.weight$)(?:layer.*conv.*))\.weight",
            "weight_bits": 4,
        },
    ]


def test_weights_alone_may_be_chosen_by_overrides():
    text = """\
quantizers:
  q:
    class: PostTrainLinearQuantizer
    bits_activations: null
    bits_parameters: null
    overrides:
      layer.*conv.*: {bits_activations: null, bits_weights: 4}
      layer.*relu.*: {bits_activations: 4, quantize_inputs: False}
      layer4.1.conv2: {bits_activations: null, bits_weights: null}
"""
    data, codes = converted(text)
    assert codes == ["approximated"]
    (entry,) = data["methods"].values()
    assert entry["weights"] == [
        r"re:(?:(?!(?:layer4\.1\.conv2)\.weight$)(?:layer.*conv.*))\.weight"
    ]
    assert (entry["bits"], "activations" in entry) == (4, False)


@pytest.mark.parametrize(
    "cls", ["QuantAwareTrainRangeLinearQuantizer", "NCFQuantAwareTrainQuantizer"]
)
def test_qat(cls):
    component = (
        f"class: {cls}, bits_activations: 8, bits_weights: 4, bits_bias: 32, "
        "mode: ASYMMETRIC_UNSIGNED, ema_decay: 0.99, per_channel_wts: True"
    )
    (entry,) = methods("quantizer", component)
    assert entry == {
        "quantize": "qat", "bits": 8, "weight_bits": 4, "symmetric": False,
        "weight_symmetric": False, "per_channel": True,
        "observer": {"name": "moving_average", "momentum": 0.99}, "when": {"start": "0ep"},
    }  # fmt: skip
    (plain,) = methods("quantizer", f"class: {cls}, bits_weights: 8")
    assert (plain["bits"], plain["activations"]) == (8, False)
    assert plain["observer"]["momentum"] == 0.999
    late = "starting_epoch: 3, ending_epoch: 7, frequency: 1"
    methods("quantizer", component, late, epochs=9, warns=["fixed", "approximated"])
    methods("quantizer", component.replace("bits_bias: 32", "bits_bias: 8"), warns=["ignored"])


def test_inputs_of_qat_are_the_profiles():
    component = "class: QuantAwareTrainRangeLinearQuantizer, bits_activations: 8, bits_weights: 8"
    methods("quantizer", f"{component}, quantize_inputs: True")
    methods("quantizer", f"{component}, quantize_inputs: False", warns=["ignored"])
    methods("quantizer", f"{component}, num_bits_inputs: 4", warns=["ignored"])


@pytest.mark.parametrize(
    ("cls", "method", "more"),
    [
        ("DorefaQuantizer", "dorefa", {}),
        ("WRPNQuantizer", "wrpn", {}),
        ("PACTQuantizer", "pact", {"clip_init": 6.0, "clip_decay": 0.001}),
    ],
)
def test_methods_of_later_versions_are_written_with_their_name(cls, method, more):
    own = ", act_clip_init_val: 6, act_clip_decay: 0.001" if more else ""
    component = (
        f"class: {cls}, bits_activations: 4, bits_weights: 3, "
        f"overrides: {{conv1: {{bits_weights: null, bits_activations: null}}}}{own}"
    )
    there = f"quantize/{method}" in registry.names("method")
    data, codes = converted(schedule("quantizer", component))
    assert data["methods"]["c"] == {
        "quantize": method, "bits": 4, "weight_bits": 3,
        "overrides": [{"weights": r"re:(?:conv1)\.weight", "bits": "float"}],
        **more, "when": {"start": "0ep"},
    }  # fmt: skip
    if there:
        assert codes == []
        return
    assert codes == ["no-method"]
    with pytest.raises(RecipeError, match=f"known quantize method, got '{method}'"):
        loads(dump(data))


def test_a_quantizer_that_no_policy_uses_is_left_out_but_ptq():
    text = "quantizers: {q: {class: DorefaQuantizer}}\npolicies: []"
    assert converted(text) == (converted("policies: []")[0], ["unused"])


# ------------------------------------------------------------------ learning rates

RATES = [
    ("class: StepLR, step_size: 45, gamma: 0.1", {"step_size": 45, "gamma": 0.1}),
    ("class: MultiStepLR, milestones: [3, 7], gamma: 0.5", {"milestones": [3, 7], "gamma": 0.5}),
    ("class: ExponentialLR, gamma: 0.95", {"gamma": 0.95}),
    ("class: CosineAnnealingLR, T_max: 10, eta_min: 0.01", {"T_max": 10, "eta_min": 0.01}),
    ("class: CosineAnnealingWarmRestarts, T_0: 3, T_mult: 2, eta_min: 0",
     {"T_0": 3, "T_mult": 2, "eta_min": 0}),
    ("class: PolynomialLR, T_max: 10, power: 2", {"total_iters": 10, "power": 2}),
    ("class: MultiStepMultiGammaLR, milestones: [3, 7], gammas: [0.5, 0.1]",
     {"milestones": [3, 7], "gammas": [0.5, 0.1]}),
    ("class: ReduceLROnPlateau, mode: max, factor: 0.5, patience: 3, verbose: True, "
     "threshold: 0.01, threshold_mode: abs, cooldown: 2, min_lr: 0.001, eps: 1e-9",
     {"mode": "max", "factor": 0.5, "patience": 3, "threshold": 0.01, "threshold_mode": "abs",
      "cooldown": 2, "min_lr": 0.001, "eps": 1e-9}),
    ("class: CyclicLR, base_lr: 0.01, max_lr: 0.1, step_size_up: 3, step_size_down: 4, "
     "mode: triangular2, gamma: 0.9, scale_mode: cycle, cycle_momentum: False, "
     "base_momentum: 0.8, max_momentum: 0.9",
     {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "step_size_down": 4,
      "mode": "triangular2", "gamma": 0.9, "cycle_momentum": False, "base_momentum": 0.8,
      "max_momentum": 0.9}),
    ("class: OneCycleLR, max_lr: 0.1, total_steps: 20, pct_start: 0.2, anneal_strategy: linear, "
     "cycle_momentum: True, base_momentum: 0.8, max_momentum: 0.9, div_factor: 10, "
     "final_div_factor: 100",
     {"max_lr": 0.1, "total_steps": 20, "pct_start": 0.2, "anneal_strategy": "linear",
      "cycle_momentum": True, "base_momentum": 0.8, "max_momentum": 0.9, "div_factor": 10,
      "final_div_factor": 100}),
]  # fmt: skip


@pytest.mark.parametrize(("component", "args"), RATES, ids=lambda x: str(x)[:30])
def test_learning_rates(component, args):
    data, codes = converted(schedule("lr_scheduler", component))
    assert codes == []
    cls = component.split(",")[0].removeprefix("class: ")
    assert data["train"]["lr"] == {
        "class": "Spans",
        "spans": [{"start": 0, "stop": 10, "schedule": {"class": cls, **args}}],
    }
    assert data["methods"] == {}


def test_rates_that_are_wrong():
    many = "class: MultiStepMultiGammaLR, milestones: [3, 7], gammas: [0.5]"
    assert "gammas must be as many as milestones (2)" in refused("lr_scheduler", many)
    order = "class: MultiStepLR, milestones: [7, 3]"
    assert "milestones must rise, got [7, 3]" in refused("lr_scheduler", order)
    assert "Nearest: 'gamma'" in refused(
        "lr_scheduler", "class: MultiStepLR, milestones: [3], gammas: 0.1"
    )


def test_policies_of_rates_follow_each_other_and_may_be_lists():
    text = """\
lr_schedulers:
  a: {class: ExponentialLR, gamma: 0.9}
  b: {class: StepLR, step_size: 5}
policies:
- {lr_scheduler: {instance_name: a}, starting_epoch: 2, ending_epoch: 8, frequency: 3}
- {lr_scheduler: {instance_name: b}, epochs: [10, 12]}
"""
    data, _ = converted(text)
    five = {"class": "StepLR", "step_size": 5}
    assert data["train"]["lr"]["spans"] == [
        {"start": 2, "stop": 8, "every": 3, "schedule": {"class": "ExponentialLR", "gamma": 0.9}},
        {"start": 10, "stop": 11, "schedule": five},
        {"start": 12, "stop": 13, "schedule": five},
    ]
    schedule_ = lr.make(data["train"]["lr"], base_lr=1.0, epochs=13, steps_per_epoch=None)
    rates = [schedule_.lr(e, 0) for e in range(14)]
    assert rates == pytest.approx(
        [1, 1, 1, 0.9**3, 0.9**3, 0.9**3, *[0.9**6] * 5, 0.01, 0.01, 0.01]
    )


# ------------------------------------------------------------------ training


def test_what_the_command_line_of_distiller_says_is_given_or_its_default():
    text = schedule("lr_scheduler", "class: ExponentialLR, gamma: 0.9")
    data, _ = converted(text)
    assert {k: v for k, v in data["train"].items() if k != "lr"} == {
        "epochs": 10,
        "batch_size": 256,
        "optimizer": {"class": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    }
    data, _ = converted(text, epochs=3, batch_size=64, lr=0.5, momentum=0.8, weight_decay=0.0)
    assert data["train"]["epochs"] == 3
    assert data["train"]["batch_size"] == 64
    assert data["train"]["optimizer"] == {
        "class": "SGD", "lr": 0.5, "momentum": 0.8, "weight_decay": 0.0,
    }  # fmt: skip


def test_every_class_has_its_conversion():
    from gracile.recipe.distiller import pruners, quantizers

    assert pruners._CLASSES.keys() == PRUNERS.keys()
    assert quantizers.METHODS.keys() == QUANTIZERS.keys()
    assert len(REGULARIZERS) == 3
    theirs = {name if name != "LambdaLR" else "StepLR" for name in LR_SCHEDULERS}
    assert theirs <= lr._KINDS.keys()
    assert set(SECTIONS) == {"pruner", "regularizer", "quantizer", "extension", "lr_scheduler"}


def test_bytes_and_text_read_alike():
    text = schedule("lr_scheduler", "class: ExponentialLR, gamma: 0.9")
    assert convert(text.encode(), "a").document == convert(text, "a").document
