"""Converted configurations bind to a network, train, and leave what NNCF would."""

import copy

import pytest
import torch
from nncf_case import Net, loaded
from torch.nn import functional as F

from gracile.benchmark.processor import sums_saturate
from gracile.train.session import Session

STEPS = 3
BATCHES = [
    (torch.randn(8, 3, 8, 8, generator=g), torch.randint(4, (8,), generator=g))
    for g in [torch.Generator().manual_seed(0)]
    for _ in range(STEPS)
]


def trained(recipe, model=None):
    """The result of the recipe's training, and what `sparsity/*` curves say."""
    torch.manual_seed(0)
    model = model or Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    s = Session(
        model, recipe, optimizer, example=BATCHES[0][0], steps_per_epoch=STEPS, calibration=BATCHES,
        loss_of=F.cross_entropy,
    )  # fmt: skip
    for _ in range(recipe.train.epochs):
        with s.epoch():
            for x, y in BATCHES:
                s.model.train()
                s.loss(F.cross_entropy(s.model(x), y)).backward()
                s.step()
    return s.finish(), s.history


def zeros(result):
    """Share of zero weights over all that sparsity acts on."""
    weights = [p for p in result.model.parameters() if p.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("mode", ["global", "local"])
def test_magnitude_sparsity_reaches_its_target(mode):
    params = {"sparsity_target": 0.6, "sparsity_target_epoch": 2, "sparsity_freeze_epoch": 4}
    algorithm = {
        "algorithm": "magnitude_sparsity",
        "sparsity_init": 0.2,
        "params": {**params, "sparsity_level_setting_mode": mode},
    }
    result, history = trained(loaded(algorithm, model=Net(), epochs=5))
    assert zeros(result) == pytest.approx(0.6, abs=0.01)
    assert [v for _, v in history["sparsity/magnitude_sparsity-hold"]] == [0.6]


def test_rb_sparsity_trains_gates():
    params = {"sparsity_target": 0.5, "sparsity_target_epoch": 2, "sparsity_freeze_epoch": 9}
    algorithm = {"algorithm": "rb_sparsity", "params": params}
    optimizer = {"type": "Adam", "base_lr": 0.5}
    recipe = loaded(algorithm, model=Net(), epochs=12, optimizer=optimizer)
    result, _ = trained(recipe)
    assert zeros(result) == pytest.approx(0.5, abs=0.1)


def test_const_sparsity_keeps_what_is_zero():
    model = Net()
    with torch.no_grad():
        model.fc.weight[:, :4] = 0
    result, _ = trained(loaded({"algorithm": "const_sparsity"}, model=model, epochs=2), model)
    assert bool((result.model.fc.weight[:, :4] == 0).all())
    assert bool((result.model.fc.weight[:, 4:] != 0).all())


@pytest.mark.parametrize("importance", ["L1", "L2", "geometric_median"])
def test_filters_are_gone_in_the_end(importance):
    params = {"pruning_steps": 3, "filter_importance": importance, "prune_downsample_convs": True}
    algorithm = {"algorithm": "filter_pruning", "pruning_init": 0.1, "params": params}
    result, _ = trained(loaded(algorithm, model=Net(), epochs=4))
    assert result.model.stem.out_channels == 8
    assert result.model.layer1[0].conv1.out_channels == 4
    assert result.model.layer1[1].conv2.out_channels == 4
    assert result.model.fc.in_features == 4


def test_a_flops_target_cuts_multiply_adds():
    params = {"pruning_flops_target": 0.4, "pruning_steps": 2, "prune_first_conv": True}
    algorithm = {"algorithm": "filter_pruning", "params": params}
    model = Net()
    result, history = trained(loaded(algorithm, model=model, epochs=3), model)
    before = history["macs/filter_pruning"][0][1]
    assert history["macs/filter_pruning"][-1][1] == pytest.approx(0.6 * before, rel=0.1)
    assert result.plan.of_kind("remove")


def test_a_learned_ranking_is_learned_once_and_cuts_to_each_level():
    params = {"pruning_flops_target": 0.4, "pruning_steps": 2, "prune_first_conv": True}
    params |= {"interlayer_ranking_type": "learned_ranking", "all_weights": True}
    search = {"generations": 4, "train_steps": 1, "max_pruning": 0.6}
    algorithm = {"algorithm": "filter_pruning", "params": {**params, "legr_params": search}}
    algorithm["params"]["prune_downsample_convs"] = True
    result, history = trained(loaded(algorithm, model=Net(), epochs=3))
    macs = [v for _, v in history["macs/filter_pruning"]]
    assert macs[-1] == pytest.approx(0.6 * macs[0], rel=0.1)
    assert [t for t, _ in history["loss/filter_pruning"]] == [0.0]
    assert result.plan.of_kind("remove")


def test_sparsity_quantization_and_distillation_together():
    sparsity = {"algorithm": "magnitude_sparsity", "params": {"sparsity_target_epoch": 1}}
    kd = {"algorithm": "knowledge_distillation", "type": "softmax", "temperature": 2}
    adapt = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 16}}
    quantization = {
        "algorithm": "quantization",
        "initializer": adapt,
        "ignored_scopes": ["{re}fc"],
        "activations": {"mode": "asymmetric"},
    }
    result, history = trained(loaded(sparsity, quantization, kd, model=Net(), epochs=3))
    bits = {e.at: e for e in result.plan.of_kind("bits")}
    assert "stem.weight" in bits
    assert "fc.weight" not in bits
    assert {e.by for e in result.plan.of_kind("mask")} == {"magnitude_sparsity-hold"}
    assert history["sparsity/magnitude_sparsity"]


def test_stages_and_single_scopes_own_their_weights():
    params = {"activations_quant_start_epoch": 1, "weights_quant_start_epoch": 2}
    precision = {
        "type": "manual",
        "bitwidth_per_scope": [[4, "Net/NNCFLinear[fc]/linear_0|WEIGHT"]],
    }
    algorithm = {
        "algorithm": "quantization",
        "params": params,
        "initializer": {"precision": precision},
    }
    result, _ = trained(loaded(algorithm, model=Net(), epochs=3))
    found = {e.at: (e.bits, e.by) for e in result.plan.of_kind("bits") if e.role == "weight"}
    assert found["fc.weight"] == (4, "quantization-weights")
    assert found["stem.weight"] == (8 - sums_saturate(), "quantization-weights")


def test_without_training_weights_are_on_their_grid():
    model = Net()
    dense = copy.deepcopy(model.stem.weight)
    recipe = loaded({"algorithm": "quantization"}, model=model)
    result = Session(model, recipe, example=BATCHES[0][0], calibration=BATCHES).finish()
    assert {e.bits for e in result.plan.of_kind("bits")} == {8, 8 - sums_saturate()}
    assert not torch.equal(result.model.get_parameter("stem.weight"), dense)
