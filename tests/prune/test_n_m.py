"""`prune: n_m`: of every m weights along the inputs exactly n stay."""

import mask_case as case
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile.prune.methods.n_m import n_of_m

EVERY = "when: {start: 0ep, stop: 3ep}"


def test_two_of_four_by_hand():
    s = case.session("n_m, weights: fc, when: {at: 0ep}", case.Row([1.0, -3.0, 2.0, 0.0] * 2))
    assert case.masks(s) == [[[0, 1, 1, 0] * 2]] * 3
    assert s.history["sparsity/m"] == [(0.0, 0.5)]


def test_of_equal_weights_exactly_n_stay():
    assert n_of_m(torch.ones(2, 8), 1, 4).int().tolist() == [[0, 0, 0, 1] * 2] * 2


def test_a_convolution_is_pruned_along_its_channels_at_each_position():
    scores = torch.zeros(1, 4, 1, 2)
    scores[0, :, 0, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    scores[0, :, 0, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    keep = n_of_m(scores, 2, 4)[0, :, 0]
    assert keep.int().tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


def test_a_share_of_the_runs_those_that_lose_least():
    """Runs of 2 lose 1, 5, 3, 2: first one of four, then two, then all."""
    s = case.session(
        "n_m, n: 1, m: 2, weights: fc, share: {ramp: multistep, initial: 0.25, final: 1}, "
        f"{EVERY}",
        case.Row([1.0, 9.0, 5.0, 9.0, 3.0, 9.0, 2.0, 9.0]),
    )
    assert [m[0] for m in case.masks(s)] == [
        [0, 1, 1, 1, 1, 1, 1, 1],
        [0, 1] * 4,
        [0, 1] * 4,
    ]
    scores = torch.tensor([[1.0, 9.0, 5.0, 9.0, 3.0, 9.0, 2.0, 9.0]])
    assert n_of_m(scores, 1, 2, 0.5).int().tolist() == [[0, 1, 1, 1, 1, 1, 0, 1]]


@given(st.integers(1, 7), st.integers(2, 8), st.integers(0, 99), st.floats(0, 1))
def test_every_pruned_run_keeps_n_and_so_many_are_pruned(n, m, seed, share):
    n = min(n, m - 1)
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (3, 5 * m, 2), generator=g).float()  # many ties
    keep = n_of_m(scores, n, m, share).movedim(1, -1).reshape(-1, m).sum(1)
    assert int((keep == n).sum()) == int(share * 30 + 1e-6)
    assert int((keep == m).sum()) == 30 - int(share * 30 + 1e-6)


@pytest.mark.parametrize(("masked", "then"), [("frozen", [0, 1]), ("trained", [1, 0])])
def test_a_weight_that_grew_comes_back_only_if_it_is_trained(masked, then):
    s = case.session(
        f"n_m, n: 1, m: 2, weights: fc, masked: {masked}, {EVERY}", case.Row([1.0, 2.0])
    )
    s.on_epoch_begin(0)
    with torch.no_grad():
        s.parameter("fc.weight").copy_(torch.tensor([[9.0, 0.0]]))
    s.on_epoch_begin(1)
    assert s.own_mask("m", "fc.weight").int().tolist() == [then]


def test_a_weight_that_is_zero_does_not_bring_a_pruned_one_back():
    s = case.session(f"n_m, n: 1, m: 2, weights: fc, {EVERY}", case.Row([2.0, 1.0]))
    s.on_epoch_begin(0)
    with torch.no_grad():
        s.parameter("fc.weight")[0, 0] = 0.0
    s.on_epoch_begin(1)
    assert s.own_mask("m", "fc.weight").int().tolist() == [[1, 0]]


def test_sr_ste_adds_the_decay_of_masked_weights_to_their_gradient():
    """Straight-through gradient 1 everywhere, and 0.5 w where the mask is."""
    s = case.session(
        "n_m, n: 1, m: 2, weights: fc, masked: trained, sr_ste: 0.5, when: {start: 0ep, stop: 1ep}",
        case.Row([1.0, 2.0, -4.0, 3.0]),
    )
    for epoch, want in ((0, [1.5, 1.0, 1.0, 2.5]), (1, [0.0, 1.0, 1.0, 0.0])):
        s.on_epoch_begin(epoch)
        s.on_minibatch_begin(epoch, 0, 4)
        s.optimizer.zero_grad()
        s.model(torch.ones(1, 4)).sum().backward()
        s.before_parameter_optimization(epoch, 0, 4)
        assert s.parameter("fc.weight").grad.tolist() == [want]


@pytest.mark.parametrize("more", ["", ", masked: trained, sr_ste: 2e-4"])
def test_resumed_equals_uninterrupted(more, tmp_path):
    result = case.check_resume(
        'n_m, weights: "type:Conv2d", share: {ramp: linear, initial: 0.3, final: 1}, '
        f"when: {{start: 0ep, stop: 3ep}}{more}",
        tmp_path,
    )
    runs = (result.model.stem.weight != 0).movedim(1, -1).reshape(-1, 4).sum(1)
    assert runs.tolist() == [2] * len(runs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("weights: stem, n: 4", r"prune\.m\.n must be below m \(4\), got 4"),
        ("weights: stem, share: 1.5", r"prune\.m\.share must be at most 1, got 1\.5"),
        ("weights: stem, share: 0", r"prune\.m\.share must be more than 0, got 0"),
        ("weights: stem, sr_ste: 1e-4", r"prune\.m\.sr_ste needs .*Write masked: trained"),
        ("weights: stem, m: 3, n: 1", r"'m': 'stem\.weight' .* 4 inputs along dim 1, .* runs of 3"),
        ("weights: head.bias", r"'head\.bias' of shape \(3,\) has no inputs"),
    ],
)
def test_wrong_options_are_refused(options, message):
    case.refused(f"n_m, {options}, when: {{at: 0ep}}", message)
