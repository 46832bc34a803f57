"""Distillation in a session: the mixture, the frozen teacher, the span."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.distill.losses.soft import soft
from gracile.errors import BindError, RecipeError
from gracile.recipe.load import loads
from gracile.train.session import Session


def session(options: str, epochs: int = 2) -> Session:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    )
    text = f"recipe: 1\ntrain: {{epochs: {epochs}}}\nmethods:\n  kd: {{distill: kd, {options}}}\n"
    return Session(
        model,
        loads(text, name="kd.yaml"),
        torch.optim.SGD(model.parameters(), lr=0.5),
        example=torch.zeros(2, 4),
        steps_per_epoch=1,
    )


def loss_at(s: Session, epoch: int, x, y):
    s.on_epoch_begin(epoch)
    s.on_minibatch_begin(epoch, 0, 1)
    hard = F.cross_entropy(s.model(x), y)
    return hard, s.before_backward_pass(epoch, 0, 1, hard)


def test_the_loss_is_the_stated_mixture():
    s = session("temperature: 3, alpha: 0.25")
    s.model.eval()
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    with torch.no_grad():
        s.parameter("1.weight").add_(0.3)  # the student moved, the teacher did not
    hard, total = loss_at(s, 0, x, y)
    expected = 0.75 * soft(s.model(x), s.teacher(x), temperature=3.0) + 0.25 * hard
    torch.testing.assert_close(total, expected)
    assert s.terms["task"] == pytest.approx(0.25 * hard.item())
    assert set(s.terms) == {"task", "kd"}


def test_scale_adds_the_soft_loss_to_the_whole_task_loss():
    s = session("temperature: 3, scale: 2.5")
    s.model.eval()
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    with torch.no_grad():
        s.parameter("1.weight").add_(0.3)
    hard, total = loss_at(s, 0, x, y)
    torch.testing.assert_close(total, hard + 2.5 * soft(s.model(x), s.teacher(x), temperature=3.0))
    assert s.terms["task"] == pytest.approx(hard.item())


def test_scale_by_hand():
    s = session("loss: mse, scale: 0.5")
    s.model.eval()
    with torch.no_grad():
        s.parameter("4.bias").add_(torch.tensor([1.0, 0.0, 2.0]))
    hard, total = loss_at(s, 0, torch.randn(6, 4), torch.randint(0, 3, (6,)))
    assert total.item() - hard.item() == pytest.approx(0.5 * (1 + 4) / 3, rel=1e-4)


def test_without_alpha_and_scale_a_tenth_is_the_tasks():
    s = session("temperature: 2")
    hard, _ = loss_at(s, 0, torch.randn(6, 4), torch.randint(0, 3, (6,)))
    assert s.terms["task"] == pytest.approx(0.1 * hard.item())


def test_alpha_and_scale_are_two_forms():
    with pytest.raises(RecipeError, match=r"^kd.yaml:4: .*alpha .* and scale .* keep one"):
        session("alpha: 0.1, scale: 1")


def test_the_teacher_is_frozen_in_eval_mode_and_stays_the_original():
    s = session("alpha: 0.5")
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    before = s.teacher(x)
    s.model.train()
    _, total = loss_at(s, 0, x, y)
    total.backward()
    s.optimizer.step()
    assert torch.equal(s.teacher(x), before)
    assert not s.teacher.training
    assert all(not p.requires_grad for p in s.teacher.parameters())


def test_outside_its_span_it_is_silent():
    s = session("alpha: 0.5, when: {start: 1ep}")
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    hard, total = loss_at(s, 0, x, y)
    assert torch.equal(hard, total)
    _, _ = loss_at(s, 1, x, y)
    assert "kd" in s.terms


def test_without_training_it_is_refused():
    with pytest.raises(BindError, match=r"acts during training, but train.epochs is 0"):
        session("alpha: 0.5", epochs=0)


def test_a_point_in_time_is_no_span():
    with pytest.raises(BindError, match=r"write when: \{start: 1ep\}"):
        session("when: {at: 1ep}")
