import pytest
from hypothesis import given
from hypothesis import strategies as st

from gracile import errors
from gracile.errors import GracileError, MissingExtra, UserError, nearest
from gracile.units import human_bytes, human_count, human_ms, percent

ALL = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, GracileError)]


def test_exit_statuses_are_those_of_the_command_line():
    codes = {e.__name__: e.exit_code for e in ALL}
    assert codes == {
        "GracileError": 2,
        "UserError": 2,
        "RecipeError": 2,
        "BindError": 2,
        "PlanConflict": 2,
        "ResumeError": 2,
        "VerificationError": 3,
        "ParityError": 3,
        "MissingExtra": 4,
    }


def test_value_errors_are_value_errors_and_failed_proofs_are_not():
    values = {e.__name__ for e in ALL if issubclass(e, ValueError)}
    assert values == {"UserError", "RecipeError", "BindError", "PlanConflict", "ResumeError"}
    assert issubclass(errors.PlanConflict, errors.BindError)
    assert issubclass(errors.RecipeError, UserError)


def test_a_missing_extra_gives_the_command():
    error = MissingExtra("the Ray runner", "ray")
    assert str(error) == "the Ray runner needs an extra: pip install 'gracile[ray]'"
    assert error.extra == "ray"


@pytest.mark.parametrize(
    ("name", "known", "says"),
    [
        ("epochz", ["epochs", "seed"], " Nearest: 'epochs'."),
        ("zzz", ["b", "a", "a"], " Known: a, b."),
        ("zzz", [], ""),
        ("", ["a"], " Known: a."),
    ],
)
def test_nearest(name, known, says):
    assert nearest(name, known) == says


def test_nearest_names_several_if_asked_and_cuts_long_lists():
    assert nearest("conv", ["conv1", "conv2", "fc"], n=2) in (
        " Nearest: 'conv1', 'conv2'.",
        " Nearest: 'conv2', 'conv1'.",
    )
    said = nearest("zzz", [f"name{i:03}" for i in range(50)])
    assert said.startswith(" Known: name000, ")
    assert said.endswith("name019, ....")


@pytest.mark.parametrize(
    ("fn", "value", "text"),
    [
        (human_bytes, 0, "0 B"),
        (human_bytes, 1023, "1023 B"),
        (human_bytes, 1024, "1.00 KiB"),
        (human_bytes, 1_092_568, "1.04 MiB"),
        (human_bytes, 3 * 2**30, "3.00 GiB"),
        (human_bytes, 5000 * 2**30, "5000.00 GiB"),
        (human_count, 0, "0"),
        (human_count, 999, "999"),
        (human_count, 272_474, "272.47 k"),
        (human_count, 40_550_000, "40.55 M"),
        (human_count, 4.1e9, "4.10 G"),
        (human_ms, 0.36012, "0.360 ms"),
        (human_ms, 4.254, "4.25 ms"),
        (human_ms, 51.26, "51.3 ms"),
        (human_ms, -4.254, "-4.25 ms"),
        (percent, 0.5, "50.0 %"),
        (percent, -0.0123, "-1.2 %"),
    ],
)
def test_numbers_for_people(fn, value, text):
    assert fn(value) == text


def test_percent_digits():
    assert percent(0.9255, 2) == "92.55 %"
    assert percent(1, 0) == "100 %"


@given(st.floats(0, 1e15))
def test_a_shown_number_is_within_its_rounding(value):
    number, unit = human_bytes(value).split()
    factor = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]
    assert abs(float(number) * factor - value) <= (0.5 if unit == "B" else 0.005 * factor) * 1.001
