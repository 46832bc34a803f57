"""`prune: rnn`: the threshold of every firing, as the paper's formula has it."""

import mask_case as case
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gracile.prune.methods.rnn import threshold
from gracile.recipe.load import loads
from gracile.train.session import Session

# start 1, ramp 1 + 2, end 6, every 1, q 1.3: theta = 2 * 1.3 / (2 * 2 + 3 * 3) = 0.2
# e = 1, 2: 0.2 (e - 0); from 3 on: 0.2 * 3 + 0.4 (e - 2)
RNN = "rnn, weights: fc, q: 1.3, ramp_at: 2ep, ramp_slope: 2, when: {start: 1ep, stop: 6ep}"
GOLDEN = [0.2, 0.4, 1.0, 1.4, 1.8]


def test_the_sequence_of_thresholds_and_masks_by_hand():
    s = case.session(RNN, case.Row([0.2, 0.3, -0.9, 1.1, 1.7, -2.0]), epochs=7)
    kept = [sum(m[0]) for m in case.masks(s, epochs=7)]
    assert [v for _, v in s.history["threshold/m"]] == pytest.approx(GOLDEN)
    assert kept == [6, 5, 4, 3, 2, 1, 1]


def test_every_second_epoch_by_hand():
    """theta = 2 * 1.3 * 2 / 13 = 0.4: T = 0.4 (e + 1) / 2, then (0.4 * 3 + 0.8 (e - 1)) / 2."""
    got = [threshold(e, q=1.3, ramp=2, length=5, every=2, slope=2) for e in (0, 2, 4)]
    assert got == pytest.approx([0.2, 1.0, 1.8])


def test_a_span_in_optimizer_steps_without_a_stop_ends_with_training():
    """3 epochs of 4 mini-batches, two a step: 6 steps, those from 1 on: as in RNN above."""
    s = case.session(
        "rnn, weights: fc, q: 1.3, ramp_at: 2it, ramp_slope: 2, when: {start: 1it, every: 1it}",
        case.Row([0.2, 0.3, -0.9, 1.1, 1.7, -2.0]),
        train=", accumulate: 2",
    )
    for epoch in range(3):
        s.on_epoch_begin(epoch)
        for batch in range(4):
            s.on_minibatch_begin(epoch, batch, 4)
    assert s.history["threshold/m"] == [
        (t, pytest.approx(v)) for t, v in zip((0.5, 1, 1.5, 2, 2.5), GOLDEN, strict=True)
    ]


def test_with_slope_one_and_a_half_it_reaches_q():
    """At the end, but for the +1 of the formula, 2 of 5 of the way slow and 3 of 5 fast is q."""
    end = threshold(1e6, q=0.7, ramp=4e5, length=1e6, every=1, slope=1.5)
    assert end == pytest.approx(0.7, rel=1e-5)


def test_an_lstm_computes_with_its_masked_weights():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 5)
            self.out = nn.Linear(5, 3)

        def forward(self, x):
            return self.out(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    model, x = Words(), torch.randn(2, 6, 4)
    recipe = loads(
        "recipe: 1\ntrain: {epochs: 2}\nmethods:\n"
        '  m: {prune: rnn, weights: "rnn.weight_*", q: 0.25, ramp_at: 1ep, when: {start: 0ep}}\n'
    )
    s = Session(model, recipe, example=x, steps_per_epoch=1)
    s.on_epoch_begin(0)
    s.on_epoch_begin(1)
    seen = s.model(x)
    result = s.finish()
    for name, value in result.model.rnn.named_parameters():
        zeros = float((value == 0).float().mean())
        assert 0.5 < zeros < 1 if name.startswith("weight") else zeros == 0
    torch.testing.assert_close(result.model(x), seen)


@given(st.floats(0, 9), st.floats(0, 9), st.floats(1, 5))
def test_it_never_falls(a, b, slope):
    a, b = sorted((a, b))
    given = {"q": 1.0, "ramp": 4.0, "length": 10.0, "every": 1.0, "slope": slope}
    assert threshold(a, **given) <= threshold(b, **given) + 1e-12


def test_resumed_equals_uninterrupted(tmp_path):
    result = case.check_resume(
        'rnn, weights: "type:Conv2d", q: 0.08, ramp_at: 1ep, when: {start: 0ep, stop: 3ep}',
        tmp_path,
    )
    assert 0.3 < float((result.model.stem.weight == 0).float().mean()) < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("q: 1, ramp_at: 1ep, when: {at: 0ep}", r"prune\.m\.when must be a span"),
        ("q: 0, ramp_at: 1ep, when: {start: 0ep}", r"prune\.m\.q must be more than 0, got 0"),
        ("q: 1, ramp_at: 4ep, when: {start: 0ep}", r"'m': ramp_at must lie within when, .* 3ep"),
        ("q: 1, ramp_at: 2ep, when: {start: 0ep, stop: 1ep}", r"which lasts 1ep, got 2ep"),
        (
            "q: 1, ramp_at: 5it, when: {start: 0ep}",
            r"prune\.m\.ramp_at must be in the unit of when",
        ),
        ("q: 1, ramp_at: 5, when: {start: 0ep}", r"ramp_at: a time needs a number and a unit"),
        ("q: 1, when: {start: 0ep}", r"prune\.m needs 'ramp_at'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    case.refused(f"rnn, weights: stem, {options}", message)
