"""Hybrid recipes: whole filters first, single weights of what is left then; two on one tensor.

What is asked is that the second method works on what the first one left, loses nothing of it, and
that Plan, masks and weights of the result tell the same.
"""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gracile
from gracile.analyze.cost import totals
from gracile.graph.capture import capture
from gracile.recipe.load import loads
from gracile.train.checkpoint import load_state, save_state
from gracile.train.session import Session

EPOCHS, STEPS = 4, 3
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(99))
CONVS = ("stem.weight", "inner.weight", "outer.weight")
AGP = (
    '  weights: {prune: gradual, weights: "type:Conv2d", '
    "sparsity: {ramp: agp, initial: 0.1, final: 0.6}, when: {start: 1ep, stop: 4ep}}\n"
)
FILTERS = {
    "greedy": "  filters: {prune: greedy, ratio: 0.4, target: macs, when: {at: 1ep}}\n",
    "structure": "  filters: {prune: structure, ratio: 0.4, target: macs, when: {at: 1ep}}\n",
    "masked and thinned": "  filters: {prune: gradual, weights: inner, granularity: filter, "
    "sparsity: 0.5, when: {at: 0ep}}\n  thin: {prune: thin, when: {at: 1ep}}\n",
}


class Net(nn.Module):
    """A stem, a residual block with BatchNorm, a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.outer = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.outer(torch.relu(self.bn2(self.inner(x)))))
        return self.head(x.mean((2, 3)))


def data(epoch):
    g = torch.Generator().manual_seed(epoch)
    return [
        (torch.randn(8, 3, 8, 8, generator=g), torch.randint(4, (8,), generator=g))
        for _ in range(STEPS)
    ]


def session(methods):
    torch.manual_seed(0)
    model = Net()
    return Session(
        model,
        loads(f"recipe: 1\ntrain: {{epochs: {EPOCHS}}}\nmethods:\n{methods}", name="hybrid.yaml"),
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
        example=X,
        steps_per_epoch=STEPS,
        calibration=data(77),
        loss_of=cross_entropy,
    )


def train(s, epochs, each=lambda s: None):
    for epoch in epochs:
        s.on_epoch_begin(epoch)
        for batch, (x, y) in enumerate(data(epoch)):
            s.on_minibatch_begin(epoch, batch, STEPS)
            s.model.train()
            loss = s.before_backward_pass(epoch, batch, STEPS, cross_entropy(s.model(x), y))
            s.optimizer.zero_grad()
            loss.backward()
            s.before_parameter_optimization(epoch, batch, STEPS)
            s.optimizer.step()
            s.on_minibatch_end(epoch, batch, STEPS)
            each(s)
        s.on_epoch_end(epoch)
    return s


def macs(model):
    return totals(model, capture(model, X)).macs


@pytest.mark.parametrize("filters", FILTERS)
def test_weights_are_pruned_of_what_the_filters_left(filters, tmp_path):
    result = train(session(FILTERS[filters] + AGP), range(EPOCHS)).finish()
    assert macs(result.model) <= 0.65 * macs(Net())
    for address in CONVS:
        weight, mask = result.model.get_parameter(address), result.tensors[f"{address}.mask"]
        assert mask.shape == weight.shape
        assert int((~mask).sum()) == int(0.6 * weight.numel() + 1e-6)
        assert torch.equal(weight != 0, mask)
    assert [e.kind for e in result.plan.edits] == ["remove"] * (len(result.plan.edits) - 3) + [
        "mask"
    ] * 3
    rebuilt = gracile.apply_plan(Net(), result.plan, X)
    rebuilt.load_state_dict(result.model.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(X), result.model(X))
    for by in ("parameters", "macs"):
        for shares in result.ledger.shares()[by].values():
            assert sum(shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_hybrid_run_resumes(filters, stop, tmp_path):
    whole = train(session(FILTERS[filters] + AGP), range(EPOCHS)).finish()
    first = train(session(FILTERS[filters] + AGP), range(stop))
    save_state(tmp_path / "s", first.state_dict())
    second = session(FILTERS[filters] + AGP)
    second.load_state_dict(load_state(tmp_path / "s"))
    resumed = train(second, range(stop, EPOCHS)).finish()
    assert resumed.plan == whole.plan
    for mine, other in (
        (resumed.model.state_dict(), whole.model.state_dict()),
        (resumed.tensors, whole.tensors),
    ):
        assert mine.keys() == other.keys()
        assert all(torch.equal(v, other[k]) for k, v in mine.items())


@pytest.mark.parametrize("first", ["mask", "regularizer"])
@pytest.mark.parametrize("granularity", ["element", "filter"])
def test_a_thresholding_regularizer_and_a_mask_share_a_tensor(first, granularity):
    mask = (
        "  few: {prune: oneshot, weights: outer, criterion: random, sparsity: 0.5, "
        "when: {at: 1ep}}\n"
    )
    regularizer = (
        "  small: {regularize: penalty, weights: outer, penalty: l2, "
        f"granularity: {granularity}, strength: 0.01, threshold: 0.02, "
        "when: {start: 0ep, stop: 3ep}}\n"
    )
    both = mask + regularizer if first == "mask" else regularizer + mask
    lost = []

    def look(s):
        keep = s.own_mask("few", "outer.weight")
        lost.append(bool(s.overlays.effective("outer.weight")[~keep].any()))

    s = session(both)
    with torch.no_grad():
        s.parameter("outer.weight")[:2] *= 0.3  # filters whose mean of |w| is about 0.018
    train(s, range(EPOCHS), look)
    few, small = (s.own_mask(id, "outer.weight") for id in ("few", "small"))
    result = s.finish()
    assert not any(lost)
    assert int((~few).sum()) == few.numel() // 2  # as it was laid, whatever the other zeroed
    assert int((~small).sum()) > 0
    weight = result.model.outer.weight
    assert not weight[~(few & small)].any()
    assert torch.equal(result.tensors["outer.weight.mask"], few & small)
    assert {e.by for e in result.plan.of_kind("mask") if e.at == "outer.weight"} == {"few", "small"}
