"""Accuracy control: what is reverted, when it stops, and that the rest stays as it was."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gracile.errors import BindError, GracileError
from gracile.recipe.load import loads
from gracile.recover.methods.accuracy import fewest
from gracile.train.session import Session

PTQ = "q: {quantize: ptq, bits: 8, weight_bits: 2, observer: min_max}"
X = torch.randn(96, 3, 6, 6, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """A residual block; a huge weight in each row of `wide` leaves the others no bits."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.wide = nn.Conv2d(6, 6, 3, padding=1)
        self.deep = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.deep(F.relu(self.wide(x))))
        return self.head(x.mean((2, 3)))


def net():
    torch.manual_seed(2)
    model = Net().eval()
    with torch.no_grad():
        for layer in (model.stem, model.deep, model.head):  # on the grid of 2 bits already
            weight = layer.weight
            ends = weight.abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.ndim - 1))
            weight.copy_((weight / ends).round() * ends)
        model.wide.weight.mul_(4).view(6, -1)[:, 0] = 12.0
        model.head.bias.sub_(model(X).mean(0))
    return model


def labels():
    with torch.no_grad():
        return net()(X).argmax(1)


def session(methods, model=None, val=True):
    text = "recipe: 1\nmethods:\n" + "".join(f"  {line}\n" for line in methods.split("\n"))
    y = labels()
    batches = [(X[i : i + 32], y[i : i + 32]) for i in range(0, len(X), 32)]
    return Session(
        model or net(), loads(text, name="r.yaml"), example=X[:4], calibration=[X[:32]],
        val=(lambda: batches) if val else None,
    )  # fmt: skip


def top1(model):
    with torch.no_grad():
        return float((model(X).argmax(1) == labels()).float().mean())


def bits(plan):
    return {(e.role, e.at) for e in plan.edits}


@pytest.mark.parametrize("rank", ["noise", "accuracy"])
def test_the_one_operator_that_costs_accuracy_goes_back_to_float(rank):
    without = session(PTQ).finish()
    assert top1(without.model) < 0.9
    result = session(f"{PTQ}\nkeep: {{recover: accuracy, max_drop: 4, rank: {rank}}}").finish()
    assert top1(result.model) >= 0.96
    assert torch.equal(result.model.get_parameter("wide.weight"), net().wide.weight)
    assert bits(without.plan) - bits(result.plan) == {("weight", "wide.weight")} | {
        e for e in bits(without.plan) - bits(result.plan) if e[0] == "output"
    }
    row = next(r for r in result.ledger if r.name == "wide.weight")
    assert (row.precision, row.reason) == ("float", "sensitive")
    assert "reverted by 'keep'" in row.why
    assert any(c == "accuracy.reverted" and "(wide)" in t for c, t in result.warnings)


def test_grids_of_what_stays_are_untouched():
    without = session(PTQ).finish()
    result = session(f"{PTQ}\nkeep: {{recover: accuracy, max_drop: 4}}").finish()
    for key, value in result.tensors.items():
        assert torch.equal(value, without.tensors[key]), key
    assert len(result.tensors) < len(without.tensors)


def test_nothing_happens_within_the_drop():
    without = session(PTQ).finish()
    result = session(f"{PTQ}\nkeep: {{recover: accuracy, max_drop: 100}}").finish()
    assert result.plan.edits[0] == without.plan.edits[0]
    assert len(result.plan) == len(without.plan)
    assert result.warnings == without.warnings


def test_where_nothing_can_stay_quantized_it_is_said():
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    s = session(f"{PTQ.replace('8', '2')}\nkeep: {{recover: accuracy, max_drop: 0}}", model)
    y = model(X).argmax(1).detach()
    s.val = lambda: [(X, y)]
    result = s.finish()
    with torch.no_grad():
        assert torch.equal(result.model(X).argmax(1), y)
    left = any(c == "accuracy.nothing-left" for c, _ in result.warnings)
    assert left == (len(result.plan) == 0)


def test_the_last_operators_weight_is_reverted_with_the_rest():
    s = session("q: {quantize: ptq, bits: 2}\nkeep: {recover: accuracy, max_drop: 0}")
    quantizer = s.methods[0]
    quantizer.on_fire(s, 1.0)
    with torch.no_grad():
        full = s.model.eval()(X)
    everything = quantizer.placement.operators
    quantizer.revert(s, dict.fromkeys(everything, "tried"))
    with torch.no_grad():
        torch.testing.assert_close(s.model(X), net()(X))
    quantizer.revert(s, {})
    with torch.no_grad():
        assert torch.equal(s.model(X), full)


def test_first_and_last_bits_stay_where_they_were():
    """With the first layer reverted, the second one does not become the first."""
    edges = "q: {quantize: ptq, bits: 4, edges_bits: 8, half_range: false}"
    s = session(f"{edges}\nkeep: {{recover: accuracy, max_drop: 0}}")
    quantizer = s.methods[0]
    quantizer.on_fire(s, 1.0)
    before = {w.address: w for w in quantizer.placement.weights}
    quantizer.revert(s, {"stem": "tried"})
    assert {w.address: w for w in quantizer.placement.weights} == {
        a: w for a, w in before.items() if a != "stem.weight"
    }


@given(st.integers(1, 70), st.data())
def test_the_fewest_that_are_enough_are_found_in_few_trials(most, data):
    least = data.draw(st.integers(1, most))
    asked = []

    def enough(k):
        asked.append(k)
        return k >= least

    assert fewest(enough, most) == least
    assert len(asked) <= 2 * least.bit_length() + 1


def test_it_needs_validation_data_and_a_quantizer():
    with pytest.raises(BindError, match=r"'keep' .*goes by the accuracy on validation data"):
        session(f"{PTQ}\nkeep: {{recover: accuracy, max_drop: 1}}", val=False)
    with pytest.raises(BindError, match="reverts what `quantize: ptq` did"):
        session("keep: {recover: accuracy, max_drop: 1}")
    with pytest.raises(GracileError, match="put it behind the quantizer"):
        session(f"keep: {{recover: accuracy, max_drop: 1}}\n{PTQ}").finish()


def test_biases_are_corrected_behind_it():
    bias, keep = "bias: {recover: bias}", "keep: {recover: accuracy, max_drop: 1}"
    session(f"{PTQ}\n{keep}\n{bias}")
    with pytest.raises(BindError, match="write 'keep' before it"):
        session(f"{PTQ}\n{bias}\n{keep}")
