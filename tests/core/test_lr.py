import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from gracile.core import lr
from gracile.errors import BindError, UserError

STEPS = 50
BASE = 0.2

EPOCH_WISE = [
    {"class": "StepLR", "step_size": 7, "gamma": 0.3},
    {"class": "StepLR", "step_size": 1},
    {"class": "MultiStepLR", "milestones": [30, 5, 5, 44], "gamma": 0.5},
    {"class": "MultiStepLR", "milestones": [0, 3]},
    {"class": "ExponentialLR", "gamma": 0.93},
    {"class": "ConstantLR"},
    {"class": "ConstantLR", "factor": 0.5, "total_iters": 12},
    {"class": "LinearLR"},
    {"class": "LinearLR", "start_factor": 0.1, "end_factor": 0.7, "total_iters": 20},
    {"class": "LinearLR", "start_factor": 1.0, "end_factor": 0.0, "total_iters": 49},
    {"class": "CosineAnnealingLR", "T_max": 50},
    {"class": "CosineAnnealingLR", "T_max": 13, "eta_min": 0.01},
    {"class": "CosineAnnealingWarmRestarts", "T_0": 9},
    {"class": "CosineAnnealingWarmRestarts", "T_0": 4, "T_mult": 2, "eta_min": 0.003},
    {"class": "CosineAnnealingWarmRestarts", "T_0": 1, "T_mult": 3},
    {"class": "PolynomialLR"},
    {"class": "PolynomialLR", "total_iters": 33, "power": 2.5},
]
STEP_WISE = [
    {"class": "OneCycleLR", "max_lr": 0.4, "total_steps": STEPS},
    {"class": "OneCycleLR", "max_lr": 0.4, "epochs": 5, "steps_per_epoch": 10},
    {"class": "OneCycleLR", "max_lr": 0.1, "total_steps": 60, "pct_start": 0.12},
    {"class": "OneCycleLR", "max_lr": 0.1, "total_steps": STEPS, "anneal_strategy": "linear"},
    {"class": "OneCycleLR", "max_lr": 0.1, "total_steps": STEPS, "three_phase": True},
    {
        "class": "OneCycleLR",
        "max_lr": 0.3,
        "total_steps": 55,
        "pct_start": 0.4,
        "three_phase": True,
        "anneal_strategy": "linear",
        "div_factor": 10.0,
        "final_div_factor": 7.0,
        "base_momentum": 0.7,
        "max_momentum": 0.9,
    },
    {"class": "OneCycleLR", "max_lr": 0.1, "total_steps": STEPS, "cycle_momentum": False},
    {"class": "CyclicLR", "base_lr": 0.01, "max_lr": 0.1, "step_size_up": 6},
    {
        "class": "CyclicLR",
        "base_lr": 0.01,
        "max_lr": 0.1,
        "step_size_up": 5,
        "step_size_down": 9,
        "mode": "triangular2",
    },
    {
        "class": "CyclicLR",
        "base_lr": 0.01,
        "max_lr": 0.1,
        "step_size_up": 4,
        "mode": "exp_range",
        "gamma": 0.97,
        "base_momentum": 0.5,
        "max_momentum": 0.8,
    },
    {
        "class": "CyclicLR",
        "base_lr": 0.01,
        "max_lr": 0.1,
        "step_size_up": 8,
        "cycle_momentum": False,
    },
]

OWN = {"MultiStepMultiGammaLR", "Spans", "PolynomialDropLR"}  # not torch's


def of_torch(spec: dict[str, Any], adam: bool = False) -> list[tuple[float, float]]:
    """(rate, momentum or beta1) of 50 steps of torch's own scheduler."""
    weight = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = (
        torch.optim.Adam(weight, lr=BASE)
        if adam
        else torch.optim.SGD(weight, lr=BASE, momentum=0.9)
    )
    args = {k: v for k, v in spec.items() if k != "class"}
    scheduler = getattr(lr_scheduler, spec["class"])(optimizer, **args)
    out = []
    for step in range(STEPS):
        group = optimizer.param_groups[0]
        out.append((group["lr"], group["betas"][0] if adam else group["momentum"]))
        optimizer.step()
        if step < STEPS - 1:
            scheduler.step()
    return out


@pytest.mark.parametrize("spec", EPOCH_WISE, ids=str)
def test_epoch_wise_rates_equal_torch(spec):
    schedule = lr.make(spec, base_lr=BASE, epochs=STEPS, steps_per_epoch=3)
    for epoch, (want, _) in enumerate(of_torch(spec)):
        for step in range(3):
            got = schedule.lr(epoch, 3 * epoch + step)
            assert math.isclose(got, want, rel_tol=1e-9, abs_tol=1e-15), epoch
        assert schedule.momentum(epoch, 3 * epoch) is None


@pytest.mark.parametrize("adam", [False, True], ids=["momentum", "beta1"])
@pytest.mark.parametrize("spec", STEP_WISE, ids=str)
def test_step_wise_rates_and_momenta_equal_torch(spec, adam):
    schedule = lr.make(spec, base_lr=BASE, epochs=5, steps_per_epoch=10)
    for step, (want, momentum) in enumerate(of_torch(spec, adam)):
        assert math.isclose(schedule.lr(step // 10, step), want, rel_tol=1e-9), step
        got = schedule.momentum(step // 10, step)
        if spec.get("cycle_momentum", True):
            assert got is not None
            assert math.isclose(got, momentum, rel_tol=1e-9), step
        else:
            assert got is None


PLATEAU = [
    {},
    {"patience": 2, "factor": 0.5},
    {"patience": 0, "cooldown": 3, "threshold": 0.05},
    {"mode": "max", "patience": 1, "threshold_mode": "abs", "threshold": 0.1},
    {"mode": "max", "patience": 2, "min_lr": 0.01},
    {"patience": 1, "threshold_mode": "abs", "factor": 0.9, "eps": 0.01},
]


@pytest.mark.parametrize("args", PLATEAU, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_plateau_equals_torch(args, seed):
    values = torch.rand(STEPS, generator=torch.Generator().manual_seed(seed)).tolist()
    values[7] = float("nan")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, **args)
    spec = {"class": "ReduceLROnPlateau", "metric": "m", **args}
    ours = lr.make(spec, base_lr=BASE, epochs=STEPS, steps_per_epoch=None)
    for epoch, value in enumerate(values):
        assert math.isclose(ours.lr(epoch, epoch), optimizer.param_groups[0]["lr"], rel_tol=1e-9)
        theirs.step(value)
        ours.end_epoch({"m": value})


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 29))
def test_a_stored_plateau_goes_on_as_if_never_stopped(values, stop):
    spec = {"class": "ReduceLROnPlateau", "patience": 1, "cooldown": 1}

    def fresh() -> lr.Schedule:
        return lr.make(spec, base_lr=BASE, epochs=30, steps_per_epoch=None)

    whole, resumed = fresh(), fresh()
    for epoch, value in enumerate(values):
        if epoch == stop:
            other = fresh()
            other.load_state_dict(resumed.state_dict())
            resumed = other
        for s in (whole, resumed):
            s.end_epoch({"val_loss": value})
    assert whole.state_dict() == resumed.state_dict()


def test_plateau_names_the_metric_it_misses():
    schedule = lr.make(
        {"class": "ReduceLROnPlateau", "mode": "max"}, base_lr=1.0, epochs=1, steps_per_epoch=1
    )
    with pytest.raises(UserError, match=r"'val_top1'.*Nearest: 'val_top5'.*train\.lr\.metric"):
        schedule.end_epoch({"val_top5": 0.5})


@given(st.integers(1, 400), st.floats(0, 1), st.booleans(), st.sampled_from(["cos", "linear"]))
def test_one_cycle_never_leaves_its_range(total, pct, three_phase, anneal):
    for t in {0, total // 3, total // 2, total - 1, total, total + 5}:
        rate, _ = lr.one_cycle(
            t,
            0.0,
            max_lr=1.0,
            total_steps=total,
            pct_start=pct,
            three_phase=three_phase and pct <= 0.5,
            anneal_strategy=anneal,
        )
        assert 0 < rate <= 1.0 + 1e-9


def test_one_cycle_is_defined_where_torch_divides_by_zero():
    spec = {"class": "OneCycleLR", "max_lr": 1.0, "pct_start": 0.1}
    schedule = lr.make(spec, base_lr=BASE, epochs=1, steps_per_epoch=10)  # a phase of no steps
    assert schedule.lr(0, 0) == 1.0


def test_training_length_and_rate_fill_what_is_left_out():
    one = lr.make({"class": "OneCycleLR"}, base_lr=0.1, epochs=5, steps_per_epoch=10)
    full = {"class": "OneCycleLR", "max_lr": 0.1, "total_steps": 50}
    two = lr.make(full, base_lr=9.0, epochs=5, steps_per_epoch=10)
    assert [one.lr(0, t) for t in range(50)] == [two.lr(0, t) for t in range(50)]
    cosine = lr.make({"class": "CosineAnnealingLR"}, base_lr=1.0, epochs=8, steps_per_epoch=None)
    assert cosine.lr(4, 0) == pytest.approx(0.5)


def test_interval_step_counts_optimizer_steps():
    spec = {"class": "LinearLR", "start_factor": 0.5, "total_iters": 4, "interval": "step"}
    schedule = lr.make(spec, base_lr=1.0, epochs=3, steps_per_epoch=10)
    assert [schedule.lr(0, t) for t in range(6)] == [0.5, 0.625, 0.75, 0.875, 1.0, 1.0]
    cosine = {"class": "CosineAnnealingLR", "interval": "step"}
    assert lr.make(cosine, base_lr=1.0, epochs=2, steps_per_epoch=4).lr(1, 4) == pytest.approx(0.5)


def test_a_closed_form_may_be_asked_in_any_order():
    schedule = lr.make(EPOCH_WISE[2], base_lr=BASE, epochs=50, steps_per_epoch=None)
    forwards = [schedule.lr(e, e) for e in range(50)]
    assert [schedule.lr(e, e) for e in reversed(range(50))] == forwards[::-1]
    assert schedule.state_dict() == {}
    schedule.load_state_dict({})
    schedule.end_epoch({})


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, r"train\.lr\.class must be a scheduler.*Known: ConstantLR"),
    ({"class": "StepLr", "step_size": 1}, r"got 'StepLr'\. Nearest: 'StepLR'"),
    ({"class": "LambdaLR"}, r"train\.lr\.class must be"),
    ({"class": ["StepLR"]}, r"train\.lr\.class must be"),
    ({"class": "StepLR"}, r"train\.lr needs 'step_size' for StepLR: a whole number >= 1"),
    ({"class": "StepLR", "stepsize": 1}, r"stepsize is not an argument.*Nearest: 'step_size'"),
    ({"class": "StepLR", "step_size": 0}, r"step_size must be a whole number >= 1, got 0"),
    ({"class": "StepLR", "step_size": 1.5}, r"step_size must be a whole number >= 1, got 1\.5"),
    ({"class": "StepLR", "step_size": True}, r"step_size must be a whole number >= 1, got True"),
    ({"class": "ExponentialLR", "gamma": -1}, r"gamma must be a number > 0, got -1"),
    ({"class": "MultiStepLR", "milestones": []}, r"milestones must be a list of"),
    ({"class": "MultiStepLR", "milestones": [1, "x"]}, r"milestones must be a list of"),
    ({"class": "LinearLR", "start_factor": 0}, r"start_factor must be a number in \(0, 1\]"),
    ({"class": "OneCycleLR", "anneal_strategy": "sin"}, r"must be 'cos' or 'linear'"),
    ({"class": "OneCycleLR", "epochs": 3}, r"needs both of 'epochs' and 'steps_per_epoch'"),
    ({"class": "CyclicLR", "max_lr": 1}, r"needs 'base_lr' for CyclicLR"),
    ({"class": "CyclicLR", "base_lr": 0, "max_lr": 1, "mode": "min"}, r"mode must be 'triangular'"),
    ({"class": "ReduceLROnPlateau", "mode": "triangular"}, r"mode must be 'min' or 'max'"),
    ({"class": "ReduceLROnPlateau", "factor": 1.0}, r"factor must be a number in \(0, 1\)"),
    ({"class": "OneCycleLR", "interval": "epoch"}, r"interval is not an argument of OneCycleLR"),
]


@pytest.mark.parametrize(("spec", "message"), WRONG, ids=lambda x: str(x)[:40])
def test_wrong_schedules_are_refused_by_name(spec, message):
    with pytest.raises(UserError, match=message):
        lr.make(spec, base_lr=0.1, epochs=2, steps_per_epoch=4)


@pytest.mark.parametrize(
    "spec", [{"class": "OneCycleLR"}, {"class": "StepLR", "step_size": 1, "interval": "step"}]
)
def test_step_counting_needs_the_number_of_steps(spec):
    with pytest.raises(BindError, match="steps_per_epoch"):
        lr.make(spec, base_lr=0.1, epochs=2, steps_per_epoch=None)


def test_a_one_cycle_shorter_than_training_is_refused():
    spec = {"class": "OneCycleLR", "total_steps": 7}
    with pytest.raises(BindError, match="ends after 7 steps, training has 8"):
        lr.make(spec, base_lr=0.1, epochs=2, steps_per_epoch=4)


def _arguments(of: Callable[..., Any]) -> set[str]:
    import inspect

    return set(inspect.signature(of).parameters) - {"self", "optimizer", "last_epoch"}


def test_every_argument_of_torch_is_known():
    left_out = {"scale_fn", "scale_mode"}  # a function cannot stand in a recipe
    for name in lr._KINDS.keys() - OWN:
        theirs = _arguments(getattr(lr_scheduler, name)) - left_out
        ours = set(lr._arguments(name)) - {"interval", "metric"}
        assert ours == theirs, name


# ------------------------------------------------------------------ Distiller's


def spans(*parts: dict[str, Any], base: float = BASE, epochs: int = 300) -> lr.Schedule:
    spec = {"class": "Spans", "spans": list(parts)}
    return lr.make(spec, base_lr=base, epochs=epochs, steps_per_epoch=None)


def test_gammas_belong_to_milestones():
    spec = {"class": "MultiStepMultiGammaLR", "milestones": [2, 4, 4], "gammas": [0.5, 0.1, 0.2]}
    schedule = lr.make(spec, base_lr=1.0, epochs=9, steps_per_epoch=None)
    assert [schedule.lr(e, 0) for e in range(6)] == pytest.approx([1, 1, 0.5, 0.5, 0.01, 0.01])


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5).map(sorted), st.floats(0.1, 0.9))
def test_equal_gammas_are_multi_step(milestones, gamma):
    for t in range(22):
        many = lr.multi_step_multi_gamma(
            t, BASE, milestones=milestones, gammas=[gamma] * len(milestones)
        )
        assert many == pytest.approx(lr.multi_step(t, BASE, milestones=milestones, gamma=gamma))


def test_a_span_jumps_to_its_closed_form_as_distiller_does():
    # golden values of Distiller: ExponentialLR(0.95) from epoch 40, StepLR(25, 0.05) from 180
    exponential = spans(
        {"start": 40, "stop": 60, "schedule": {"class": "ExponentialLR", "gamma": 0.95}}
    )
    assert exponential.lr(40, 0) == BASE
    assert exponential.lr(41, 0) == pytest.approx(BASE * 0.95**41)
    assert exponential.lr(60, 0) == pytest.approx(BASE * 0.95**60)
    assert exponential.lr(299, 0) == exponential.lr(60, 0)
    step = {"class": "StepLR", "step_size": 25, "gamma": 0.05}
    assert spans({"start": 180, "schedule": step}).lr(180, 0) == BASE
    assert spans({"start": 180, "schedule": step}).lr(181, 0) == pytest.approx(BASE * 0.05**7)


def test_spans_stand_still_between_and_the_later_of_two_counts():
    half, tenth = ({"class": "ExponentialLR", "gamma": g} for g in (0.5, 0.1))
    schedule = spans(
        {"start": 0, "stop": 5, "every": 2, "schedule": half},
        {"start": 8, "stop": 9, "schedule": half},
        {"start": 2, "stop": 3, "schedule": tenth},
        base=1.0,
    )
    got = [schedule.lr(e, e) for e in range(11)]
    assert got == pytest.approx([1, 0.5, 0.5, 1e-3, 1e-3, *[0.5**5] * 4, 0.5**9, 0.5**9])
    assert [schedule.lr(e, e) for e in reversed(range(11))] == got[::-1]
    assert schedule.momentum(3, 3) is None


def test_all_classes_count_epochs_within_spans():
    cycle = {"class": "CyclicLR", "base_lr": 0.1, "max_lr": 0.3, "step_size_up": 2}
    schedule = spans({"start": 0, "schedule": cycle}, epochs=5)
    assert [schedule.lr(e, 100 * e) for e in range(5)] == pytest.approx([BASE, 0.2, 0.3, 0.2, 0.1])
    assert schedule.momentum(0, 0) is None
    assert [schedule.momentum(e, 100 * e) for e in (1, 2)] == pytest.approx([0.85, 0.8])
    one = spans(
        {"start": 0, "stop": 4, "schedule": {"class": "OneCycleLR", "max_lr": 1.0}}, epochs=9
    )
    assert one.lr(4, 0) == pytest.approx(lr.one_cycle(4, 0, max_lr=1.0, total_steps=4)[0])
    assert lr.cycles_momentum({"class": "Spans", "spans": [{"start": 0, "schedule": cycle}]})


@given(st.integers(0, 7), st.integers(0, 7))
def test_a_plateau_listens_within_its_span_from_the_rate_it_finds(start, stop_at):
    half = {"class": "ExponentialLR", "gamma": 0.5}
    plateau = {"class": "ReduceLROnPlateau", "patience": 0}

    def fresh() -> lr.Schedule:
        return spans(
            {"start": 0, "stop": 2, "schedule": half},
            {"start": start + 2, "stop": 12, "schedule": plateau},
            base=8.0,
        )

    whole, resumed = fresh(), fresh()
    for epoch in range(12):
        if epoch == stop_at:
            other = fresh()
            other.load_state_dict(resumed.state_dict())
            resumed = other
        judged = max(0, epoch - (start + 2) - 1)  # the first value of the span is the best one
        wanted = [8.0, 4.0][epoch] if epoch < 2 else 2.0 * 0.1**judged
        for s in (whole, resumed):
            assert s.lr(epoch, 0) == pytest.approx(wanted, abs=1e-7)
            s.end_epoch({"val_loss": 1.0})


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ({"start": 0}, r"spans\.0 needs 'schedule'"),
        ({"start": 0, "schedule": {"class": "Spans", "spans": []}}, r"spans\.0 needs 'schedule'"),
        ({"schedule": {"class": "ExponentialLR", "gamma": 0.5}}, r"spans\.0 needs 'start'"),
        ({"start": -1, "schedule": {}}, r"spans\.0\.start must be a whole number >= 0, got -1"),
        ({"start": 0, "every": 0, "schedule": {}}, r"spans\.0\.every must be a whole number >= 1"),
        ({"begin": 0}, r"spans\.0\.begin is not an argument of a span"),
        (
            {"start": 3, "stop": 3, "schedule": {"class": "ExponentialLR", "gamma": 0.5}},
            r"spans\.0\.stop must be more than start \(3\), got 3",
        ),
        (
            {"start": 0, "schedule": {"class": "ExponentialLR", "gama": 0.5}},
            r"spans\.0\.schedule\.gama is not an argument of ExponentialLR\. Nearest: 'gamma'",
        ),
        ({"start": 0, "schedule": {"class": "StepLR"}}, r"spans\.0\.schedule needs 'step_size'"),
    ],
)
def test_wrong_spans_are_refused_by_name(span, message):
    with pytest.raises(UserError, match=r"train\.lr\." + message):
        spans(span)


def test_as_many_gammas_as_milestones():
    spec = {"class": "MultiStepMultiGammaLR", "milestones": [1, 2], "gammas": [0.5]}
    with pytest.raises(UserError, match=r"gammas must be as many as milestones \(2\)"):
        lr.make(spec, base_lr=1.0, epochs=2, steps_per_epoch=None)
