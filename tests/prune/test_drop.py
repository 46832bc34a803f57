"""`prune: drop`: groups left out at random, and all back in the end."""

import mask_case as case
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile.prune.methods.drop import by_chance

EVERY = "when: {start: 0ep, stop: 3ep}"
FILTERS = f"drop, weights: [stem, inner], sparsity: 0.5, {EVERY}"


def filters(s, address="stem.weight"):
    """1 for each filter that stays; each is masked as a whole or not at all."""
    keep = s.own_mask("m", address).flatten(1)
    assert torch.equal(keep.any(1), keep.all(1))
    return keep.any(1).int().tolist()


def test_each_filter_goes_by_itself_by_the_number_drawn_for_it():
    s = case.session(FILTERS)
    for epoch in range(3):
        s.on_epoch_begin(epoch)
        for a, n in (("stem.weight", 8), ("inner.weight", 4)):
            drawn = torch.rand(n, generator=s.generator("m", a, epoch))
            assert filters(s, a) == (drawn >= 0.5).int().tolist()


def test_masks_differ_between_firings_and_tensors_and_repeat_with_the_seed():
    def drawn():
        s = case.session(
            "drop, weights: [stem, inner], sparsity: 0.5, when: {start: 0ep, every: 1mb}"
        )
        out = []
        case.train_epoch(s, 0, lambda s: out.append((filters(s), filters(s, "inner.weight"))))
        return out

    first = drawn()
    assert first == drawn()
    assert len({tuple(a) for a, _ in first}) > 1
    assert any(a[:4] != b for a, b in first)


@given(st.integers(1, 40), st.floats(0, 0.999), st.integers(0, 99))
def test_by_chance_goes_what_drew_less_but_one_stays(n, chance, seed):
    gone = by_chance(n, chance, torch.Generator().manual_seed(seed))
    drawn = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    assert len(gone) < n
    assert (drawn[gone] < chance).all()
    assert len(gone) == min(int((drawn < chance).sum()), n - 1)


def test_the_share_is_met_on_average():
    """2000 draws of 8 at 0.3, sd of the mean 0.0036: within 4 sd."""
    g = torch.Generator().manual_seed(0)
    share = sum(len(by_chance(8, 0.3, g)) for _ in range(2000)) / 16000
    assert share == pytest.approx(0.3, abs=0.015)


@pytest.mark.parametrize(("rescale", "factor"), [("true", 8 / 6), ("false", 1.0)])
def test_what_stays_is_divided_by_its_share(rescale, factor):
    s = case.session(
        f"drop, weights: stem, sparsity: 0.25, choose: l1, rescale: {rescale}, {EVERY}"
    )
    stored = s.parameter("stem.weight").detach().clone()
    s.on_epoch_begin(0)
    keep = s.own_mask("m", "stem.weight")
    assert sum(filters(s)) == 6
    torch.testing.assert_close(s.overlays.effective("stem.weight"), stored * keep * factor)


@pytest.mark.parametrize("choose", ["l1", "l2", "random", "taylor"])
def test_with_a_criterion_exactly_so_many_go(choose):
    s = case.session(f"drop, weights: stem, sparsity: 0.45, choose: {choose}, {EVERY}")
    norms = s.parameter("stem.weight").detach().flatten(1).abs().sum(1)
    seen = []
    for epoch in range(3):
        case.train_epoch(s, epoch, lambda s: seen.append(filters(s)) if s.batch == 0 else None)
    assert [sum(k) for k in seen] == [8 - 3] * 3
    if choose == "l1":
        assert [i for i, k in enumerate(seen[0]) if not k] == sorted(norms.argsort()[:3].tolist())
    if choose == "random":
        assert len({tuple(k) for k in seen}) > 1


def test_equal_filters_are_not_all_left_out():
    s = case.session(
        f"drop, weights: fc, sparsity: 0.5, choose: l1, {EVERY}", case.Row(*[[1.0]] * 6)
    )
    assert [sum(m[0] for m in mask) for mask in case.masks(s)] == [3, 3, 3]


def test_a_random_share_is_drawn_for_each_tensor_and_firing():
    s = case.session(f"drop, weights: [stem, inner], range: [0.2, 0.7], choose: l1, {EVERY}")
    counts = []
    for epoch in range(3):
        s.on_epoch_begin(epoch)
        for a, n in (("stem.weight", 8), ("inner.weight", 4)):
            u = float(torch.rand((), generator=s.generator("m", "level", a, epoch)))
            counts.append(n - sum(filters(s, a)))
            assert counts[-1] == int((0.2 + 0.5 * u) * n + 1e-6)
    assert len(set(counts)) > 1


def test_the_chance_follows_its_ramp():
    s = case.session(
        "drop, weights: fc, choose: l1, sparsity: {ramp: linear, initial: 0.25, final: 0.75}, "
        + EVERY,
        case.Row(*[[float(i)] for i in range(1, 9)]),
    )
    assert [sum(m[0] for m in mask) for mask in case.masks(s)] == [6, 4, 2]


def test_what_is_left_out_has_no_gradient_and_is_back_after_the_mini_batch():
    s = case.session(f"drop, weights: stem, sparsity: 0.5, choose: l1, {EVERY}")
    stored, gone = s.parameter("stem.weight").detach().clone(), []

    def look(s):
        if s.batch == 0:
            gone.extend(i for i, k in enumerate(filters(s)) if not k)
        else:
            assert s.mask("stem.weight") is None

    real = s.optimizer.step
    s.optimizer.step = lambda: None
    case.train_epoch(s, 0, look)
    s.optimizer.step = real
    assert torch.equal(stored, s.parameter("stem.weight"))
    s.optimizer.zero_grad()
    s.on_epoch_begin(1)
    s.model(case.data(1)[0][0]).sum().backward()
    grads = s.parameter("stem.weight").grad.flatten(1).abs().sum(1)
    assert (grads[gone] == 0).all()
    assert len(gone) == 4


def test_nothing_is_pruned_in_the_end():
    for lifetime in ("batch", "span"):
        result = case.finished(case.session(f"{FILTERS}, lifetime: {lifetime}"))
        assert len(result.plan) == 0
        assert not (result.model.stem.weight == 0).any()


def test_what_it_left_out_itself_does_not_count_as_small():
    s = case.session(
        f"drop, weights: fc, sparsity: 0.5, choose: l1, lifetime: span, {EVERY}",
        case.Row([1.0], [2.0], [3.0], [4.0]),
    )
    s.on_epoch_begin(0)
    assert filters(s, "fc.weight") == [0, 0, 1, 1]
    with torch.no_grad():
        s.parameter("fc.weight")[:2] = 9.0
    s.on_epoch_begin(1)
    assert filters(s, "fc.weight") == [1, 1, 0, 0]


def test_what_another_method_pruned_counts_as_small():
    before = (
        "  few: {prune: oneshot, weights: inner, granularity: element, sparsity: 0.5, "
        "when: {at: 0ep}}\n"
    )
    s = case.session(f"drop, weights: inner, sparsity: 0.25, choose: l1, {EVERY}", before=before)
    with torch.no_grad():
        s.parameter("inner.weight")[0] = 0.05  # all of it is pruned, though others are smaller
        s.parameter("inner.weight")[1:] = 0.06
        s.parameter("inner.weight")[3, :7] = 0.01
    s.on_epoch_begin(0)
    assert not s.own_mask("few", "inner.weight")[0].any()
    assert filters(s, "inner.weight") == [0, 1, 1, 1]


@pytest.mark.parametrize(
    "options",
    [
        "sparsity: 0.4, when: {start: 0ep, stop: 2ep, every: 3mb}",
        "sparsity: 0.4, choose: random, when: {start: 0ep, every: 1mb}",
        "sparsity: 0.4, choose: taylor, when: {start: 0ep, every: 2it}",
        "range: [0.1, 0.6], lifetime: span, when: {start: 0ep, stop: 3ep, every: 3mb}",
        "range: [0.1, 0.6], choose: l1, masked: trained, lifetime: span, when: {start: 0ep}",
    ],
)
def test_resumed_equals_uninterrupted(options, tmp_path):
    case.check_resume(f"drop, weights: [stem, inner], {options}", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("when: {at: 0ep}", r"prune\.m needs either 'sparsity' or 'range'"),
        ("sparsity: 0.1, range: [0, 0.5], when: {at: 0ep}", r"needs either 'sparsity' or 'range'"),
        ("sparsity: 1, when: {at: 0ep}", r"prune\.m\.sparsity must be in \[0, 1\), got 1"),
        ("range: [0.1], when: {at: 0ep}", r"prune\.m\.range must be two shares, got \[0\.1\]"),
        ("range: [0.1, 1.5], when: {at: 0ep}", r"prune\.m\.range\.1 must be in \[0, 1\), got 1\.5"),
        ("range: [0.5, 0.1], when: {at: 0ep}", r"range must be \[lowest, highest\]"),
        ("sparsity: 0.1, choose: l3, when: {at: 0ep}", r"unknown criterion 'l3'"),
        ("sparsity: 0.1, lifetime: run, when: {at: 0ep}", r"lifetime must be 'span' or 'batch'"),
        ("sparsity: 0.1, masked: reset, when: {at: 0ep}", r"masked must be 'frozen' or 'trained'"),
        ("sparsity: 0.1, when: {at: end}", r"'m' acts during training"),
        ("sparsity: 0.1, granularity: row, when: {at: 0ep}", r"'stem\.weight' .* granularity row"),
    ],
)
def test_wrong_options_are_refused(options, message):
    case.refused(f"drop, weights: stem, {options}", message)


def test_without_training_it_is_refused():
    case.refused(
        "drop, weights: stem, sparsity: 0.1, when: {at: end}", "acts during training", epochs=0
    )
