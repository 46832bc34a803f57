from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from gracile.core.schedule import Calendar, Time, Timetable, When, timetable
from gracile.errors import BindError


def instants(epochs: int, steps: int | None, accumulate: int = 1, **when: str):
    return list(timetable(When(**when), Calendar(epochs, steps, accumulate)).instants)


times = st.builds(
    lambda n, d, unit: Time(Fraction(n) + (Fraction(d, 100) if unit == "ep" else 0), unit),
    st.integers(0, 10**6),
    st.integers(0, 99),
    st.sampled_from(["ep", "it", "mb"]),
)


@given(times)
def test_a_time_reads_back_from_its_text(time):
    assert Time.parse(str(time)) == time


@pytest.mark.parametrize(
    "text", ["0.00001ep", "123456789012345678901ep", "0.1234567890123456789ep"]
)
def test_text_of_a_time_is_exact(text):
    assert str(Time.parse(text)) == text
    assert Time.parse(text).value == Fraction(text[:-2])


def test_a_time_that_has_no_finite_decimals_still_has_a_text():
    assert str(Time(Fraction(1, 3), "ep")).startswith("0.3")


@pytest.mark.parametrize("text", [" 2ep ", "2 ep", "2.0ep"])
def test_spaces_and_zeros_do_not_matter(text):
    assert Time.parse(text) == Time(Fraction(2), "ep")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-2ep", "must not be negative, got '-2ep'; 0ep is the start"),
        ("-1", "must not be negative"),
        ("2", "needs a number and a unit"),
        (2, "needs a number and a unit"),
        (None, "needs a number and a unit"),
        ("2 epochs", "write 2ep, 50it or 100mb"),
        ("1.5it", "whole numbers, got '1.5it'"),
        ("0.5mb", "whole numbers"),
        ("end", "needs a number"),
        ("1e3ep", "needs a number"),
    ],
)
def test_a_malformed_time_says_how_to_write_it(text, message):
    with pytest.raises(ValueError, match=message):
        Time.parse(text)


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ({}, "needs 'at', or 'start'"),
        ({"at": "1ep", "start": "0ep"}, "not 'at' with 'start'"),
        ({"at": "end", "every": "1ep"}, "not 'at' with 'every'"),
        ({"start": "0ep", "every": "0it"}, "'every' must be more than 0"),
        ({"start": "2ep", "stop": "2ep"}, "never fires"),
        ({"start": "2ep", "stop": "1ep"}, "never fires"),
        ({"start": "end"}, "needs a number and a unit"),
        ({"att": "1ep"}, "Extra inputs"),
        ({"at": []}, r"needs a time, got \[\]; write at: \[1ep, 3ep\]"),
        ({"at": ["1ep", "end"]}, "needs a number and a unit"),
        ({"at": ["1ep"], "every": "1ep"}, "not 'at' with 'every'"),
    ],
)
def test_a_when_that_cannot_be_meant_is_refused(when, message):
    with pytest.raises(ValidationError, match=message):
        When.model_validate(when)


def test_a_when_writes_itself():
    assert (
        str(When(start="0ep", stop="2ep", every="50it")) == "{start: 0ep, stop: 2ep, every: 50it}"
    )
    assert str(When(at="end")) == "{at: end}"
    dumped = When(start="0.5ep", every="3mb").model_dump(mode="json")
    assert dumped == {"at": None, "start": "0.5ep", "stop": None, "every": "3mb", "times": None}
    assert When.model_validate(dumped) == When(start="0.5ep", every="3mb")


def test_a_list_of_times_fires_at_each():
    when = When(at=["0ep", "1.5ep", "17mb"])
    table = timetable(when, Calendar(epochs=4, steps=10))
    assert table.instants == ((0, 0), (1, 5), (1, 7))
    assert [table.progress(k) for k in range(3)] == [0.0, 0.5, 1.0]
    assert not when.once
    assert not when.at_end
    assert str(when) == "{at: [0ep, 1.5ep, 17mb]}"
    assert When.model_validate(when.model_dump(mode="json")) == when
    assert timetable(When(at=["2ep"]), Calendar(3)).progress(0) == 1.0


def test_one_point_is_once():
    assert When(at="1ep").once
    assert When(at="end").once
    assert not When(start="1ep").once


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (["1ep", "4ep"], r"^4ep of when \{at: \[1ep, 4ep\]\} never comes in 4 epoch\(s\)"),
        (["2ep", "1ep"], r"the times of when .* must rise\. Put them in order, each once\."),
        (["1ep", "10mb"], "must rise"),  # the same moment
    ],
)
def test_listed_times_must_rise_and_come(times, message):
    with pytest.raises(BindError, match=message):
        timetable(When(at=times), Calendar(epochs=4, steps=10))


def test_the_documented_example():
    # recipe: {start: 0ep, stop: 30ep, every: 2ep} fires 15 times, the last before epoch 28
    got = instants(40, 10, start="0ep", stop="30ep", every="2ep")
    assert got == [(e, 0) for e in range(0, 30, 2)]


def test_epoch_times_fire_before_the_first_batch():
    assert instants(3, 5, at="2ep") == [(2, 0)]
    assert instants(3, 5, at="0ep") == [(0, 0)]
    assert instants(3, None, at="2ep") == [(2, 0)]


def test_a_part_of_an_epoch_is_a_mini_batch():
    assert instants(3, 10, at="0.5ep") == [(0, 5)]
    assert instants(3, 7, at="1.5ep") == [(1, 3)]


def test_stop_is_exclusive_and_defaults_to_the_end():
    assert instants(2, 4, start="2mb", stop="6mb", every="2mb") == [(0, 2), (1, 0)]
    assert instants(2, 4, start="5mb", every="2mb") == [(1, 1), (1, 3)]
    assert instants(3, 4, start="1ep") == [(1, 0), (2, 0)]
    assert instants(3, 4, stop="2ep") == [(0, 0), (1, 0)]


def test_half_epochs_of_an_odd_number_of_batches_do_not_drift():
    got = instants(10, 391, start="0ep", every="0.5ep")
    assert len(got) == 20
    assert got[::2] == [(e, 0) for e in range(10)]


def test_steps_count_optimizer_steps_and_the_short_last_one_too():
    # 5 mini-batches, 2 per step: steps begin at batches 0, 2, 4 (the last has one mini-batch only)
    assert instants(2, 5, 2, start="0it", every="1it") == [
        (0, 0), (0, 2), (0, 4), (1, 0), (1, 2), (1, 4),
    ]  # fmt: skip
    assert instants(2, 5, 2, at="3it") == [(1, 0)]
    assert instants(2, 5, 2, start="1ep", every="2it") == [(1, 0), (1, 4)]
    assert instants(2, 4, 1, at="3it") == instants(2, 4, 1, at="3mb") == [(0, 3)]


def test_after_training():
    table = timetable(When(at="end"), Calendar(epochs=0))
    assert table == Timetable((), at_end=1)
    assert len(table) == 1
    assert table.progress(0) == 1.0


def test_several_times_after_training():
    when = When(at="end", times=3)
    table = timetable(when, Calendar(epochs=2, steps=5))
    assert table == Timetable((), at_end=3)
    assert [table.progress(k) for k in range(len(table))] == [0.0, 0.5, 1.0]
    assert table.index((1, 4)) is None
    assert not when.once
    assert str(when) == "{at: end, times: 3}"
    assert When.model_validate(when.model_dump(mode="json")) == when
    assert When(at="end", times=1).once
    for form in ({"at": "1ep"}, {"at": ["1ep", "2ep"]}, {"start": "1ep"}):
        with pytest.raises(ValueError, match="'times' goes with at: end"):
            When(**form, times=2)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        When(at="end", times=0)


@pytest.mark.parametrize(
    ("when", "epochs", "steps", "message"),
    [
        ({"at": "3ep"}, 3, 5, "never fires in 3 epoch"),
        ({"at": "0ep"}, 0, None, r"no training \(0 epochs\); write {at: end}"),
        ({"start": "0ep"}, 0, None, r"no training \(0 epochs\)"),
        ({"start": "5ep", "stop": "9ep"}, 3, 5, "never fires"),
        ({"at": "50it"}, 3, None, "pass steps_per_epoch"),
        ({"at": "1.5ep"}, 3, None, "pass steps_per_epoch"),
        ({"start": "0ep", "every": "0.5ep"}, 3, None, "pass steps_per_epoch"),
        ({"start": "0ep", "every": "10mb"}, 3, None, "pass steps_per_epoch"),
        ({"start": "0ep", "stop": "10it"}, 3, None, "pass steps_per_epoch"),
    ],
)
def test_a_timetable_that_cannot_be_is_a_bind_error(when, epochs, steps, message):
    with pytest.raises(BindError, match=message):
        timetable(When(**when), Calendar(epochs, steps))


@pytest.mark.parametrize("args", [(-1,), (1, 0), (1, 5, 0)])
def test_an_impossible_calendar_is_refused(args):
    with pytest.raises(BindError, match="must be at least"):
        Calendar(*args)


def test_progress_is_k_over_n_minus_1():
    table = timetable(When(start="0ep"), Calendar(5, 3))
    assert [table.progress(k) for k in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


calendars = st.builds(Calendar, st.integers(1, 8), st.integers(1, 30), st.integers(1, 5))


@given(calendars, times, times, times)
def test_firings_are_distinct_ordered_and_inside_training(calendar, start, stop, every):
    assume(every.value > 0)
    try:
        table = timetable(When(start=start, stop=stop, every=every), calendar)
    except (ValidationError, BindError):
        return
    flat = [e * calendar.steps + b for e, b in table.instants]
    assert flat == sorted(set(flat))
    assert flat[0] == calendar.minibatch(start)
    assert flat[-1] < min(calendar.total, calendar.minibatch(stop))
    assert all(0 <= b < calendar.steps for _, b in table.instants)
    assert [table.index(i) for i in table.instants] == list(range(len(table)))
    assert table.progress(len(table) - 1) == 1.0


@given(calendars, st.integers(0, 200))
def test_an_optimizer_step_begins_at_a_multiple_of_accumulate(calendar, update):
    epoch, batch = calendar.instant(calendar.of_update(update))
    assert epoch == update // calendar.updates
    assert batch == update % calendar.updates * calendar.accumulate < calendar.steps


def test_index_of_a_moment_without_firing_is_none():
    table = timetable(When(start="1ep", every="2ep"), Calendar(4, 3))
    assert table.index((0, 0)) is None
    assert table.index((1, 1)) is None
    assert table.index((9, 9)) is None
