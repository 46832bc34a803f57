"""`prune: threshold`: what is above it stays, by the weight or by the norm of its group."""

import mask_case as case
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile.prune.grouping import group_norms

EVERY = "when: {start: 0ep, stop: 3ep}"


def test_what_is_not_above_the_threshold_goes_equal_ones_included():
    s = case.session(
        "threshold, weights: fc, threshold: 0.5, when: {at: 0ep}", case.Row([0.5, -0.6, 0.4, -0.5])
    )
    assert case.masks(s) == [[[0, 1, 0, 0]]] * 3
    assert s.history["sparsity/m"] == [(0.0, 0.75)]


def test_a_threshold_may_rise_above_1():
    s = case.session(
        f"threshold, weights: fc, threshold: {{ramp: linear, final: 3}}, {EVERY}",
        case.Row([1.0, -2.0, 4.0, 0.0]),
    )
    # thresholds 0, 1.5, 3
    assert case.masks(s) == [[[1, 1, 1, 0]], [[0, 1, 1, 0]], [[0, 0, 1, 0]]]


def test_what_is_pruned_stays_pruned_though_its_stored_value_grows():
    s = case.session(
        f"threshold, weights: fc, threshold: 0.5, masked: trained, {EVERY}", case.Row([0.1, 1.0])
    )
    s.on_epoch_begin(0)
    with torch.no_grad():
        s.parameter("fc.weight").fill_(9.0)
    s.on_epoch_begin(1)
    assert s.own_mask("m", "fc.weight").tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("reduce", "norms"), [("mean_abs", [2.0, 2.0]), ("max", [4.0, 2.0]), ("l2", [4.0, 8**0.5])]
)
def test_norms_of_groups_by_hand(reduce, norms):
    weight, groups = torch.tensor([4.0, 0.0, -2.0, 2.0]), torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(group_norms(weight, groups, reduce), torch.tensor(norms))


@pytest.mark.parametrize(
    ("reduce", "kept"), [("mean_abs", [0, 0]), ("max", [1, 0]), ("l2", [1, 1])]
)
def test_a_filter_goes_as_a_whole_by_its_norm(reduce, kept):
    s = case.session(
        f"threshold, weights: fc, threshold: 2, granularity: filter, reduce: {reduce}, "
        "when: {at: 0ep}",
        case.Row([4.0, 0.0], [-2.0, 2.0]),
    )
    assert case.masks(s)[0] == [[k, k] for k in kept]
    assert bool(s.warnings) is (not any(kept))


def test_a_multiple_of_the_first_standard_deviation():
    """Weights -3, -1, 1, 3: std = sqrt(20 / 3) = 2.58, half of it 1.29; later they shrink."""
    first, half = [[1, 0, 0, 1]], [[0, 0, 0, 0]]
    for frozen, then in (("true", half), ("false", first)):
        s = case.session(
            f"threshold, weights: fc, threshold: 0.5, relative_to: std, frozen_scale: {frozen}, "
            f"{EVERY}",
            case.Row([-3.0, -1.0, 1.0, 3.0]),
        )
        s.on_epoch_begin(0)
        assert s.own_mask("m", "fc.weight").int().tolist() == first
        with torch.no_grad():
            s.parameter("fc.weight").mul_(0.4)  # 1.2 is below 1.29; std of -1.2, 0, 0, 1.2 is 0.98
        s.on_epoch_begin(1)
        assert s.own_mask("m", "fc.weight").int().tolist() == then
        assert [c for c, _ in s.warnings] == (["nothing-left"] if then == half else [])


@given(st.floats(1e-3, 3), st.integers(0, 99))
def test_the_mask_is_the_comparison(threshold, seed):
    w = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    s = case.session(
        f"threshold, weights: fc, threshold: {threshold!r}, when: {{at: 0ep}}",
        case.Row(*w.tolist()),
    )
    s.on_epoch_begin(0)
    assert torch.equal(s.own_mask("m", "fc.weight"), w.abs() > threshold)


def test_a_cut_begins_a_new_scale():
    s = case.session(f"threshold, weights: [stem, inner], threshold: 1, relative_to: std, {EVERY}")
    s.on_epoch_begin(0)
    (method,) = s.methods
    assert set(method.stds) == {"stem.weight", "inner.weight"}
    group = next(g for g in s.groups if "stem.weight" in g.producers)
    s.cut({group.id: [0, 1, 2]}, by="test")
    assert method.stds == {}
    std = float(s.overlays.effective("stem.weight").detach().std())
    s.on_epoch_begin(1)
    assert s.own_mask("m", "inner.weight").shape == (4, 5, 3, 3)
    assert method.stds["stem.weight"] == std


@pytest.mark.parametrize("masked", ["frozen", "trained", "reset"])
def test_resumed_equals_uninterrupted(masked, tmp_path):
    result = case.check_resume(
        'threshold, weights: "type:Conv2d", threshold: {ramp: cubic, initial: 0.2, final: 0.8}, '
        f"relative_to: std, masked: {masked}, {EVERY}",
        tmp_path,
    )
    assert 0.3 < float((result.model.stem.weight == 0).float().mean()) < 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("threshold: 0", r"prune\.m\.threshold must be more than 0, got 0"),
        ("threshold: -1", r"prune\.m\.threshold must be a number, not below 0, got -1"),
        ("threshold: high", r"prune\.m\.threshold must be a number, not below 0, got 'high'"),
        ("threshold: {ramp: linear, final: 0}", r"prune\.m\.threshold\.final must be more than 0"),
        (
            "threshold: {ramp: exponential, final: 2}",
            r"prune\.m\.threshold\.ramp: exponential needs levels below 1, got 0\.0 and 2\.0",
        ),
        ("threshold: 1, relative_to: mean", r"relative_to must be 'none' or 'std', got 'mean'"),
        ("threshold: 1, reduce: l1", r"reduce must be 'mean_abs', 'max' or 'l2', got 'l1'"),
        ("threshold: 1, granularity: kernel", r"'fc\.weight' of shape \(1, 2\) .* kernel: "),
        ("{}", r"prune\.m needs 'threshold'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    options = "" if options == "{}" else f"{options}, "
    case.refused(
        f"threshold, {options}weights: fc, when: {{at: 0ep}}", message, model=case.Row([1.0, 2.0])
    )
