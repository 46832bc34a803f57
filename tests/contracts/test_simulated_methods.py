"""Every method can be simulated, and mini-batches at which nothing is due make no difference."""

import method_cases as cases
import pytest
import torch

from gracile.core.schedule import Calendar, timetable
from gracile.train import simulate as room
from gracile.train.simulate import simulate

STEPS = 7


def run(name):
    torch.manual_seed(0)
    example = cases.data(99)[0][0][:4]
    return simulate(cases.recipe(name), cases.Tiny(), example=example, steps_per_epoch=STEPS)


@pytest.mark.parametrize("name", cases.names())
def test_mini_batches_that_are_left_out_are_harmless(name, monkeypatch):
    short = run(name)
    every = {epoch: set(range(STEPS)) for epoch in range(cases.EPOCHS)}
    monkeypatch.setattr(room, "_due", lambda s: every)
    assert run(name) == short


@pytest.mark.parametrize("name", cases.names())
def test_it_tells_every_firing(name):
    found = run(name)
    for id, entry in cases.recipe(name).methods.items():
        told = sum(f.times for m in (*found.epochs, found.end) for f in m.fired if f.id == id)
        when = entry.options.timing
        due = 0 if when is None else len(timetable(when, Calendar(cases.EPOCHS, STEPS)))
        assert told == due
