"""Cuts tried out on calibration data: the losses that the cuts themselves would bring."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gracile.core.method import Method, Options
from gracile.errors import BindError
from gracile.graph import surgery
from gracile.graph.capture import bare_copy
from gracile.graph.surgery import remove_edits
from gracile.recipe.load import loads
from gracile.train.session import Session

ASKER = Method("m", Options())


class Convs(nn.Module):
    """Two convolutions with BatchNorm, a head."""

    def __init__(self):
        super().__init__()
        self.a, self.bn1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.b, self.bn2 = nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.a(x)))
        return self.head(torch.relu(self.bn2(self.b(x))).mean((2, 3)))


class Normed(nn.Module):
    """A layer normalization over channels that can be cut."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x).flatten(1)))


def batches(labels=True, sizes=(8, 4)):
    g = torch.Generator().manual_seed(0)
    made = [
        (torch.randn(n, 3, 6, 6, generator=g), torch.randint(4, (n,), generator=g)) for n in sizes
    ]
    return made if labels else [x for x, _ in made]


def session(net=Convs, calibration=None, loss_of=cross_entropy, methods="{}"):
    torch.manual_seed(0)
    model = net()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
    return Session(
        model,
        loads(f"recipe: 1\ntrain: {{epochs: 2}}\nmethods: {methods}\n", name="r.yaml"),
        example=torch.randn(2, 3, 6, 6),
        steps_per_epoch=1,
        calibration=batches() if calibration is None else calibration,
        loss_of=loss_of,
    )


def cuts(s):
    return {
        g.id: remove_edits(s.groups, {g.id: [0, 2]}, "m") for g in s.groups if g.protected is None
    }


def mean_loss(model):
    with torch.no_grad():
        return sum(float(cross_entropy(model(x), y)) * len(y) for x, y in batches()) / 12


def stored(s):
    return {k: v.clone() for k, v in s.model.state_dict().items()}


@pytest.mark.parametrize(("net", "own"), [(Convs, False), (Convs, True), (Normed, False)])
def test_the_loss_is_that_of_the_cut_network(net, own):
    s = session(net)
    before = stored(s)
    got = s.losses_after(ASKER, cuts(s), own_statistics=own)
    for name, edits in {**cuts(s), None: []}.items():
        cut = surgery.apply(bare_copy(s.model), edits, example=s.example).train(own)
        assert got[name] == pytest.approx(mean_loss(cut), rel=1e-5), name
    assert len({round(v, 4) for v in got.values()}) == len(got) == (3 if net is Convs else 2)
    for name, value in s.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert s.model.training


def test_masks_of_other_methods_are_seen():
    s = session()
    s.set_mask("other", "b.weight", torch.rand(s.parameter("b.weight").shape) > 0.5)
    plain = bare_copy(s.model).eval()
    got = s.losses_after(ASKER, cuts(s))
    with torch.no_grad():
        plain.b.weight.mul_(s.mask("b.weight"))
    assert got[None] == pytest.approx(mean_loss(plain))
    cut = surgery.apply(plain, cuts(s)["a.weight"], example=s.example)
    assert got["a.weight"] == pytest.approx(mean_loss(cut), rel=1e-5)


def test_a_masked_layer_before_a_layer_normalization_is_cut_as_masked():
    s = session(Normed)
    s.set_mask("other", "conv.weight", torch.rand(s.parameter("conv.weight").shape) > 0.5)
    plain = bare_copy(s.model).eval()
    with torch.no_grad():
        plain.conv.weight.mul_(s.mask("conv.weight"))
    cut = surgery.apply(plain, cuts(s)["conv.weight"], example=s.example)
    got = s.losses_after(ASKER, cuts(s))
    assert got["conv.weight"] == pytest.approx(mean_loss(cut), rel=1e-5)


def test_tuning_is_plain_sgd_of_the_cut_network_and_leaves_the_model_alone():
    s = session()
    before, edits = stored(s), cuts(s)["a.weight"]
    cut = surgery.apply(bare_copy(s.model), edits, example=s.example).eval()
    sgd = torch.optim.SGD(cut.parameters(), lr=0.1)
    for x, y in [*batches(), batches()[0]]:  # three mini-batches of two
        sgd.zero_grad()
        cross_entropy(cut(x), y).backward()
        sgd.step()
    loss, tuned = s.tune_after(ASKER, edits, batches=3, lr=0.1)
    assert loss == pytest.approx(mean_loss(cut), rel=1e-5)
    assert not tuned["a.weight"][[0, 2]].any()
    assert not tuned["b.weight"][:, [0, 2]].any()
    torch.testing.assert_close(tuned["a.weight"][[1, 3, 4, 5]], cut.a.weight.detach())
    for name, value in s.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in s.model.parameters())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"calibration": batches(labels=False)}, "'m' needs calibration batches with labels"),
        ({"loss_of": None}, r"'m' compares losses .* loss_of="),
    ],
)
def test_what_is_missing_is_asked_for(given, match):
    s = session(**given)
    with pytest.raises(BindError, match=match):
        s.losses_after(ASKER, cuts(s))
