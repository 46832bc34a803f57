"""One set of flags for all masks: who says what becomes of them, moment by moment."""

import pytest

from gracile.core.schedule import Calendar, When, timetable
from gracile.prune.flags import Flags, Policy

CALENDAR = Calendar(epochs=8, steps=4)


def policy(start, stop, masked="frozen", lifetime="run", every="1ep"):
    when = When(start=f"{start}ep", stop=f"{stop}ep", every=every)
    return Policy.of(when, timetable(when, CALENDAR), CALENDAR, masked, lifetime)


def styles(*policies):
    flags = Flags(policies)
    return [flags.at((epoch, 0)) for epoch in range(9)]


def test_without_flags_masks_are_multiplied_into_the_weights_for_good():
    assert styles(policy(1, 3)) == ["zeroed"] * 9


@pytest.mark.parametrize("masked", ["trained", "reset", "frozen"])
def test_masks_of_the_forward_pass_are_lifted_when_no_policy_acts(masked):
    wanted = ["zeroed"] + [masked] * 2 + ["lifted"] * 6
    assert styles(policy(1, 3, masked, "span")) == wanted


def test_the_last_epoch_of_keep_mask_clears_the_flags():
    assert styles(policy(1, 3, "reset", "run")) == ["zeroed", "reset", "reset"] + ["zeroed"] * 6


def test_the_policy_that_begins_last_speaks_for_all():
    wanted = ["zeroed"] * 4 + ["reset"] * 2 + ["reset"] * 2 + ["lifted"]
    assert styles(policy(0, 8), policy(4, 6, "reset", "span")) == wanted
    assert styles(policy(4, 6, "reset", "span"), policy(0, 8)) == wanted
    cleared = ["reset"] * 4 + ["zeroed"] * 5
    assert styles(policy(0, 8, "reset", "span"), policy(4, 6)) == cleared


def test_of_two_that_begin_together_the_later_one_in_the_file_speaks():
    a, b = policy(0, 8), policy(0, 8, "reset", "span")
    assert styles(a, b) == ["reset"] * 8 + ["lifted"]
    assert styles(b, a) == ["zeroed"] * 9


def test_an_end_comes_before_a_beginning_of_the_same_moment():
    first, second = policy(0, 2, "reset", "run"), policy(2, 4, "trained", "span")
    wanted = ["reset"] * 2 + ["trained"] * 2 + ["lifted"] * 5
    assert styles(first, second) == styles(second, first) == wanted


def test_two_policies_in_one_epoch_lose_the_second_copy_of_the_weights():
    copies = policy(0, 4, "trained", "run")
    assert styles(copies, policy(1, 2, "trained", "span", every="4mb"))[:5] == [
        "trained", "reset", "trained", "trained", "zeroed",
    ]  # fmt: skip
    assert styles(copies, copies)[:4] == ["trained"] * 4  # entries of one policy


def test_flags_are_written_within_an_epoch_where_the_first_firing_is():
    flags = Flags([policy(0, 8), policy(1, 2, "reset", "span", every="2mb")])
    assert [flags.at(now) for now in [(0, 3), (1, 0), (1, 3)]] == ["zeroed", "reset", "reset"]


def test_a_list_of_epochs_ends_with_its_last_one():
    when = When(at=["1ep", "4ep"])
    listed = Policy.of(when, timetable(when, CALENDAR), CALENDAR, "frozen", "batch")
    assert (listed.begin, listed.end, listed.epochs) == ((1, 0), (5, 0), {1, 4})
