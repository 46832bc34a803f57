"""A Plan on a fresh copy of its architecture is the structure that was made, in any process."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import gracile
from gracile.core.plan import Plan, Remove
from gracile.errors import UserError, VerificationError
from gracile.models.spec import resolve
from gracile.recipe.build import build

X = torch.randn(2, 3, 16, 16)


def resnet20():
    return resolve("resnet20_cifar_a").model


class Shuffled(nn.Module):
    """Channel counts are written in the forward, so the pruned model is a GraphModule."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x).view(len(x), 2, 4, 14, 14).transpose(1, 2).reshape(len(x), 8, 14, 14)
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.parametrize("make", [resnet20, Shuffled])
def test_structure_then_weights(make, tmp_path):
    torch.manual_seed(0)
    result = gracile.prune_channels(make(), X, ratio=0.4)
    result.plan.save(tmp_path / "plan.json")
    small = gracile.apply_plan(make(), tmp_path / "plan.json", X)
    small.load_state_dict(result.model.state_dict())
    assert torch.equal(small.eval()(X), result.model(X))


def test_a_plan_that_leaves_blocks_out():
    session = gracile.Session(resnet20(), build(), example=X)
    block = next(b for b in session.blocks if b.protected is None)
    session.skip([block.id], by="test")
    result = session.finish()
    small = gracile.apply_plan(resnet20(), result.plan, X)
    small.load_state_dict(result.model.state_dict())
    assert len(list(small.parameters())) < len(list(resnet20().parameters()))
    assert torch.equal(small.eval()(X), result.model(X))


def test_in_a_fresh_process(tmp_path):
    result = gracile.prune_channels(resnet20(), X, ratio=0.4)
    result.plan.save(tmp_path / "plan.json")
    save_file(result.model.state_dict(), tmp_path / "weights.safetensors")
    save_file({"x": X, "y": result.model(X).detach()}, tmp_path / "seen.safetensors")
    code = """
import sys, torch, gracile
from safetensors.torch import load_file
from gracile.models.spec import resolve
seen = load_file("seen.safetensors")
model = gracile.apply_plan(resolve("resnet20_cifar_a").model, "plan.json", seen["x"])
model.load_state_dict(load_file("weights.safetensors"))
torch.testing.assert_close(model.eval()(seen["x"]), seen["y"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_another_architecture_is_refused_and_left_alone():
    plan = gracile.prune_channels(Shuffled(), X).plan
    other = resnet20()
    shapes = [p.shape for p in other.parameters()]
    with pytest.raises(UserError, match="made for another 'Shuffled' than this CifarResNet"):
        gracile.apply_plan(other, plan, X)
    assert [p.shape for p in other.parameters()] == shapes


def test_a_model_that_is_cut_already_is_refused():
    result = gracile.prune_channels(resnet20(), X)
    with pytest.raises(UserError, match="fresh copy of the original"):
        gracile.apply_plan(result.model, result.plan, X)


def test_a_proof_on_request():
    plan = gracile.prune_channels(Shuffled(), X).plan
    assert gracile.apply_plan(Shuffled(), plan, X, prove=True)(X).shape == (2, 2)
    (edit,) = plan.of_kind("remove")
    wrong = [
        m.model_copy(update={"keep": tuple((i + 1) % m.of for i in m.keep)})
        if m.at == "head.weight"
        else m
        for m in edit.group
    ]
    wrong = [m.model_copy(update={"keep": tuple(sorted(m.keep))}) for m in wrong]
    bad = Plan(architecture=plan.architecture).extended([Remove(group=tuple(wrong))])
    with pytest.raises(VerificationError, match="'head'"):
        gracile.apply_plan(Shuffled(), bad, X, prove=True)
