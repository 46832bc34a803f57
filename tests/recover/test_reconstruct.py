"""Least-squares reconstruction: exact where a linear map can be exact, better everywhere else."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.errors import BindError
from gracile.recipe.load import loads
from gracile.train.session import Session

GENERATOR = torch.Generator().manual_seed(3)
BATCHES = [torch.randn(16, 3, 8, 8, generator=GENERATOR) for _ in range(3)]
AT_END = "when: {at: end}"


def session(model, methods: str, example=BATCHES[0], calibration=BATCHES):
    text = "recipe: 1\nmethods:\n" + "".join(f"  {line}\n" for line in methods.split("\n"))
    return Session(model, loads(text, name="r.yaml"), example=example, calibration=calibration)


def seeded(model):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return model.eval()


class Twice(nn.Module):
    """Channels 4..7 are twice the channels 0..3, so four of the eight are enough."""

    def __init__(self, layer, head):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 1, bias=False), layer, head

    def forward(self, x):
        x = F.relu(self.second(self.first(x)))
        return self.head(x.mean((2, 3)))


def redundant(layer):
    model = seeded(Twice(layer, nn.Linear(layer.out_channels, 2)))
    with torch.no_grad():
        model.first.weight[4:] = 2 * model.first.weight[:4]
        model.first.weight[:4] *= 0.5  # the smaller copies go
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}], ids=str
)
def test_a_redundant_channel_is_made_up_for_exactly(options, bias):
    model = redundant(nn.Conv2d(8, 5, 3, bias=bias, **options))
    with torch.no_grad():
        wanted = model(BATCHES[0])
    cut = f"cut: {{prune: structure, ratio: 0.5, scope: layer, ignore: second.weight, {AT_END}}}"
    s = session(model, f"{cut}\nfit: {{recover: reconstruct, ridge: 0, {AT_END}}}")
    smaller = s.finish().model
    assert smaller.get_parameter("first.weight").shape[0] == 4
    with torch.no_grad():
        torch.testing.assert_close(smaller(BATCHES[0]), wanted, rtol=1e-4, atol=1e-4)


def test_masked_inputs_stay_zero():
    model = redundant(nn.Conv2d(8, 5, 3))
    with torch.no_grad():
        wanted = model(BATCHES[0])
    mask = (
        "mask: {prune: oneshot, weights: second, granularity: channel, sparsity: 0.5, "
        f"criterion: l1, {AT_END}}}"
    )
    # masks the smaller copies of the first layer along with what reads them
    with torch.no_grad():
        model.second.weight[:, :4] *= 1e-3
        wanted = model(BATCHES[0])
    s = session(model, f"{mask}\nfit: {{recover: reconstruct, ridge: 0, {AT_END}}}")
    result = s.finish()
    kept = result.model.second.weight.detach().abs().sum((0, 2, 3)) > 0
    assert kept.tolist() == [False] * 4 + [True] * 4
    with torch.no_grad():
        torch.testing.assert_close(result.model(BATCHES[0]), wanted, rtol=1e-4, atol=1e-4)


def test_every_weight_mask_is_solved_for_its_own_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).eval()
    x = [torch.randn(64, 6) for _ in range(2)]
    mask = f"mask: {{prune: oneshot, weights: '0', sparsity: 0.5, {AT_END}}}"
    fit = f"fit: {{recover: reconstruct, weights: '0', ridge: 0, {AT_END}}}"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = session(model, f"{mask}\n{fit}", example=x[0], calibration=x).finish()
    keep = result.tensors["0.weight.mask"]
    assert torch.equal(result.model[0].weight != 0, keep)
    data = torch.cat(x)
    y = F.linear(data, before["0.weight"], before["0.bias"])
    for row in range(4):
        inputs = keep[row].nonzero().flatten()
        columns = torch.cat([data[:, inputs], torch.ones(len(data), 1)], 1)
        best = torch.linalg.lstsq(columns, y[:, row : row + 1]).solution.flatten()
        torch.testing.assert_close(
            result.model[0].weight[row, inputs].detach(), best[:-1], rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(
            result.model[0].bias[row].detach(), best[-1], rtol=1e-3, atol=1e-4
        )


class Block(nn.Module):
    """A residual block between a stem and a head; in-place additions as in common code."""

    def __init__(self, groups=1):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.outer = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        y = self.relu(self.bn2(self.inner(x)))
        y = self.bn3(self.outer(y))
        y += x
        return self.head(self.relu(y).mean((2, 3)))


def test_nothing_changes_where_nothing_was_cut():
    model = seeded(Block())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    session(model, f"fit: {{recover: reconstruct, {AT_END}}}").finish()
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, before[k], rtol=2e-3, atol=2e-3)


def error(model, whole):
    x = torch.cat(BATCHES)
    with torch.no_grad():
        return float((model(x) - whole).norm() / whole.norm())


@pytest.mark.parametrize("groups", [1, 4])
def test_a_cut_block_comes_closer_and_the_shortcut_is_made_up_for(groups):
    errors = []
    cut = f"cut: {{prune: structure, ratio: 0.5, scope: layer, {AT_END}}}"
    for fit in ("", "residual: false", "residual: true"):
        model = seeded(Block(groups))
        with torch.no_grad():
            whole = model(torch.cat(BATCHES))
        lines = cut if not fit else f"{cut}\nfit: {{recover: reconstruct, {fit}, {AT_END}}}"
        errors.append(error(session(model, lines).finish().model, whole))
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[0]


def test_points_are_a_sample_of_the_positions():
    model = redundant(nn.Conv2d(8, 5, 3))
    with torch.no_grad():
        wanted = model(BATCHES[0])
    cut = f"cut: {{prune: structure, ratio: 0.5, scope: layer, ignore: second.weight, {AT_END}}}"
    s = session(model, f"{cut}\nfit: {{recover: reconstruct, ridge: 0, points: 9, {AT_END}}}")
    with torch.no_grad():
        torch.testing.assert_close(s.finish().model(BATCHES[0]), wanted, rtol=1e-3, atol=1e-3)


def test_it_can_run_in_mid_training_and_leaves_the_mode():
    model = seeded(Block()).train()
    recipe = loads(
        "recipe: 1\ntrain: {epochs: 2}\nmethods:\n  fit: {recover: reconstruct, when: {at: 1ep}}\n",
        name="r.yaml",
    )
    s = Session(model, recipe, example=BATCHES[0], calibration=BATCHES, steps_per_epoch=1)
    s.on_epoch_begin(1)
    assert model.training


def test_a_network_without_such_layers_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    with pytest.raises(BindError, match="there is nothing to reconstruct"):
        session(model, f"fit: {{recover: reconstruct, {AT_END}}}")
