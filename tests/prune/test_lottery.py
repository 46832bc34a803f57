"""`prune: lottery`: prune by magnitude, put the rest back to an earlier time."""

import mask_case as case
import pytest
import torch

from gracile.core.plan import Skip

EVERY = "when: {start: 1ep, stop: 3ep}"
TICKET = f"lottery, weights: [stem, inner], sparsity: 0.5, {EVERY}"


def stored(s):
    return {k: v.detach().clone() for k, v in s.model.state_dict().items()}


def gone(s, address):
    return int((~s.own_mask("m", address)).sum())


def same(a, b, names=None):
    return all(torch.equal(a[k], b[k]) for k in (names or a))


def test_each_firing_takes_its_share_of_what_remains_smallest_first():
    s = case.session(
        "lottery, weights: fc, sparsity: 0.5, when: {start: 0ep}",
        case.Row([8.0, -7.0, 6.0, -5.0, 4.0, -3.0, 2.0, -1.0]),
    )
    assert [m[0] for m in case.masks(s)] == [
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert [v for _, v in s.history["sparsity/m"]] == [0.5, 0.75, 0.875]


def test_of_all_weights_it_is_the_level():
    s = case.session(
        "lottery, weights: fc, of: all, sparsity: {ramp: linear, initial: 0.25, final: 0.75}, "
        "when: {start: 0ep}",
        case.Row([1.0] * 8),
    )
    assert [m[0] for m in case.masks(s)] == [[0] * k + [1] * (8 - k) for k in (2, 4, 6)]


def test_a_level_that_falls_gives_nothing_back():
    s = case.session(
        "lottery, weights: fc, of: all, sparsity: {ramp: linear, initial: 0.75, final: 0.25}, "
        "when: {start: 0ep}",
        case.Row([1.0] * 8),
    )
    assert [sum(m[0]) for m in case.masks(s)] == [2, 2, 2]


def test_weights_that_are_zero_do_not_bring_pruned_ones_back():
    s = case.session(
        "lottery, weights: fc, sparsity: 0.5, when: {start: 0ep}", case.Row([4.0, 3.0, 2.0, 1.0])
    )
    s.on_epoch_begin(0)
    with torch.no_grad():
        s.parameter("fc.weight")[:, :2] = 0.0
    s.on_epoch_begin(1)
    assert s.own_mask("m", "fc.weight").int().tolist() == [[0, 1, 0, 0]]


def test_ranked_over_all_tensors_or_inside_each():
    for scope, counts in (("global", (144, 0)), ("layer", (144, 144))):
        s = case.session(
            f"lottery, weights: [stem, inner], scope: {scope}, of: all, "
            f"sparsity: {0.25 if scope == 'global' else 0.5}, when: {{at: 0ep}}"
        )
        with torch.no_grad():
            s.parameter("stem.weight").mul_(1e-3)
        s.on_epoch_begin(0)
        assert (gone(s, "stem.weight"), gone(s, "inner.weight")) == counts


def test_it_ranks_trained_weights_and_puts_the_network_back_where_it_began():
    s = case.session(TICKET)
    start = stored(s)
    case.train_epoch(s, 0)
    trained = stored(s)
    assert s.optimizer.state
    s.on_epoch_begin(1)
    assert same(start, stored(s))  # buffers of the BatchNorm included
    assert not s.optimizer.state
    for a in ("stem.weight", "inner.weight"):
        keep = s.own_mask("m", a)
        assert gone(s, a) == keep.numel() // 2
        size = trained[a].abs()
        assert size[~keep].max() <= size[keep].min()
        assert torch.equal(s.overlays.effective(a), start[a] * keep)


def test_only_the_selected_weights_if_asked():
    s = case.session(f"{TICKET}, rewind: selected")
    start = stored(s)
    case.train_epoch(s, 0)
    trained = stored(s)
    s.on_epoch_begin(1)
    now, mine = stored(s), ("stem.weight", "inner.weight")
    assert same(start, now, mine)
    assert same(trained, now, [k for k in now if k not in mine])
    known = {n for n, p in s.model.named_parameters() if p in s.optimizer.state}
    assert known == s.parameter_names - set(mine)


@pytest.mark.parametrize(("to", "epoch", "batch"), [("1ep", 1, 0), ("1.5ep", 1, 2), ("3it", 0, 3)])
def test_rewinding_to_a_time_within_training(to, epoch, batch):
    s = case.session(
        f"lottery, weights: stem, sparsity: 0.5, rewind_to: {to}, when: {{start: 2ep}}"
    )
    values = {}

    def each(s):
        if (s.epoch_number, s.batch) == (epoch, batch):
            values.update({n: p.detach().clone() for n, p in s.model.named_parameters()})

    for e in range(2):
        case.train_epoch(s, e, each)
    s.on_epoch_begin(2)
    assert same(values, stored(s), values)


def test_control_with_new_random_weights():
    s = case.session(f"{TICKET}, control: reinit")
    start = stored(s)
    case.train_epoch(s, 0)
    s.on_epoch_begin(1)
    now, rng = stored(s), s.generator("m", "reinit", "stem.weight", 0)
    new = torch.randn(start["stem.weight"].shape, generator=rng) * start["stem.weight"].std()
    torch.testing.assert_close(now["stem.weight"], new)
    assert same(start, now, [k for k in now if k not in ("stem.weight", "inner.weight")])


def test_control_with_a_random_mask_of_the_same_size():
    ticket = f"lottery, weights: [stem, inner], scope: global, sparsity: 0.5, {EVERY}"
    masks = []
    for control in ("none", "random_mask"):
        s = case.session(f"{ticket}, control: {control}")
        start = stored(s)
        case.train_epoch(s, 0)
        s.on_epoch_begin(1)
        assert same(start, stored(s))
        first = s.own_mask("m", "stem.weight")
        masks.append((gone(s, "stem.weight"), gone(s, "inner.weight"), first))
        for batch in range(4):
            s.on_minibatch_begin(1, batch, 4)
        s.on_epoch_begin(2)
        assert not (s.own_mask("m", "stem.weight") & ~first).any()  # none comes back
        assert gone(s, "stem.weight") + gone(s, "inner.weight") == 288 + 144
    assert masks[0][:2] == masks[1][:2]
    assert sum(masks[0][:2]) == 288
    assert not torch.equal(masks[0][2], masks[1][2])


def test_what_is_remembered_follows_a_cut_and_a_block_that_goes():
    s = case.session(TICKET)
    start = stored(s)
    group = next(g for g in s.groups if "stem.weight" in g.producers)
    s.cut({group.id: [1, 4]}, by="test")
    left = torch.tensor([0, 2, 3, 5, 6, 7])
    case.train_epoch(s, 0)
    s.on_epoch_begin(1)
    now = stored(s)
    assert torch.equal(now["stem.weight"], start["stem.weight"][left])
    assert torch.equal(now["inner.weight"], start["inner.weight"][:, left])
    assert torch.equal(now["bn.running_var"], start["bn.running_var"][left])
    (method,) = s.methods
    method.on_surgery(s, [Skip(by="t", block="b", nodes=(), gone=("bn", "inner.bias"))])
    assert set(method.remembered) == {"stem.weight", "inner.weight", "head.weight", "head.bias"}


@pytest.mark.parametrize("control", ["none", "reinit", "random_mask"])
@pytest.mark.parametrize("to", ["0ep", "0.5ep", "1ep"])
def test_resumed_equals_uninterrupted(control, to, tmp_path):
    result = case.check_resume(
        f"lottery, weights: [stem, inner], sparsity: 0.5, control: {control}, rewind_to: {to}, "
        "when: {start: 5it, every: 3it}",
        tmp_path,
    )
    # firings at 5, 8 and 11 leave 144, 72 and 36 of 288
    assert int((result.model.stem.weight != 0).sum()) == 36


def test_a_ticket_at_the_end_is_the_beginning_under_a_mask():
    s = case.session("lottery, weights: stem, sparsity: 0.5, when: {at: end}")
    start = stored(s)
    result = case.finished(s)
    assert int((result.model.stem.weight == 0).sum()) == 144
    kept = result.model.stem.weight != 0
    assert torch.equal(result.model.stem.weight[kept], start["stem.weight"][kept])
    assert torch.equal(result.model.head.weight, start["head.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "sparsity: 0.5, rewind_to: 1ep, when: {at: 1ep}",
            r"'m': rewind_to must come before .* 1ep",
        ),
        ("sparsity: 0.5, rewind_to: 3ep, when: {at: end}", r"rewind_to must come before"),
        ("sparsity: 0.5, rewind_to: 1, when: {at: 1ep}", r"rewind_to: a time needs a number and"),
        ("sparsity: 1.0, when: {at: 1ep}", r"prune\.m\.sparsity must be in \[0, 1\), got 1"),
        ("sparsity: 0.5, control: both, when: {at: 1ep}", r"control must be 'none', 'reinit' or"),
        ("when: {at: 1ep}", r"prune\.m needs 'sparsity'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    case.refused(f"lottery, weights: stem, {options}", message)
