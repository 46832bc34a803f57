import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nncf_case import Net, converted, entry, loaded

from gracile.core.lr import make
from gracile.core.ramps import exponential_with_bias
from gracile.core.schedule import Calendar
from gracile.errors import RecipeError
from gracile.recipe.explain import timetable_rows
from gracile.recipe.nncf import convert

NET = Net()
MAGNITUDE = {"algorithm": "magnitude_sparsity"}
RB = {"algorithm": "rb_sparsity"}
FILTERS = {"algorithm": "filter_pruning"}
QUANTIZATION = {"algorithm": "quantization"}
SHARES = st.floats(0, 0.99)


def levels(recipe, option="sparsity", steps=5):
    """epoch -> level of the recipe's entries, the last firing of an epoch counting."""
    rows = timetable_rows(recipe, Calendar(recipe.train.epochs, steps))
    return {r.epoch: r.levels[option] for r in rows if option in r.levels}


# ------------------------------------------------------------------ schedules


@given(SHARES, SHARES, st.integers(1, 20), st.floats(0.2, 4), st.booleans())
def test_polynomial_levels_are_nncfs(initial, target, last, power, concave):
    params = {"sparsity_target": target, "sparsity_target_epoch": last, "power": power}
    algorithm = {**MAGNITUDE, "sparsity_init": initial, "params": {**params, "concave": concave}}
    for epoch, level in levels(loaded(algorithm, epochs=30)).items():
        p = min(1, epoch / last)
        way = 1 - (1 - p) ** power if concave else p**power
        assert level == pytest.approx(initial + (target - initial) * way)


@given(SHARES, SHARES, st.integers(1, 20))
def test_exponential_levels_are_nncfs(initial, target, last):
    params = {"sparsity_target": target, "sparsity_target_epoch": last}
    algorithm = {**RB, "sparsity_init": initial, "params": params}
    for epoch, level in levels(loaded(algorithm, epochs=30)).items():
        density = (1 - initial) * ((1 - target) / (1 - initial)) ** min(1, epoch / last)
        assert level == pytest.approx(1 - density)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=4, unique=True), st.data())
def test_multistep_levels_are_nncfs(steps, data):
    wanted = sorted(data.draw(st.lists(SHARES, min_size=len(steps) + 1, max_size=len(steps) + 1)))
    params = {
        "schedule": "multistep",
        "multistep_steps": steps,
        "multistep_sparsity_levels": wanted,
    }
    found = levels(loaded({**MAGNITUDE, "params": params}, epochs=30))
    for epoch, level in found.items():
        assert level == pytest.approx(wanted[sum(s <= epoch for s in steps)])


def test_levels_of_every_step_are_nncfs():
    params = {"sparsity_target_epoch": 2, "power": 1, "update_per_optimizer_step": True}
    recipe = loaded({**MAGNITUDE, "params": {**params, "steps_per_epoch": 5}}, epochs=4)
    rows = timetable_rows(recipe, Calendar(4, 5))
    ramp = [r.levels["sparsity"] for r in rows if r.id == "magnitude_sparsity"]
    assert ramp == pytest.approx([0.5 * k / 10 for k in range(11)])  # epoch + step / 5, of 2
    hold = [(r.epoch, r.batch) for r in rows if r.id == "magnitude_sparsity-hold"]
    assert hold == [(e, b) for e in (2, 3) for b in range(5)][1:]


def test_only_the_polynomial_schedule_knows_steps():
    for algorithm, schedule in ((MAGNITUDE, "exponential"), (RB, None), (MAGNITUDE, "multistep")):
        params = {"schedule": schedule} if schedule else {}
        found = entry({**algorithm, "params": {**params, "update_per_optimizer_step": True}})
        assert found["when"]["every"] == "1ep"


@given(st.floats(0.0, 0.3), st.floats(0.5, 0.9), st.integers(9, 40), st.integers(0, 5))
def test_filter_levels_are_nncfs(initial, target, n, warm):
    params = {"pruning_target": target, "pruning_steps": n, "num_init_steps": warm}
    algorithm = {**FILTERS, "pruning_init": initial, "params": params}
    found = levels(loaded(algorithm, epochs=60, model=NET))
    assert sorted(found) == [*range(warm, warm + n)]
    for epoch, level in found.items():
        density = (1 - initial) * ((1 - target) / (1 - initial)) ** ((epoch - warm) / (n - 1))
        assert level == pytest.approx(1 - density)


@given(st.floats(0.0, 0.3), st.floats(0.5, 0.9))
def test_with_bias_three_quarters_of_the_target_are_there_after_an_eighth(initial, target):
    params = {"schedule": "exponential_with_bias", "pruning_target": target}
    ramp = entry({**FILTERS, "pruning_init": initial, "params": params}, model=NET)["sparsity"][
        "ramp"
    ]
    reach = 0.75 if ramp == "exponential_with_bias" else ramp["reach"]
    assert exponential_with_bias(0.125, initial, target, reach=reach) == pytest.approx(
        0.75 * target
    )


def test_baseline_goes_to_the_target_after_the_first_epochs():
    params = {"schedule": "baseline", "num_init_steps": 3, "pruning_target": 0.4}
    found = entry({**FILTERS, "params": params}, model=NET)
    assert (found["sparsity"], found["when"]) == (0.4, {"at": "3ep"})


# ------------------------------------------------------------------ sparsity


def test_masks_are_ranked_anew_until_they_freeze():
    params = {"sparsity_target_epoch": 2, "sparsity_freeze_epoch": 6, "weight_importance": "abs"}
    methods = converted({**MAGNITUDE, "params": params}, epochs=9)[0]["methods"]
    ramp, hold = methods.values()
    assert (ramp["criterion"], ramp["scope"], ramp["scores_from"]) == ("l1", "global", "dense")
    assert (ramp["lifetime"], ramp["when"]["stop"]) == ("span", "3ep")
    assert hold["sparsity"] == 0.5
    assert hold["when"] == {"start": "3ep", "stop": "6ep", "every": "1ep"}


def test_a_freeze_right_after_the_target_needs_no_second_entry():
    params = {"sparsity_target_epoch": 2, "sparsity_freeze_epoch": 3}
    methods = converted({**MAGNITUDE, "params": params}, epochs=9)[0]["methods"]
    assert list(methods) == ["magnitude_sparsity"]
    assert "lifetime" not in methods["magnitude_sparsity"]


def test_a_target_at_epoch_0_is_there_from_the_start():
    params = {"sparsity_target_epoch": 0, "sparsity_freeze_epoch": 1}
    assert entry({**MAGNITUDE, "params": params}, epochs=3)["when"] == {"at": "0ep"}
    found = entry({**MAGNITUDE, "params": {"sparsity_target_epoch": 0}}, epochs=3)
    assert found["when"] == {"start": "0ep", "stop": "3ep", "every": "1ep"}


def test_rb_has_the_released_loss_its_freeze_and_the_scripts_optimizer():
    params = {"sparsity_target": 0.52, "sparsity_target_epoch": 5, "sparsity_freeze_epoch": 10}
    optimizer = {"type": "SGD", "base_lr": 0.1}
    found = entry(
        {**RB, "params": params, "compression_lr_multiplier": 2}, epochs=40, optimizer=optimizer
    )
    assert (found["loss"], found["freeze"], found["scope"]) == ("released", "10ep", "global")
    assert (found["gate_optimizer"], found["gate_lr"]) == ("sgd", 0.2)


def test_rb_adaptive_has_nncfs_step_and_tolerance():
    params = {"schedule": "adaptive", "patience": 2, "sparsity_level_setting_mode": "local"}
    recipe = loaded({**RB, "sparsity_init": 0.1, "params": params}, epochs=50)
    options = recipe.methods["rb_sparsity"].options
    assert options.schedule.model_dump() == {
        "name": "adaptive",
        "initial": 0.1,
        "step": 0.05,
        "patience": 2,
        "tolerance": 0.03,
    }
    assert (options.sparsity.final, options.scope) == (0.5, "layer")


def test_const_sparsity_keeps_zeros():
    assert entry({"algorithm": "const_sparsity"}, model=NET) == {
        "prune": "keep_zeros",
        "weights": ["type:_ConvNd", "type:Linear"],
    }


# ------------------------------------------------------------------ scopes


def test_scopes_become_selectors():
    ignored = {**MAGNITUDE, "ignored_scopes": "Net/NNCFLinear[fc]/linear_0"}
    assert entry(ignored)["weights"] == ["type:_ConvNd", "type:Linear", "!fc"]
    target = {**MAGNITUDE, "target_scopes": ["{re}.*Block.*"], "ignored_scopes": [r"{re}conv1\]"]}
    assert entry(target, model=NET)["weights"] == ["layer1.0.conv2", "layer1.1.conv2"]


def test_scopes_that_need_the_model_or_match_nothing_are_refused_with_their_line():
    text = '{"compression": {"algorithm": "const_sparsity",\n"ignored_scopes": ["{re}.*xyz.*"]}}'
    with pytest.raises(RecipeError, match=r"c:2: compression\.ignored_scopes has '{re}.*--model"):
        convert(text, name="c")
    with pytest.raises(RecipeError, match="matches no module"):
        convert(text, name="c", model_names=NET)
    lenient = text.replace("}}", ', "validate_scopes": false}}')
    recipe, warnings = convert(lenient, name="c", model_names=NET)
    assert recipe["methods"]["const_sparsity"]["weights"] == ["type:_ConvNd", "type:Linear"]
    assert any(w.startswith("c:2:") and "matches no module" in w for w in warnings)


def test_filters_leave_the_first_and_the_strided_convolutions_alone():
    assert entry(FILTERS, model=NET)["weights"] == [
        *("type:_ConvNd", "!stem", "!layer1.0.conv1", "!layer1.1.conv1")
    ]
    both = {"prune_first_conv": True, "prune_downsample_convs": True}
    assert entry({**FILTERS, "params": both}, model=NET)["weights"] == ["type:_ConvNd"]
    _, warnings = converted(FILTERS)
    assert sum("needs the model" in w for w in warnings) == 2


# ------------------------------------------------------------------ filters, distillation


def test_filters_are_masked_and_cut_at_the_end():
    methods = converted(FILTERS, model=NET)[0]["methods"]
    assert [m.get("prune") for m in methods.values()] == ["gradual", "thin"]
    assert methods["filter_pruning"]["criterion"] == "l2"
    assert methods["filter_pruning-thin"]["when"] == {"at": "end"}


@pytest.mark.parametrize(
    ("importance", "criterion", "told"),
    [("L1", "normed", 0), ("L2", "normed", 1), ("geometric_median", "geometric_median", 1)],
)
def test_all_weights_ranks_normalized_layers_together(importance, criterion, told):
    params = {"filter_importance": importance, "all_weights": True}
    recipe, warnings = converted({**FILTERS, "params": params}, model=NET)
    found = recipe["methods"]["filter_pruning"]
    assert (found["criterion"], found["scope"]) == (criterion, "global")
    assert sum("all_weights" in w for w in warnings) == told


def test_a_target_in_flops_is_a_share_of_the_macs():
    params = {"pruning_flops_target": 0.4, "schedule": "baseline"}
    found = entry({**FILTERS, "params": params}, model=NET)
    assert (found["prune"], found["target"], found["ratio"]) == ("structure", "macs", 0.4)
    assert found["ignore"] == ["stem", "layer1.0.conv1", "layer1.1.conv1"]


LEARNED = {
    "interlayer_ranking_type": "learned_ranking",
    "all_weights": True,
    "pruning_flops_target": 0.4,
}


def test_a_learned_ranking_has_nncfs_numbers():
    params = {**LEARNED, "schedule": "baseline", "filter_importance": "L1"}
    recipe, warnings = converted({**FILTERS, "params": params}, model=NET, epochs=2)
    found = recipe["methods"]["filter_pruning"]
    assert (found["prune"], found["target"], found["ratio"]) == ("legr", "macs", 0.4)
    assert found["ignore"] == ["stem", "layer1.0.conv1", "layer1.1.conv1"]
    assert (found["criterion"], found["start"], found["when"]) == ("l1", "none", {"at": "0ep"})
    assert [found[k] for k in ("generations", "population", "samples", "mutate")] == [
        *(400, 64, 16, 0.1)
    ]
    assert (found["ft_batches"], "learn_at" in found) == (200, False)  # judged at its target
    assert recipe["data"] == {"calibration": 512}
    assert [w for w in warnings if "tries 400 candidates, each after 200 mini-batches" in w]
    assert not [w for w in warnings if "NNCF uses what it has learned only" in w]
    loaded({**FILTERS, "params": params}, model=NET, epochs=2)


def test_the_search_of_a_learned_ranking_is_the_files():
    search = {"generations": 7, "train_steps": 3, "max_pruning": 0.8, "random_seed": 1}
    params = {**LEARNED, "pruning_steps": 4, "legr_params": search}
    recipe, warnings = converted({**FILTERS, "params": params}, model=NET)
    found = recipe["methods"]["filter_pruning"]
    assert (found["generations"], found["ft_batches"], found["learn_at"]) == (7, 3, 0.8)
    assert found["when"] == {"start": "0ep", "stop": "4ep", "every": "1ep"}
    assert [w for w in warnings if "legr_params.random_seed is the recipe's 'seed'" in w]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"all_weights": False}, "NNCF uses what it has learned only with all_weights: true"),
        ({"pruning_flops_target": None}, "NNCF uses what it has learned only"),
        ({"load_ranking_coeffs_path": "a.json"}, "load_ranking_coeffs_path .* learned anew"),
        ({"save_ranking_coeffs_path": "a.json"}, "save_ranking_coeffs_path is left out: the led"),
    ],
)
def test_what_is_different_in_a_learned_ranking_is_told(more, message):
    recipe, warnings = converted({**FILTERS, "params": {**LEARNED, **more}}, model=NET)
    assert recipe["methods"]["filter_pruning"]["prune"] == "legr"
    assert len([w for w in warnings if re.search(message, w)]) == 1
    by = "channels" if more.get("pruning_flops_target", 0) is None else "macs"
    assert recipe["methods"]["filter_pruning"]["target"] == by


def test_a_learned_ranking_of_some_layers_is_refused():
    algorithm = {**FILTERS, "params": LEARNED, "target_scopes": ["{re}layer1"]}
    with pytest.raises(RecipeError, match=r"target_scopes cannot go with learned_ranking\. Name"):
        converted(algorithm, model=NET)


@pytest.mark.parametrize("scale", [0.5, 1, 3])
def test_distillation_adds_scale_times_its_loss_to_the_tasks(scale):
    kd = {
        "algorithm": "knowledge_distillation",
        "type": "softmax",
        "scale": scale,
        "temperature": 2,
    }
    recipe, warnings = converted(kd, epochs=1)
    found = recipe["methods"]["knowledge_distillation"]
    assert found == {"distill": "kd", "scale": scale, "loss": "soft", "temperature": 2}
    assert [w for w in warnings if "no 'epochs'" not in w] == []
    mse = loaded({**kd, "type": "mse"}).methods["knowledge_distillation"].options
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])
    got = mse.loss.fn(student, teacher, temperature=mse.temperature, t2=mse.t2)
    assert (got.item(), mse.scale) == (pytest.approx(2.0), scale)  # whatever the temperature


def test_the_soft_loss_has_the_gradient_of_nncfs():
    # NNCF: -mean(log_softmax(s / T) * softmax(t / T)) * classes * T^2
    g, t = torch.Generator().manual_seed(0), 2.0
    s, teacher = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    s.requires_grad_()
    q = (teacher / t).softmax(1)
    nncf = -((s / t).log_softmax(1) * q).mean() * 7 * t**2
    options = (
        loaded({"algorithm": "knowledge_distillation", "type": "softmax", "temperature": t})
        .methods["knowledge_distillation"]
        .options
    )
    ours = options.loss.fn(s, teacher, temperature=options.temperature, t2=options.t2)
    (a,), (b,) = torch.autograd.grad(nncf, s), torch.autograd.grad(ours, s)
    torch.testing.assert_close(a, b)
    entropy = -(q * q.log()).sum(1).mean() * t**2
    torch.testing.assert_close(nncf - ours, entropy)


# ------------------------------------------------------------------ quantization


def test_without_training_it_is_ptq_and_with_training_qat():
    assert entry(QUANTIZATION)["when"] == {"at": "end"}
    assert entry(QUANTIZATION, epochs=2)["quantize"] == "qat"


def test_presets_modes_and_bits():
    plain = entry(QUANTIZATION)
    assert (plain["symmetric"], plain["weight_symmetric"]) == (True, True)
    mixed = entry({**QUANTIZATION, "preset": "mixed"})
    assert (mixed["symmetric"], mixed["weight_symmetric"]) == (False, True)
    weights = {"bits": 4, "mode": "asymmetric", "per_channel": True}
    found = entry({**QUANTIZATION, "weights": weights, "activations": {"bits": 6}})
    assert (found["bits"], found["weight_bits"], found["per_channel"]) == (6, 4, True)
    assert found["weight_symmetric"] is False


@pytest.mark.parametrize(
    ("kind", "observer"),
    [
        ("mixed_min_max", "mean_extremes"),
        ("mean_min_max", "mean_extremes"),
        ("min_max", "min_max"),
        ("percentile", {"name": "percentile", "q": 99.9}),
        ("mean_percentile", {"name": "mean_percentile", "q": 99.9}),
        ("threesigma", "three_sigma"),
    ],
)
def test_range_types_are_observers(kind, observer):
    start = {"range": {"type": kind, "num_init_samples": 100}}
    recipe, _ = converted({**QUANTIZATION, "initializer": start})
    assert recipe["methods"]["quantization"]["observer"] == observer
    assert recipe["data"] == {"calibration": 100}


def test_ranges_for_one_group_of_quantizers_leave_the_other_alone():
    ranges = [{"type": "percentile", "target_quantizer_group": "weights"}]
    found = entry({**QUANTIZATION, "initializer": {"range": ranges}})
    assert (found["observer"], found["weight_observer"]["name"]) == ("mean_extremes", "percentile")


@pytest.mark.parametrize(
    ("activations", "weights", "ids"),
    [
        (2, 2, {"quantization": ("2ep", 4)}),
        (3, 12, {"quantization": ("3ep", 16), "quantization-weights": ("12ep", 4)}),
        (12, 3, {"quantization-weights": ("3ep", 4), "quantization": ("12ep", 4)}),
    ],
)
def test_stages_begin_at_their_epochs(activations, weights, ids):
    params = {"activations_quant_start_epoch": activations, "weights_quant_start_epoch": weights}
    recipe, _ = converted(
        {**QUANTIZATION, "weights": {"bits": 4}, "params": {**params, "batch_multiplier": 2}}
    )
    found = {k: (m["when"]["start"], m["weight_bits"]) for k, m in recipe["methods"].items()}
    assert found == ids
    assert [*found] == [*ids]
    assert recipe["train"]["epochs"] == 1 + max(activations, weights)
    assert recipe["train"]["accumulate"] == 2
    assert recipe["train"]["optimizer"] == {"class": "Adam", "lr": 1e-3, "weight_decay": 1e-5}


def test_bits_of_single_scopes_are_entries_of_their_own():
    by_hand = [
        *([4, "Net/NNCFLinear[fc]/linear_0|WEIGHT"], [8, "Net/NNCFConv2d[stem]/conv2d_0|WEIGHT"]),
        [4, "Net/Sequential[layer1]/Block[0]/ReLU[relu]/relu__1|OUTPUT"],
        [4, "/nncf_model_input_0|OUTPUT"],
    ]
    precision = {"type": "manual", "bitwidth_per_scope": by_hand}
    overrides = {"weights": {"{re}Block": {"mode": "asymmetric", "bits": 6}}}
    more = {"initializer": {"precision": precision}, "scope_overrides": overrides}
    recipe, warnings = converted({**QUANTIZATION, **more}, model=NET)
    whole, six = recipe["methods"].values()
    assert (six["weight_bits"], six["weight_symmetric"], len(six["weights"])) == (6, False, 4)
    assert (six["after"], whole["weight_bits"]) == ("quantization", 8)
    assert whole["overrides"] == [
        {"weights": ["fc"], "weight_bits": 4},
        {"activations": "layer1.0.relu_1", "bits": 4},
    ]
    assert any("'/nncf_model_input_0|OUTPUT' 4 bits: left out" in w for w in warnings)


def test_hawq_becomes_precision():
    precision = {"type": "hawq", "bits": [4, 8], "iter_number": 7, "compression_ratio": 1.6}
    recipe, warnings = converted({**QUANTIZATION, "initializer": {"precision": precision}})
    (entry,) = recipe["methods"].values()
    assert entry["precision"] == {
        "bits": [[4, 4], [8, 8]],
        "limit": {"mac_bits": 0.625},
        "sensitivity": "hessian",
        "samples": 100,
        "rounds": 7,
        "tolerance": 1e-4,
    }
    assert "weight_bits" not in entry
    assert any("integer program over all assignments" in w for w in warnings)


def test_hawq_begins_for_weights_and_activations_at_once():
    more = {"initializer": {"precision": {"type": "hawq"}}}
    params = {"activations_quant_start_epoch": 1, "weights_quant_start_epoch": 3}
    recipe, warnings = converted({**QUANTIZATION, **more, "params": params})
    (entry,) = recipe["methods"].values()
    assert entry["when"] == {"start": "3ep"}
    assert any("which begin at the later epoch" in w for w in warnings)


@pytest.mark.parametrize(
    ("more", "half_range"),
    [
        ({}, None),
        ({"overflow_fix": "enable"}, True),
        ({"overflow_fix": "disable"}, False),
        ({"disable_saturation_fix": True}, False),
    ],
)
def test_overflow_fix_becomes_half_range(more, half_range):
    recipe, _ = converted({**QUANTIZATION, **more}, model=NET)
    assert next(iter(recipe["methods"].values())).get("half_range") is half_range


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"quantize_inputs": False}, "quantize_inputs is decided by"),
        ({"overflow_fix": "first_layer_only"}, "overflow_fix is done for all layers or none"),
        ({"activations": {"per_channel": True}}, "activations.per_channel is not there"),
        ({"activations": {"unified_scale_ops": [["a", "b"]]}}, "unified_scale_ops follow"),
        ({"scope_overrides": {"activations": {"a": {"bits": 4}}}}, "activations is left out"),
    ],
)
def test_what_gracile_has_not_is_told(more, text):
    assert any(text in w for w in converted({**QUANTIZATION, **more})[1])
    assert not any(text in w for w in converted(QUANTIZATION)[1])


def test_quantization_comes_last_and_batch_norm_after_it():
    adapt = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 500}}
    recipe, _ = converted({**QUANTIZATION, "initializer": adapt}, MAGNITUDE, epochs=9)
    assert [*recipe["methods"]][-2:] == ["quantization", "batchnorm_adaptation"]
    assert recipe["methods"]["batchnorm_adaptation"] == {
        "recover": "batch_norm",
        "when": {"at": "0ep"},
    }
    assert recipe["data"] == {"calibration": 500}


# ------------------------------------------------------------------ the root


@pytest.mark.parametrize(
    ("optimizer", "lr"),
    [
        ({}, {"class": "StepLR", "step_size": 30, "gamma": 0.1}),
        (
            {"schedule_type": "multistep", "steps": [2, 4], "gamma": 0.2},
            {"class": "MultiStepLR", "milestones": [2, 4], "gamma": 0.2},
        ),
        ({"schedule_type": "poly"}, {"class": "PolynomialLR", "total_iters": 8, "power": 0.9}),
        ({"schedule_type": "exponential", "gamma": 0.5}, {"class": "ExponentialLR", "gamma": 0.5}),
        (
            {"schedule_type": "plateau", "schedule_params": {"threshold": 0.1, "patience": 3}},
            {
                "class": "ReduceLROnPlateau",
                "factor": 0.1,
                "mode": "max",
                "threshold_mode": "abs",
                "threshold": 0.001,
                "patience": 3,
            },
        ),
    ],
)
def test_the_scripts_optimizer_is_the_recipes(optimizer, lr):
    more = {"type": "SGD", "base_lr": 0.1, **optimizer}
    recipe = loaded(epochs=8, optimizer=more, batch_size=32)
    assert recipe.train.batch_size == 32
    assert recipe.train.optimizer.arguments == {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    assert recipe.train.lr == lr


def test_rb_turns_the_default_weight_decay_off():
    recipe, _ = converted(RB, epochs=9, optimizer={})
    assert recipe["train"]["optimizer"] == {"class": "Adam", "lr": 1e-4, "weight_decay": 0.0}


def test_the_scripts_own_keys_are_tolerated_and_listed():
    _, warnings = converted(QUANTIZATION, model_name="resnet", pretrained=True, epochs=1)
    assert sum("['model_name', 'pretrained']" in w for w in warnings) == 1


def test_epochs_are_those_given_then_the_files_then_what_the_schedules_need():
    text = '{"epochs": 20, "compression": {"algorithm": "rb_sparsity"}}'
    assert convert(text, name="c")[0]["train"]["epochs"] == 20
    assert convert(text, name="c", epochs=4)[0]["train"]["epochs"] == 4
    recipe, warnings = converted({**MAGNITUDE, "params": {"sparsity_target_epoch": 7}})
    assert recipe["train"]["epochs"] == 8
    assert any("no 'epochs'" in w for w in warnings)


def test_a_schedule_that_ends_after_training_is_told():
    _, warnings = converted(MAGNITUDE, epochs=5)
    assert any("last level at epoch 90, after the 5 epochs" in w for w in warnings)
    params = {"sparsity_target_epoch": 7, "sparsity_freeze_epoch": 5}
    _, warnings = converted({**MAGNITUDE, "params": params}, epochs=20)
    assert any("is not after epoch 7" in w for w in warnings)


def aware(mode, **params):
    return {"accuracy_aware_training": {"mode": mode, "params": params}}


def test_accuracy_awareness_is_a_section_of_the_recipe():
    root = aware(
        "adaptive_compression_level",
        maximal_relative_accuracy_degradation=1.5,
        initial_training_phase_epochs=8,
        patience_epochs=2,
        lr_reduction_factor=0.3,
    )
    params = {"sparsity_target_epoch": 3}
    recipe = loaded({**MAGNITUDE, "params": params}, epochs=None, **root)
    assert recipe.accuracy.model_dump() == {
        "mode": "adaptive",
        "max_drop": 1.5,
        "relative": True,
        "method": None,
        "step": 0.1,
        "shrink": 0.5,
        "min_step": 0.025,
        "min_level": 0.05,
        "max_level": 0.95,
        "patience": 2,
        "lr_factor": 0.3,
        "max_epochs": 10000,
    }
    assert recipe.train.epochs == 8
    assert [*recipe.methods] == ["magnitude_sparsity"]  # one entry, whose level can be varied


def test_early_exit_trains_at_most_so_long():
    root = aware("early_exit", maximal_absolute_accuracy_degradation=1, maximal_total_epochs=30)
    recipe = loaded(QUANTIZATION, **root)
    assert (recipe.accuracy.mode, recipe.accuracy.max_drop) == ("early_exit", 1)
    assert recipe.accuracy.relative is False
    assert (recipe.train.epochs, recipe.methods["quantization"].method) == (30, "qat")


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '\n"algorithm": "rb_sparcity"',
            r"c:2: compression has an unknown algo.*Nearest: 'rb_spars",
        ),
        ('"algoritm": "rb_sparsity"', r"c:1: compression needs 'algorithm'"),
        ('"algorithm": "rb_sparsity",\n"parms": {}', r"c:2: compression has no key 'parms'"),
        (
            '"algorithm": "rb_sparsity", "params": {\n"schedule": "polinomial"}',
            r"c:2: compression\.params\.schedule must be .* Nearest: 'polynomial'",
        ),
        (
            '"algorithm": "rb_sparsity", "params": {\n\n"sparsity_target": 50}',
            r"c:3: compression\.params\.sparsity_target must be .*got 50",
        ),
        (
            '"algorithm": "quantization", "initializer": {"range": {\n"type": "minmax"}}',
            r"c:2: compression\.initializer\.range\.type must be",
        ),
        (
            '"algorithm": "filter_pruning", "params": {"legr_params": {\n"max_pruning": 1}}',
            r"c:2: compression\.params\.legr_params\.max_pruning must be .*got 1",
        ),
        (
            '"algorithm": "quantization", "initializer": {"precision": {\n"type": "autoq"}}',
            r"c:2: .*autoq, a search of bit widths",
        ),
        (
            '"algorithm": "magnitude_sparsity", "params": {\n"schedule": "adaptive"}',
            r"c:2: .*schedule is for rb_sparsity only",
        ),
        (
            '"algorithm": "magnitude_sparsity", "params": {"schedule": "multistep",\n'
            '"multistep_sparsity_levels": [0.5]}',
            r"c:2: .*one level more than there are steps, 2, got 1",
        ),
        (
            '"algorithm": "movement_sparsity", "params": {"warmup_start_epoch": 2,\n'
            '"warmup_end_epoch": 2, "importance_regularization_factor": 0.1}',
            r"c:2: .*warmup_end_epoch must be after warmup_start_epoch \(2\), got 2",
        ),
    ],
)
def test_wrong_algorithms_are_named_with_line_and_nearest(text, message):
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        convert(f'{{"compression": {{{text}}}}}', name="c")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"compresion": []', r"c:1: compresion is no key of it\. Nearest: 'compression'"),
        ('"target_device": "TPU"', r"target_device must be"),
        ('"compression": 3', r"compression must be a mapping, got 3"),
        ('"epochs": 1.5', r"epochs must be a whole number, got 1\.5"),
        ('"optimizer": {"type": "Adam", "lr": 1}', r"optimizer\.lr is not known"),
        ('"optimizer": {"schedule_type": "cosine"}', r"schedule_type must be a known one"),
        ('"optimizer": {"schedule_type": "multistep"}', r"needs 'steps'"),
        ('"bootstrapNAS": {}', r"bootstrapNAS is a search over sub-networks"),
        ('"accuracy_aware_training": {"mode": "early_exit", "params": {}}', "needs maximal_rel"),
    ],
)
def test_wrong_roots_are_named(text, message):
    with pytest.raises(RecipeError, match=message):
        convert(f"{{{text}}}", name="c")


def test_the_four_stages_of_binarization():
    params = {
        "activations_quant_start_epoch": 10,
        "weights_quant_start_epoch": 30,
        "lr_poly_drop_start_epoch": 60,
        "lr_poly_drop_duration_epochs": 30,
        "disable_wd_start_epoch": 60,
        "base_lr": 1e-3,
        "base_wd": 1e-5,
    }
    algorithm = {"algorithm": "binarization", "mode": "dorefa", "params": params}
    assert entry(algorithm, epochs=90) == {
        "quantize": "binary",
        "weights": ["type:_ConvNd"],
        "form": "dorefa",
        "activations_from": "10ep",
        "when": {"start": "30ep"},
        "decay_until": "60ep",
    }
    recipe = loaded(algorithm, epochs=90)
    assert recipe.train.optimizer.class_ == "Adam"
    rate = make(recipe.train.lr, base_lr=1e-3, epochs=90, steps_per_epoch=1)
    assert [rate.lr(e, e) for e in (0, 59, 60)] == [1e-3] * 3
    assert rate.lr(75, 75) == pytest.approx(1e-3 * (1 - 15 / 30))
    late = {**algorithm, "params": {**params, "disable_wd_start_epoch": 90}}
    assert "decay_until" not in entry(late, epochs=90)
