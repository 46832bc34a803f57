"""Scales searched together: the minimizer on known functions, a lower loss, the rest kept."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gracile.errors import BindError, RecipeError
from gracile.quantize.lapq import _search, _Trials
from gracile.recipe.load import loads
from gracile.train.session import Session

RNG = torch.Generator().manual_seed(4)
X = torch.randn(64, 3, 6, 6, generator=RNG)


def searched(f, evaluations=300):
    trials = _Trials(f, evaluations)
    _search(trials, np.eye(2))
    return trials


def test_finds_the_minimum_where_numbers_depend_on_each_other():
    """A narrow valley along the diagonal."""
    found = searched(lambda x: float(20 * (x[0] - x[1]) ** 2 + (x[0] + x[1] + 4) ** 2 + 1))
    assert found.before == 17
    np.testing.assert_allclose(found.best, [-2.0, -2.0], atol=0.2)
    assert found.after == pytest.approx(1, abs=0.1)


def test_never_worse_than_the_start_and_never_more_trials_than_given():
    asked = []

    def f(x):
        asked.append(x.copy())
        return float(np.abs(x).sum())

    found = searched(f, 4)
    assert (found.best.tolist(), found.after, len(asked)) == ([0.0, 0.0], 0.0, 4)


def test_nan_is_no_minimum():
    found = searched(lambda x: float(-x[0]) if x[0] < 0.9 else float("nan"))
    assert 0.5 <= found.best[0] < 0.9


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def data():
    with torch.no_grad():
        logits = model()(X)
        y = (logits - logits.mean(0)).argmax(1)
    return [(X[:32], y[:32]), (X[32:], y[32:])]


def session(options, calibration=None, **kwargs):
    text = f"recipe: 1\nmethods:\n  q: {{quantize: ptq, observer: min_max, {options}}}\n"
    return Session(
        model(), loads(text, name="r.yaml"), example=X[:2],
        calibration=data() if calibration is None else calibration,
        **{"loss_of": cross_entropy, **kwargs},
    )  # fmt: skip


def loss(net):
    with torch.no_grad():
        return float(np.mean([float(cross_entropy(net(x), y)) for x, y in data()]))


TUNE = "bits: 2, tune: lapq, evaluations: 80"


def test_the_loss_falls_and_zero_points_stay():
    plain, s = session("bits: 2").finish(), session(TUNE)
    tuned = s.finish()
    assert loss(tuned.model) < loss(plain.model)
    curves = {k: v[0][1] for k, v in tuned.history.items()}
    assert curves["quantize/loss_before_tuning"] == pytest.approx(loss(plain.model), rel=1e-5)
    assert curves["quantize/loss_after_tuning"] == pytest.approx(loss(tuned.model), rel=1e-5)
    assert tuned.plan == plain.plan
    for key, value in tuned.tensors.items():
        if key.endswith("zero_point"):
            assert torch.equal(value, plain.tensors[key])


def test_channels_of_a_weight_keep_their_ratios_and_shared_scales_stay_shared():
    plain, tuned = session("bits: 2").finish(), session(TUNE).finish()
    for key, value in tuned.tensors.items():
        if key.endswith(".weight.scale"):
            ratio = value / plain.tensors[key]
            torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
    assert tuned.tensors["4.output.scale"] == tuned.tensors["5.output.scale"]


def test_ranges_that_are_stored_are_the_tuned_ones():
    plain, tuned = session("bits: 2").finish(), session(TUNE).finish()
    moved = 0
    for id, r in tuned.ranges.items():
        key = next(k for k in tuned.tensors if k.startswith(f"{id}.") and k.endswith("put.scale"))
        factor = float(tuned.tensors[key] / plain.tensors[key])
        assert r.high == pytest.approx(plain.ranges[id].high * factor, rel=1e-5)
        moved += factor != 1
    assert moved


def test_same_seed_same_scales():
    a, b = session(TUNE).finish(), session(TUNE).finish()
    assert all(torch.equal(v, b.tensors[k]) for k, v in a.tensors.items())


def test_it_needs_labels_and_a_loss():
    with pytest.raises(BindError, match="labels"):
        session(TUNE, calibration=[X]).finish()
    with pytest.raises(BindError, match="loss_of"):
        session(TUNE, loss_of=None).finish()


def test_powers_of_two_are_not_tuned():
    with pytest.raises(RecipeError, match="leave out tune or scale"):
        session("scale: power_of_two, tune: lapq")
