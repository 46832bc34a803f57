"""The call that prunes without a recipe."""

import pytest
import torch
from torch import nn

from gracile.analyze.cost import totals
from gracile.core.plan import Remove
from gracile.errors import BindError, UserError, VerificationError
from gracile.graph import surgery
from gracile.graph.capture import capture
from gracile.train.session import Session
from gracile.train.structure import prune_channels

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def costs(model):
    return totals(model, capture(model, X))


def test_half_of_the_channels_go_and_the_plan_repeats_it():
    result = prune_channels(net(), X, scope="layer")
    assert [m.out_channels for m in result.model if isinstance(m, nn.Conv2d)] == [4, 6]
    removes = [e for e in result.plan if isinstance(e, Remove)]
    fresh = surgery.apply(net(), removes, example=X)
    torch.testing.assert_close(fresh.eval()(X), result.model(X), rtol=0, atol=0)
    assert {e.by for e in result.plan} == {"structure"}
    assert result.ledger.shares()["parameters"]["structure"]["removed"] > 0.3


@pytest.mark.parametrize("target", ["params", "macs"])
def test_a_cost_target(target):
    result = prune_channels(net(), X, ratio=0.3, target=target)
    before, after = costs(net()), costs(result.model)
    assert getattr(after, target) <= 0.7 * getattr(before, target)
    assert getattr(after, target) > 0.5 * getattr(before, target)


def test_predicted_milliseconds():
    def predict(kept):  # only the first layer costs time
        return 0.25 * kept.get(("0.weight", 0), 8)

    result = prune_channels(net(), X, ratio=0.5, target=predict, scope="layer")
    assert result.model[0].out_channels == 4
    assert result.history["ms/structure"] == [(0.0, 1.0)]


def test_ratio_zero_changes_nothing():
    result = prune_channels(net(), X, ratio=0.0)
    assert len(result.plan) == 0
    assert costs(result.model) == costs(net())


def test_options_are_checked_like_those_of_a_recipe():
    with pytest.raises(UserError, match=r"prune.structure.ratio must be .* got 1.2"):
        prune_channels(net(), X, ratio=1.2)
    with pytest.raises(UserError, match=r"scope"):
        prune_channels(net(), X, scope="globl")
    with pytest.raises(BindError, match=r"'conv9' matches no tensor in Sequential"):
        prune_channels(net(), X, ignore=["conv9"])


def test_a_failure_leaves_no_hook_and_no_change(monkeypatch):
    def fails(s, gone, *, by, reproduce):
        raise VerificationError("differs")

    monkeypatch.setattr(Session, "cut", fails)
    model = net()
    with pytest.raises(VerificationError, match="no group of channels passes its proof"):
        prune_channels(model, X)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert costs(model) == costs(net())
