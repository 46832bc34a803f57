"""Thinning: masked = thinned, with the optimizer going on."""

import copy

import pytest
import torch
from torch import nn

from gracile.errors import VerificationError
from gracile.graph import surgery
from gracile.recipe.load import loads
from gracile.train.session import Session

RECIPE = """
recipe: 1
train: {epochs: 2}
methods:
  f: {prune: oneshot, weights: "type:Conv2d", granularity: filter, sparsity: 0.5, when: {at: 0ep}}
  t: {prune: thin, when: {at: 1ep}}
"""


class Net(nn.Module):
    """Conv with BatchNorm whose beta is not zero, depthwise, sigmoid, flatten, head."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6 * 4 * 4, 3)
        nn.init.normal_(self.bn.bias)

    def forward(self, x):
        x = torch.sigmoid(self.bn(self.a(x)))  # sigmoid(0) is not 0
        return self.head(torch.relu(self.b(self.dw(x))).flatten(1))


def session(model=None):
    torch.manual_seed(0)
    model = model or Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return Session(
        model,
        loads(RECIPE, name="t"),
        optimizer,
        example=torch.randn(4, 3, 4, 4),
        steps_per_epoch=1,
    )


def step(s, epoch, x):
    s.on_minibatch_begin(epoch, 0, 1)
    loss = s.before_backward_pass(epoch, 0, 1, s.model(x).square().mean())
    s.optimizer.zero_grad()
    loss.backward()
    s.optimizer.step()
    s.on_minibatch_end(epoch, 0, 1)


@pytest.mark.parametrize("mode", [True, False])
def test_masked_equals_thinned(mode):
    s = session()
    x = torch.randn(5, 3, 4, 4)
    s.model.train()
    s.on_epoch_begin(0)
    step(s, 0, x)
    masked = copy.deepcopy(s.model).train(mode)(x)
    s.on_epoch_begin(1)
    assert s.model.a.weight.shape[0] == 4
    assert s.model.dw.groups == 4
    assert s.model.head.weight.shape == (3, 3 * 16)
    torch.testing.assert_close(s.model.train(mode)(x), masked, rtol=1e-5, atol=1e-6)


def test_training_goes_on_as_if_it_were_masked():
    a, b = session(), session()
    xs = [torch.randn(4, 3, 4, 4) for _ in range(3)]
    for s in (a, b):
        s.model.train()
        s.on_epoch_begin(0)
        step(s, 0, xs[0])
    a.on_epoch_begin(1)  # cuts; b stays masked
    for x in xs[1:]:
        step(a, 1, x)
        step(b, 0, x)
    kept = b.mask("a.weight").flatten(1).any(1)
    torch.testing.assert_close(a.model.a.weight, b.model.a.weight[kept], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(a.model(xs[0]), b.model(xs[0]), rtol=1e-4, atol=1e-5)


def test_nothing_masked_is_a_warning_not_silence():
    text = RECIPE.replace("granularity: filter", "granularity: element")
    s = session()
    s = Session(Net(), loads(text, name="t"), example=torch.zeros(2, 3, 4, 4), steps_per_epoch=1)
    s.on_epoch_begin(0)
    s.on_epoch_begin(1)
    assert s.warnings[0][0] == "nothing-to-thin"


def test_a_failed_proof_leaves_model_optimizer_and_plan_untouched(monkeypatch):
    s = session()
    s.model.train()
    s.on_epoch_begin(0)
    step(s, 0, torch.randn(4, 3, 4, 4))
    before = copy.deepcopy(s.model.state_dict())
    real = surgery._cut

    def wrong(model, *args, **kwargs):
        done = real(model, *args, **kwargs)
        with torch.no_grad():
            model.b.weight.add_(0.1)
        return done

    monkeypatch.setattr(surgery, "_cut", wrong)
    with pytest.raises(VerificationError):
        s.on_epoch_begin(1)
    assert len(s.plan) == 0
    for name, value in s.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert s.overlays.addresses("mask")  # and the masks are back
