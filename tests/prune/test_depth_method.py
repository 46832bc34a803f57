"""`prune: depth` in a session: how many blocks go, which, and what stays with a reason."""

import pytest
import torch
from torch import nn

from gracile.errors import BindError, RecipeError, VerificationError
from gracile.graph import skip as skipping
from gracile.models.spec import resolve
from gracile.recipe.load import loads
from gracile.train.session import Session

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
REMOVABLE = ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"]


def session(options: str, more: str = "", model: nn.Module | None = None, **given) -> Session:
    torch.manual_seed(0)
    text = f"recipe: 1\ntrain: {{epochs: 4}}\nmethods:\n  m: {{prune: depth, {options}}}\n{more}"
    model = model or resolve("resnet20_cifar?num_classes=10").model
    with torch.no_grad():
        for k, block in enumerate(REMOVABLE):
            if hasattr(model, "layer1"):
                model.get_submodule(block).bn2.weight.fill_(1 + (k * 3) % 7)
    return Session(
        model,
        loads(text, name="r.yaml"),
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        example=EXAMPLE,
        steps_per_epoch=1,
        **given,
    )


def left(s: Session) -> list[str]:
    """Blocks that could still be left out, without `.add`."""
    return [b.id.removesuffix(".add") for b in s.blocks if b.protected is None]


def begin(s: Session, epochs: int = 4) -> Session:
    for epoch in range(epochs):
        s.on_epoch_begin(epoch)
    return s


def test_the_blocks_with_the_smallest_last_weights_go_first():
    s = begin(session("count: 3, when: {at: 0ep}"), 1)  # importances 1 4 7 3 6 2 5
    assert left(s) == ["layer1.1", "layer1.2", "layer2.2", "layer3.2"]
    assert [e.block for e in s.plan] == ["layer1.0.add", "layer3.1.add", "layer2.1.add"]
    assert {e.by for e in s.plan} == {"m"}


def test_a_count_is_approached_in_equal_steps_and_a_ratio_along_its_ramp():
    s = session("count: 3, when: {start: 0ep, stop: 4ep}")
    seen = []
    for epoch in range(4):
        s.on_epoch_begin(epoch)
        seen.append(7 - len(left(s)))
    assert seen == [0, 1, 2, 3]
    s = begin(session("ratio: {ramp: linear, final: 0.5}, when: {start: 0ep, stop: 4ep}"))
    assert [v for _, v in s.history["blocks/m"]] == [0, 1, 2, 3]  # of 7


def test_blocks_alone_say_what_goes_and_what_cannot_is_in_the_ledger():
    s = begin(session('blocks: "layer2.**", when: {at: 0ep}'))
    assert [e.block for e in s.plan] == ["layer2.1.add", "layer2.2.add"]
    ledger = s.finish().ledger
    rows = {(r.name, r.kind): r for r in ledger}
    kept = rows["layer2.0.add", "operator"]
    assert (kept.structure, kept.reason) == ("kept", "protected")
    assert "not an identity" in kept.why
    for name in ("layer2.1.conv1.weight", "layer2.2.bn2.bias"):
        row = rows[name, "tensor"]
        assert (row.structure, row.by) == ("skipped", "m")
    gone = [r for r in ledger if r.structure == "skipped"]
    assert sum(r.numel for r in gone) == 2 * 18560
    assert sum(r.macs for r in gone) == 4 * 9 * 32 * 32 * 8 * 8
    assert not [r for r in ledger if r.structure == "removed"]


def test_training_goes_on_with_what_is_left_and_masks_follow():
    mask = '  z: {prune: oneshot, weights: "layer1.**.conv1", sparsity: 0.5, when: {at: 0ep}}\n'
    s = session('blocks: "layer1.1.*", when: {at: 1ep}', mask)
    for epoch in range(4):
        s.on_epoch_begin(epoch)
        s.on_minibatch_begin(epoch, 0, 1)
        loss = s.before_backward_pass(epoch, 0, 1, s.model.train()(EXAMPLE).square().mean())
        s.optimizer.zero_grad()
        loss.backward()
        s.before_parameter_optimization(epoch, 0, 1)
        s.optimizer.step()
        s.on_minibatch_end(epoch, 0, 1)
        s.on_epoch_end(epoch)
    result = s.finish()
    assert [e.at for e in result.plan.of_kind("mask")] == [
        "layer1.0.conv1.weight", "layer1.2.conv1.weight",
    ]  # fmt: skip
    assert set(s.optimizer.state) == set(result.model.parameters())


def test_a_block_whose_proof_fails_stays_and_the_next_one_goes(monkeypatch):
    whole = skipping._multiply_by_zero
    spared = lambda module, cut: whole(module, {k: v for k, v in cut.items() if k != BAD})  # noqa: E731
    BAD = "layer1.0.add"
    monkeypatch.setattr(skipping, "_multiply_by_zero", spared)
    s = begin(session("count: 2, when: {at: 0ep}"))
    assert [e.block for e in s.plan] == ["layer3.1.add", "layer2.1.add"]
    assert [c for c, _ in s.warnings] == ["cut-refused"]
    row = next(r for r in s.finish().ledger if r.name == BAD)
    assert row.reason == "protected"


def test_if_no_block_passes_the_run_fails(monkeypatch):
    monkeypatch.setattr(skipping, "_multiply_by_zero", lambda module, cut: None)
    with pytest.raises(VerificationError, match="no block passes its proof"):
        begin(session("count: 7, when: {at: 0ep}"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("count: 8", r"count must be at most 7, .* got 8"),
        ("ratio: 0.1", "less than one block"),
        ('blocks: "layer2.0.*"', "no residual block of ResNet.*not an identity"),
        ('blocks: "layer9.**"', "matches no residual block"),
    ],
)
def test_what_cannot_be_met_is_refused_before_training(options, error):
    with pytest.raises(BindError, match=error.replace("ResNet", r"\w+")):
        session(f"{options}, when: {{at: 0ep}}")


@pytest.mark.parametrize("options", ["count: 1, ratio: 0.5", "criterion: l1"])
def test_a_goal_is_needed_and_only_one(options):
    with pytest.raises(RecipeError, match=r"either 'count' or 'ratio'|says not which blocks"):
        session(f"{options}, when: {{at: 0ep}}")


def test_a_network_without_blocks_is_refused():
    with pytest.raises(BindError, match="it has none"):
        session("count: 1, when: {at: 0ep}", model=nn.Sequential(nn.Flatten(), nn.Linear(768, 2)))


def test_after_activations_are_quantized_it_is_too_late():
    qat = "  q: {quantize: qat, when: {start: 1ep}}\n"
    with pytest.raises(BindError, match="Let 'm' fire before 'q' begins"):
        session("count: 1, when: {at: 3ep}", qat, calibration=[EXAMPLE])
