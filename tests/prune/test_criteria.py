"""Criteria worked out by hand, and what they get to see in a session."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.errors import BindError
from gracile.prune.criteria.geometric_median import geometric_median
from gracile.prune.criteria.lamp import lamp
from gracile.prune.criteria.normed import normed
from gracile.prune.criteria.signed_taylor import signed_taylor
from gracile.prune.evidence import Evidence
from gracile.prune.selection import finished, noisy
from gracile.recipe.load import loads
from gracile.train.session import Session


def test_lamp_by_hand():
    # squares 4, 1, 9: tails 9+4=13, 9+4+1=14, 9
    torch.testing.assert_close(
        lamp(torch.tensor([[2.0, -1.0, 3.0]])), torch.tensor([[4 / 13, 1 / 14, 1.0]])
    )
    assert lamp(torch.zeros(3)).tolist() == [0, 0, 0]


def test_geometric_median_prefers_filters_far_from_all_others():
    w = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    assert geometric_median(w).sum(1).tolist() == pytest.approx([15, 10, 15])
    opposite = torch.tensor([[1.0], [-1.0], [4.0]])
    assert geometric_median(opposite).sum(1).tolist() == pytest.approx([5, 7, 8])
    assert geometric_median(opposite, sign_aware=True).sum(1).tolist() == pytest.approx([3, 3, 6])


def test_normed_ranks_layers_of_different_scale_alike():
    w = torch.randn(8)
    torch.testing.assert_close(normed(w), normed(100 * w))
    assert normed(torch.zeros(2)).tolist() == [0, 0]


def test_the_sign_goes_after_summing():
    assert finished(torch.tensor([-3.0, 2.0]), "abs").tolist() == [3, 2]
    assert finished(torch.tensor([-3.0, 2.0]), "sum").tolist() == [-3, 2]


def test_the_signed_sum_puts_what_helps_most_first():
    w, g = torch.tensor([2.0, -1.0, 1.0]), torch.tensor([0.5, 1.0, -3.0])
    assert signed_taylor(w, g).tolist() == [1.0, -1.0, -3.0]


def test_noise_hits_with_its_chance():
    rng = torch.Generator().manual_seed(0)
    hit = noisy(torch.ones(10_000), 0.3, rng) != 1
    assert hit.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(noisy(torch.ones(5), 0.0, rng), torch.ones(5))


class Net(nn.Module):
    """Two convolutions with BatchNorm, a linear head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        return self.head(F.relu(x + self.conv2(x)).mean((2, 3)))


X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def session(options: str, *, epochs: int = 2, **more) -> Session:
    torch.manual_seed(0)
    recipe = loads(
        f"recipe: 1\ntrain: {{epochs: {epochs}}}\nmethods:\n  m: {{prune: gradual, {options}}}\n",
        name="r.yaml",
    )
    model = Net().eval()
    with torch.no_grad():
        model.bn.weight.copy_(torch.tensor([0.5, -2.0, 0.1, 1.0]))
        model.bn.bias.copy_(torch.tensor([0.0, 9.0, -9.0, 0.0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return Session(model, recipe, optimizer, example=X, steps_per_epoch=1, **more)


FILTERS = "weights: [conv, conv2], granularity: filter, sparsity: 0.25, when: {at: 0ep}"
CALIBRATION = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def removed(s: Session, address: str = "conv.weight") -> list[int]:
    return (~s.mask(address).flatten(1).any(1)).nonzero().flatten().tolist()


def step(s: Session, epoch: int) -> None:
    s.on_epoch_begin(epoch)
    s.on_minibatch_begin(epoch, 0, 1)
    loss = s.before_backward_pass(epoch, 0, 1, F.cross_entropy(s.model(X), Y))
    loss.backward()
    s.before_parameter_optimization(epoch, 0, 1)
    s.optimizer.step()
    s.optimizer.zero_grad()
    s.on_minibatch_end(epoch, 0, 1)
    s.on_epoch_end(epoch)


class Chain(nn.Module):
    """Layers whose channels are not tied to each other."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.relu(self.bn(self.conv(x))).mean((2, 3)))


def test_activations_are_those_behind_the_nonlinearity():
    s = session(f"criterion: apoz, {FILTERS}", calibration=CALIBRATION)
    (m,) = s.methods
    m.evidence.gather(m, s, ["conv.weight", "conv2.weight"])
    (zeros,) = m.evidence.of(s, "conv.weight")
    with torch.no_grad():
        inner = F.relu(s.model.bn(s.model.conv(X)))
        outer = F.relu(inner + s.model.conv2(inner))
    torch.testing.assert_close(zeros, (inner == 0).float().mean((0, 2, 3)))
    torch.testing.assert_close(
        m.evidence.of(s, "conv2.weight")[0], (outer == 0).float().mean((0, 2, 3))
    )
    mean = Evidence("m", ("activation_mean",))
    mean.gather(m, s, ["conv.weight"])
    torch.testing.assert_close(mean.of(s, "conv.weight")[0], inner.mean((0, 2, 3)))


@pytest.mark.parametrize("criterion", ["apoz", "mean_activation"])
def test_a_filter_that_never_fires_goes_first(criterion):
    s = session(f"criterion: {criterion}, rank_by: first, {FILTERS}", calibration=CALIBRATION)
    s.on_epoch_begin(0)
    assert removed(s) == [2]  # its BatchNorm's bias is -9


def test_the_filter_that_fires_most_goes_first_where_one_says_so():
    criterion = "{name: mean_activation, highest_first: true}"
    s = session(f"criterion: {criterion}, rank_by: first, {FILTERS}", calibration=CALIBRATION)
    s.on_epoch_begin(0)
    assert removed(s) == [1]  # its BatchNorm's bias is 9


def test_the_listed_leader_may_be_behind_in_the_network():
    reversed_ = FILTERS.replace("[conv, conv2]", "[conv2, conv]")
    found = []
    for options in (f"rank_by: first, {FILTERS}", f"rank_by: listed, {FILTERS}",
                    f"rank_by: listed, {reversed_}"):  # fmt: skip
        s = session(options)
        with torch.no_grad():
            s.model.conv.weight[3] = s.model.conv2.weight[0] = 1e-3
        s.on_epoch_begin(0)
        found.append(removed(s))
    assert found == [[3], [3], [0]]
    (m,) = session(f"rank_by: listed, {FILTERS}".replace("[conv, conv2]", "['!head']")).methods
    assert m.leaders == m.addresses


def test_norm_scale_ranks_by_magnitude():
    s = session(f"criterion: norm_scale, rank_by: first, {FILTERS}")
    s.on_epoch_begin(0)
    assert removed(s) == [2]  # 0.1; -2 is large


def test_without_a_norm_behind_it_the_message_names_the_layer():
    s = session("criterion: norm_scale, weights: head, sparsity: 0.5, when: {at: 0ep}")
    with pytest.raises(BindError, match="no BatchNorm with a scale follows 'head'"):
        s.on_epoch_begin(0)


def test_gradients_come_from_training_where_there_was_some():
    s = session(
        "criterion: snip, weights: conv, sparsity: 0.5, when: {start: 1ep, stop: 2ep}", epochs=2
    )
    s.model.train()
    w = s.parameter("conv.weight")
    loss = F.cross_entropy(Net.forward(s.model, X), Y)
    (grad,) = torch.autograd.grad(loss, w)
    step(s, 0)
    s.on_epoch_begin(1)
    gone = ~s.mask("conv.weight").flatten()
    order = (w.detach() * grad).abs().flatten().argsort(stable=True)
    assert set(gone.nonzero().flatten().tolist()) == set(order[:54].tolist())


def test_before_any_step_they_come_from_calibration():
    s = session(
        "criterion: fisher, weights: conv, sparsity: 0.5, when: {at: 0ep}",
        calibration=CALIBRATION,
        loss_of=F.cross_entropy,
    )
    w = s.parameter("conv.weight")
    squares = torch.zeros_like(w)
    for x, y in CALIBRATION:
        (g,) = torch.autograd.grad(F.cross_entropy(s.model(x), y), w)
        squares += g**2 / 2
    s.model.train()
    s.on_epoch_begin(0)
    assert s.model.training
    assert w.grad is None
    order = (w.detach() ** 2 * squares / 2).flatten().argsort(stable=True)
    gone = ~s.mask("conv.weight").flatten()
    assert set(gone.nonzero().flatten().tolist()) == set(order[:54].tolist())


def test_a_gradient_that_nobody_made_is_asked_for():
    s = session(
        "criterion: taylor, weights: conv, sparsity: 0.5, when: {at: 0ep}", calibration=CALIBRATION
    )
    with pytest.raises(BindError, match="ranks by gradients before any were made"):
        s.on_epoch_begin(0)


def test_activations_need_calibration_and_say_so_at_once():
    with pytest.raises(BindError, match="needs calibration data"):
        session(f"criterion: apoz, {FILTERS}")


def test_random_ranking_repeats_and_changes_with_the_firing():
    options = (
        "criterion: random, weights: head, sparsity: {ramp: linear, initial: 0.5, final: 0.5}, "
        "scores_from: dense, when: {start: 0ep, stop: 2ep}"
    )
    seen = []
    for _ in range(2):
        s = session(options)
        for epoch in range(2):
            s.on_epoch_begin(epoch)
            seen.append(s.mask("head.weight").flatten().tolist())
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]


def test_taylor_cuts_filters_in_structured_pruning():
    torch.manual_seed(0)
    recipe = loads(
        "recipe: 1\nmethods:\n  m: {prune: structure, ratio: 0.5, criterion: taylor, "
        "scope: layer, when: {at: end}}\n",
        name="r.yaml",
    )
    model = Chain().eval()
    s = Session(model, recipe, example=X, calibration=CALIBRATION, loss_of=F.cross_entropy)
    totals = torch.zeros(4)
    for x, y in CALIBRATION:
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), model.conv.weight)
        totals += (grads[0] * model.conv.weight.detach()).sum((1, 2, 3)) / 2
    keep = totals.abs().argsort(stable=True)[2:].sort().values
    before = model.conv.weight.detach().clone()
    result = s.finish()
    torch.testing.assert_close(result.model.conv.weight.detach(), before[keep])
    assert result.model(X).isfinite().all()
