"""What happens to weights under a mask, and how long a mask lasts."""

import pytest
import torch
from torch import nn

from gracile.recipe.load import loads
from gracile.train.session import Session

X = torch.ones(2, 4)


def session(options: str, epochs: int = 3) -> Session:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.1, 0.2, 3.0, 4.0]]))
    recipe = loads(
        f"recipe: 1\ntrain: {{epochs: {epochs}}}\nmethods:\n"
        f"  m: {{prune: gradual, weights: '0', sparsity: 0.5, {options}}}\n",
        name="r.yaml",
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return Session(model, recipe, optimizer, example=X, steps_per_epoch=2)


def step(s: Session, epoch: int, batch: int) -> list[float]:
    """One step on loss = sum of outputs, whose gradient is 2 for every weight; what was seen."""
    s.on_minibatch_begin(epoch, batch, 2)
    out = s.model(X)
    s.optimizer.zero_grad()
    s.before_backward_pass(epoch, batch, 2, out.sum()).backward()
    s.before_parameter_optimization(epoch, batch, 2)
    s.optimizer.step()
    s.on_minibatch_end(epoch, batch, 2)
    return [round(v, 4) for v in s.parameter("0.weight").flatten().tolist()]


def test_frozen_weights_keep_their_value():
    s = session("when: {at: 0ep}")
    s.on_epoch_begin(0)
    assert step(s, 0, 0) == [0.1, 0.2, 1.0, 2.0]


def test_trained_weights_move_under_the_mask():
    s = session("masked: trained, when: {at: 0ep}")
    s.on_epoch_begin(0)
    assert s.model(X)[0].item() == pytest.approx(7.0)
    assert step(s, 0, 0) == [-1.9, -1.8, 1.0, 2.0]
    assert s.model(X)[0].item() == pytest.approx(3.0)
    assert step(s, 0, 1) == [-3.9, -3.8, -1.0, 0.0]


def test_reset_weights_start_from_zero_at_every_mini_batch():
    s = session("masked: reset, when: {at: 0ep}")
    s.on_epoch_begin(0)
    assert step(s, 0, 0) == [-2.0, -2.0, 1.0, 2.0]
    assert step(s, 0, 1) == [-2.0, -2.0, -1.0, 0.0]


def test_a_trained_weight_that_grew_comes_back():
    s = session("masked: trained, scores_from: dense, when: {start: 0ep, stop: 2ep}")
    s.on_epoch_begin(0)
    step(s, 0, 0)
    step(s, 0, 1)  # -3.9, -3.8, -1, 0
    s.on_epoch_begin(1)
    assert s.mask("0.weight").flatten().tolist() == [True, True, False, False]


def test_after_the_span_masked_weights_are_frozen():
    s = session("masked: trained, when: {start: 0ep, stop: 1ep}")
    s.on_epoch_begin(0)
    before = step(s, 0, 0)
    s.on_epoch_begin(1)
    after = step(s, 1, 0)
    assert after[:2] == before[:2]
    assert after[2:] == [before[2] - 2, before[3] - 2]


@pytest.mark.parametrize(
    ("lifetime", "during", "later"), [("run", 2, 2), ("span", 2, 0), ("batch", 0, 0)]
)
def test_how_long_a_mask_lasts(lifetime, during, later):
    s = session(f"lifetime: {lifetime}, when: {{start: 0ep, stop: 1ep}}", epochs=2)
    masked = []
    for epoch in range(2):
        s.on_epoch_begin(epoch)
        assert s.mask("0.weight") is not None or epoch == 1
        step(s, epoch, 0)
        step(s, epoch, 1)
        mask = s.mask("0.weight")
        masked.append(0 if mask is None else int((~mask).sum()))
        s.on_epoch_end(epoch)
    assert masked == [during, later]
    result = s.finish()
    assert len(result.plan.of_kind("mask")) == (1 if lifetime == "run" else 0)
    assert int((result.model[0].weight == 0).sum()) == (2 if lifetime == "run" else 0)


def test_a_scale_acts_until_the_mask_is_replaced():
    s = session("when: {at: 0ep}")
    keep = torch.tensor([[False, True, True, True]])
    s.set_mask("m", "0.weight", keep, scale=2.0)
    assert s.model(X)[0].item() == pytest.approx(14.4)
    s.set_mask("m", "0.weight", keep)
    assert s.model(X)[0].item() == pytest.approx(7.2)
    s.drop_masks("m")
    assert s.model(X)[0].item() == pytest.approx(7.3)


def test_two_methods_mask_one_tensor_and_gradients_pass_only_if_both_say_so():
    s = session("when: {at: 0ep}")
    s.set_mask("a", "0.weight", torch.tensor([[False, True, True, True]]))
    s.set_mask("b", "0.weight", torch.tensor([[True, False, True, True]]))
    grads = []
    for ids in ([], ["a"], ["a", "b"]):
        for id in ids:
            s.train_masked(id, True)
        (g,) = torch.autograd.grad(s.model(X).sum(), s.parameter("0.weight"))
        grads.append(g.flatten().tolist())
    assert grads == [[0, 0, 2, 2], [0, 0, 2, 2], [2, 2, 2, 2]]
