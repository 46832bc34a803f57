"""One scale for a weight with its BatchNorm folded in: what a runtime stores is on one grid."""

import pytest
import torch
from torch import nn

from gracile import registry
from gracile.benchmark.runtimes.base import load
from gracile.errors import RecipeError
from gracile.export import parity
from gracile.recipe.load import loads
from gracile.train.session import Session

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    model[1].weight.data = torch.tensor([0.1, -2.0, 5.0, 0.0])
    model[1].running_var = torch.tensor([1.0, 4.0, 0.25, 1.0])
    return model.eval()


def quantized(options, model=None):
    text = f"recipe: 1\nmethods:\n  q: {{quantize: ptq, {options}, when: {{at: end}}}}\n"
    return Session(
        model or net(), loads(text, name="r"), example=X[:2], calibration=[X]
    ).finish()  # fmt: skip


OPTIONS = "per_channel: false, fold_bn: true, half_range: false"


def test_the_folded_weight_lies_on_one_grid_by_hand():
    conv, norm = net()[0].weight, net()[1]
    f = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = conv * f.reshape(-1, 1, 1, 1)
    # a channel whose factor is 0 does not count with its weights folded, but with those it has
    dead = conv[3].abs().max()
    step = max(folded.abs().max(), dead) / 127
    result = quantized(OPTIONS)
    got = result.model.get_parameter("0.weight") * f.reshape(-1, 1, 1, 1) / step
    torch.testing.assert_close(got[:3], (folded / step).round()[:3], rtol=1e-4, atol=1e-3)
    scales = result.tensors["0.weight.weight.scale"]
    torch.testing.assert_close(scales[:3] * f.abs()[:3], step.expand(3), rtol=1e-5, atol=0)
    assert result.tensors["3.weight.weight.scale"].numel() == 1  # nothing is folded into this one


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_artifacts_compute_the_same(runtime, tmp_path):
    result = quantized(
        OPTIONS.replace("false", "true").replace("per_channel: true", "per_channel: false")
    )
    exporter = registry.get("exporter", runtime).obj
    artifact = exporter(
        result.model, result.plan, result.tensors, example=X, path=tmp_path, metadata={}
    )
    parity.require(parity.check(result.model, load(artifact), X), result.plan)


@pytest.mark.parametrize(
    "options", ["fold_bn: true", "fold_bn: true, per_channel: false, weight_symmetric: false"]
)
def test_it_is_refused_where_it_means_nothing(options):
    with pytest.raises(RecipeError, match="write per_channel: false, or leave it out"):
        loads(
            f"recipe: 1\nmethods:\n  q: {{quantize: ptq, {options}, when: {{at: end}}}}\n", name="r"
        )


def test_while_training_batch_norm_goes_on_and_the_grid_follows_it():
    method = "{quantize: qat, per_channel: false, fold_bn: true, when: {start: 0ep}}"
    text = f"recipe: 1\ntrain: {{epochs: 1}}\nmethods:\n  q: {method}\n"
    model = net()
    s = Session(
        model, loads(text, name="r"), torch.optim.SGD(model.parameters(), lr=0.1),
        example=X[:2], steps_per_epoch=4, calibration=[X],
    )  # fmt: skip
    s.model.train()
    with s.epoch():
        before = model[1].running_var.clone()
        for _ in range(4):
            s.loss(nn.functional.cross_entropy(s.model(X), torch.arange(8) % 2)).backward()
            s.step()
    result = s.finish()
    norm = result.model.get_submodule("1")
    assert not torch.equal(norm.running_var, before)
    f = (norm.weight / (norm.running_var + norm.eps).sqrt()).abs()
    live = f > 0
    steps = (result.tensors["0.weight.weight.scale"] * f)[live]
    torch.testing.assert_close(steps, steps[0].expand_as(steps))
