"""Bits chosen within a size beat 4 bits everywhere and random choices of that size: ResNet-20."""

import random

import pytest
import torch
from torch.nn import functional as F

from gracile.data.loader import Loader, calibration_batches
from gracile.data.sets import open_data
from gracile.models.spec import resolve
from gracile.models.weights import load_weights
from gracile.recipe.load import loads
from gracile.train.session import Session

SHARE = 0.55


@pytest.fixture(scope="module")
def compress(data_dir, models_dir):
    """Options -> (distance of the outputs to the float network's, bytes, bits of weights)."""
    bundle = open_data(f"parquet:{data_dir / 'cifar10-exact-subset'}")
    calibration = list(calibration_batches(bundle, 128, 64).batches(0))
    images = [x for x, _ in Loader(bundle.test, 250, mean=bundle.mean, std=bundle.std)][:2]

    def network():
        model = resolve("resnet20_cifar_a", num_classes=bundle.classes).model.eval()
        load_weights(model, models_dir / "resnet20-cifar10.safetensors")
        return model

    @torch.no_grad()
    def outputs(model):
        return torch.cat([model(x) for x in images])

    float_outputs = outputs(network()).softmax(1)

    def run(options):
        line = f"q: {{quantize: ptq, half_range: false, {options}, when: {{at: end}}}}"
        s = Session(
            network(),
            loads(f"recipe: 1\nmethods:\n  {line}\n"),
            example=images[0][:2],
            calibration=calibration,
            loss_of=F.cross_entropy,
        )
        result = s.finish()
        bits = {e.at: e.bits for e in result.plan.of_kind("bits") if e.role == "weight"}
        size = sum(result.model.get_parameter(a).numel() * b / 8 for a, b in bits.items())
        found = outputs(result.model).log_softmax(1)
        return F.kl_div(found, float_outputs, reduction="batchmean").item(), size, bits

    return run


def random_bits(numel, budget, seed):
    """Weights with 8 bits, at random, as long as they fit."""
    names = sorted(numel)
    random.Random(seed).shuffle(names)
    left, chosen = budget - sum(numel.values()) / 2, []
    for name in names:
        if numel[name] / 2 <= left:
            chosen.append(name)
            left -= numel[name] / 2
    return chosen


@pytest.mark.slow
def test_chosen_bits_are_closer_to_the_float_network(compress):
    uniform, smallest, bits = compress("weight_bits: 4")
    mixed, size, _ = compress(f"precision: {{bits: [4, 8], limit: {{size: {SHARE}}}}}")
    assert size <= SHARE * 2 * smallest
    assert mixed < 0.75 * uniform
    model = resolve("resnet20_cifar_a").model
    numel = {a: model.get_parameter(a).numel() for a in bits}
    others = []
    for seed in range(2):
        chosen = ", ".join(random_bits(numel, size, seed))
        others.append(
            compress(f"weight_bits: 4, overrides: [{{weights: [{chosen}], weight_bits: 8}}]")[0]
        )
    assert mixed < min(others)
