"""BatchNorm statistics counted anew."""

import pytest
import torch
from torch import nn

from gracile.errors import BindError
from gracile.recipe.load import loads
from gracile.train.session import Session

RECIPE = "recipe: 1\nmethods:\n  bn: {recover: batch_norm, when: {at: end}}\n"
BATCHES = [torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(k)) for k in range(3)]


def net(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip


def session(model, **more):
    return Session(model, loads(RECIPE, name="r.yaml"), example=BATCHES[0], **more)


def test_statistics_are_averages_over_the_batches():
    model = net()
    model[1].running_mean.fill_(7.0)
    s = session(model, calibration=BATCHES)
    with torch.no_grad():
        maps = [model[0](x).transpose(0, 1).flatten(1) for x in BATCHES]
    s.finish()
    torch.testing.assert_close(
        model[1].running_mean, torch.stack([m.mean(1) for m in maps]).mean(0)
    )
    torch.testing.assert_close(model[1].running_var, torch.stack([m.var(1) for m in maps]).mean(0))
    assert model[1].momentum == 0.1


def test_weights_and_modes_stay_as_they_were():
    model = net().train()
    before = {k: v.clone() for k, v in model.named_parameters()}
    s = session(model, calibration=BATCHES)
    s.methods[0].on_fire(s, 1.0)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.named_parameters())


def test_a_network_without_statistics_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(BindError, match="has no BatchNorm with running statistics"):
        session(model, calibration=BATCHES)


def test_calibration_data_is_asked_for():
    with pytest.raises(BindError, match="needs calibration data"):
        session(net())
