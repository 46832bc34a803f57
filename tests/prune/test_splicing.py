"""`prune: splicing`: two thresholds, and what lies between them stays as it was."""

import mask_case as case
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile.prune.methods.splicing import spliced

EVERY = "when: {start: 0ep, stop: 3ep}"
SPLICING = f"splicing, weights: fc, low_mult: 0.5, high_mult: 1.5, {EVERY}"


def put(s, *weights):
    with torch.no_grad():
        s.parameter("fc.weight").copy_(torch.tensor([weights]))


def test_masks_by_hand_with_the_first_mean_and_deviation():
    """|w| = 1, 2, 3: mean 2, std 1; sensitivity 1: t = 3, prune below 1.5, back from 4.5 on."""
    s = case.session(f"{SPLICING}, sensitivity: 1", case.Row([1.0, -2.0, 3.0]))
    seen = []
    for epoch, weights in enumerate([(1.0, -2.0, 3.0), (4.4, -1.4, 1.5), (-4.5, 4.4, 1.6)]):
        put(s, *weights)
        s.on_epoch_begin(epoch)
        seen.append(s.own_mask("m", "fc.weight").int().tolist()[0])
    assert seen == [[0, 1, 1], [0, 0, 1], [1, 0, 1]]
    assert [v for _, v in s.history["sparsity/m"]] == pytest.approx([1 / 3, 2 / 3, 1 / 3])


@pytest.mark.parametrize(("growth", "last"), [(0, [0, 1, 1]), (0.5, [0, 0, 0])])
def test_sensitivity_grows_with_the_epochs_since_the_start(growth, last):
    """t = 2 + 1 (1 + 0.5 k): pruned below 1.5 at first, 1.625 after half an epoch, then 1.75."""
    s = case.session(
        f"splicing, weights: fc, low_mult: 0.5, high_mult: 9, sensitivity: 1, growth: {growth}, "
        "when: {start: 1ep, stop: 3ep, every: 0.5ep}",
        case.Row([1.0, -2.0, 3.0]),
    )
    s.on_epoch_begin(1)
    put(s, 0.0, 1.62, 1.7)
    s.on_minibatch_begin(1, 2, 4)
    assert s.own_mask("m", "fc.weight").int().tolist() == [[0, 0 if growth else 1, 1]]
    s.on_epoch_begin(2)
    assert s.own_mask("m", "fc.weight").int().tolist() == [last]


def test_a_sensitivity_far_below_zero_prunes_nothing():
    s = case.session(f"{SPLICING}, sensitivity: -5", case.Row([0.0, 1.0, 3.0]))
    assert case.masks(s) == [[[1, 1, 1]]] * 3


def test_a_pruned_weight_learns_and_comes_back():
    """loss = -out, so every weight grows by lr = 1 at every step, under the mask too."""
    s = case.session(f"{SPLICING}, sensitivity: 1", case.Row([1.0, 2.0, 3.0]), lr=1.0)
    kept = []
    for epoch in range(3):
        s.on_epoch_begin(epoch)
        kept.append(s.own_mask("m", "fc.weight").int().tolist()[0])
        s.on_minibatch_begin(epoch, 0, 4)
        s.optimizer.zero_grad()
        (-2 * s.model(torch.ones(1, 3)).sum()).backward()
        s.before_parameter_optimization(epoch, 0, 4)
        s.optimizer.step()
        s.on_minibatch_end(epoch, 0, 4)
    assert kept == [[0, 1, 1], [0, 1, 1], [1, 1, 1]]  # 1, about 3, about 6.8


@given(st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
def test_between_the_thresholds_the_mask_is_the_old_one(seed, a, b):
    low, high = sorted((a, b))
    g = torch.Generator().manual_seed(seed)
    size, kept = torch.rand(64, generator=g), torch.rand(64, generator=g) < 0.5
    new = spliced(size, kept, low, high)
    assert not new[size < low].any()
    assert new[size >= high].all() or low == high
    between = (size >= low) & (size < high)
    assert torch.equal(new[between], kept[between])


def test_a_cut_begins_a_new_scale():
    s = case.session(f"splicing, weights: [stem, inner], sensitivity: 0.5, {EVERY}")
    s.on_epoch_begin(0)
    group = next(g for g in s.groups if "stem.weight" in g.producers)
    s.cut({group.id: [0]}, by="test")
    assert s.methods[0].scale == {}
    s.on_epoch_begin(1)
    size = s.parameter("inner.weight").detach().abs()
    assert s.methods[0].scale["inner.weight"] == pytest.approx(
        (float(size.mean()), float(size.std()))
    )


def test_resumed_equals_uninterrupted(tmp_path):
    result = case.check_resume(
        f'splicing, weights: "type:Conv2d", sensitivity: 0.3, growth: 0.2, {EVERY}', tmp_path
    )
    assert 0.3 < float((result.model.stem.weight == 0).float().mean()) < 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "sensitivity: 1, high_mult: 0.5",
            r"prune\.m\.high_mult must not be below low_mult \(0\.9\)",
        ),
        ("sensitivity: 1, growth: -1", r"prune\.m\.growth must be at least 0, got -1"),
        ("sensitivity: 1, low_mult: 0", r"prune\.m\.low_mult must be more than 0, got 0"),
        ("growth: 1", r"prune\.m needs 'sensitivity'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    case.refused(f"splicing, weights: stem, {options}, {EVERY}", message)
