"""Gradual pruning in a session: levels, coupling, protection."""

import pytest
import torch
from torch import nn

from gracile.errors import BindError
from gracile.recipe.load import loads
from gracile.train.session import Session


class Residual(nn.Module):
    """A stem, one residual block, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 6, 3, padding=1)
        self.outer = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


def session(options: str, epochs: int = 4) -> Session:
    torch.manual_seed(0)
    text = f"recipe: 1\ntrain: {{epochs: {epochs}}}\nmethods:\n  m: {{prune: gradual, {options}}}\n"
    return Session(
        Residual(), loads(text, name="r.yaml"), example=torch.zeros(2, 3, 8, 8), steps_per_epoch=1
    )


def begin(s: Session, epochs: int = 4) -> None:
    for epoch in range(epochs):
        s.on_epoch_begin(epoch)


def test_the_level_follows_the_cubic_ramp_and_ends_at_final():
    s = session(
        "weights: stem, sparsity: {ramp: cubic, initial: 0.1, final: 0.5}, "
        "when: {start: 0ep, stop: 4ep}"
    )
    expected = [0.5 - 0.4 * (1 - k / 3) ** 3 for k in range(4)]
    for epoch, level in enumerate(expected):
        s.on_epoch_begin(epoch)
        share = 1 - s.mask("stem.weight").float().mean().item() if level else 0
        assert share == pytest.approx(int(level * 216 + 1e-6) / 216)
    assert [v for _, v in s.history["sparsity/m"]] == pytest.approx(expected)


def test_exactly_the_smallest_weights_go():
    s = session("weights: inner, sparsity: 0.25, when: {at: 0ep}")
    before = s.parameter("inner.weight").detach().abs().flatten()
    begin(s, 1)
    gone = ~s.mask("inner.weight").flatten()
    assert gone.sum() == int(0.25 * before.numel())
    assert before[gone].max() <= before[~gone].min()


def test_coupled_filters_lose_the_same_channels_and_their_readers_follow():
    s = session("weights: [stem, outer], granularity: filter, sparsity: 0.5, when: {at: 0ep}")
    begin(s, 1)
    stem, outer = s.mask("stem.weight"), s.mask("outer.weight")
    gone = ~stem.flatten(1).any(1)
    assert gone.sum() == 4
    assert torch.equal(gone, ~outer.flatten(1).any(1))
    assert torch.equal(gone, ~s.mask("head.weight").any(0))
    assert torch.equal(gone, ~s.mask("inner.weight").flatten(2).any(2).any(0))
    assert torch.equal(gone, ~s.mask("stem.bias"))


def test_the_channel_to_go_has_the_smallest_sum_over_all_writers():
    s = session("weights: [stem, outer], granularity: filter, sparsity: 0.13, when: {at: 0ep}")
    with torch.no_grad():
        for name in ("stem.weight", "outer.weight"):
            s.parameter(name).fill_(1.0)
        s.parameter("stem.weight")[2] = 0.0  # smallest in one writer only
        s.parameter("stem.weight")[5] *= 0.5
        s.parameter("outer.weight")[5] *= 0.1  # smallest together
    begin(s, 1)
    assert (~s.mask("stem.weight").flatten(1).any(1)).nonzero().tolist() == [[5]]


def test_half_selected_coupled_layers_are_protected_with_the_reason():
    with pytest.raises(BindError, match=r"'stem.weight' shares its channels with 'outer.weight'"):
        session("weights: stem, granularity: filter, sparsity: 0.5, when: {at: 0ep}")


def test_what_cannot_be_pruned_is_noted_and_the_rest_goes_on():
    s = session('weights: "type:Conv2d", granularity: channel, sparsity: 0.5, when: {at: 0ep}')
    assert any(n[0] == "stem.weight" and n[3] == "protected" for n in s.notes)
    begin(s, 1)
    assert s.mask("outer.weight") is not None
    assert s.mask("stem.weight") is None or s.mask("stem.weight").any()


def test_widths_are_rounded_up_to_a_multiple():
    s = session(
        "weights: [stem, outer], granularity: filter, multiple_of: 4, sparsity: 0.3, "
        "when: {at: 0ep}"
    )
    begin(s, 1)
    mask = s.mask("stem.weight")
    assert mask is None or mask.flatten(1).any(1).sum() == 8


def test_global_ranking_takes_from_the_weakest_layer():
    s = session(
        "weights: [stem, outer, inner], granularity: filter, scope: global, sparsity: 0.35, "
        "when: {at: 0ep}"
    )
    with torch.no_grad():
        s.parameter("inner.weight").mul_(1e-3)
    begin(s, 1)
    assert s.mask("inner.weight").flatten(1).any(1).sum() < 6
    stem = s.mask("stem.weight")
    assert stem is None or stem.flatten(2).any(2).any(1).all()


def test_a_dense_weight_that_grew_comes_back_only_if_asked():
    for scores_from, back in (("effective", False), ("dense", True)):
        s = session(
            f"weights: stem, sparsity: 0.5, scores_from: {scores_from}, "
            "when: {start: 0ep, stop: 2ep}"
        )
        s.on_epoch_begin(0)
        i = (~s.mask("stem.weight")).flatten().nonzero()[0].item()
        with torch.no_grad():
            s.parameter("stem.weight").view(-1)[i] = 100.0
        s.on_epoch_begin(1)
        assert bool(s.mask("stem.weight").flatten()[i]) is back


def test_a_bias_cannot_have_filters_of_two_dimensions():
    with pytest.raises(BindError, match="needs weights of at least 2"):
        session("weights: stem.bias, granularity: channel, sparsity: 0.5, when: {at: 0ep}")


def test_never_firing_is_refused_before_training():
    with pytest.raises(BindError, match=r"^r.yaml:4: 'm': .*never fires"):
        session("weights: stem, sparsity: 0.5, when: {start: 9ep}")
