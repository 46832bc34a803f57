import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from gracile.core.ramps import cubic
from gracile.errors import UserError
from gracile.recipe.fields import (
    Amount,
    KernelRef,
    Level,
    Selector,
    kernel,
    read_amount,
    read_level,
    read_selector,
)

pytestmark = pytest.mark.usefixtures("toy_methods")


class Holder(BaseModel):
    model_config = ConfigDict(frozen=True)

    weights: Selector = "**"
    criterion: KernelRef("criterion") = None  # type: ignore[valid-type]
    level: Level = 0.0  # type: ignore[assignment]
    amount: Amount = 1.0  # type: ignore[assignment]
    choose: KernelRef("criterion", "any") = "any"  # type: ignore[valid-type]


def back(**values):
    """The values after a trip through JSON."""
    one = Holder(**values)
    two = Holder.model_validate_json(one.model_dump_json(exclude_unset=True), strict=True)
    assert two == one
    assert hash(two) == hash(one)
    return one


def test_a_selector_keeps_a_text_and_freezes_a_list():
    assert back(weights="type:Conv2d").weights == "type:Conv2d"
    assert back(weights=["a", "!b"]).weights == ("a", "!b")


@pytest.mark.parametrize("value", ["", "  ", "!", "re:", "type:", [], ["a", ""], ["a", 3], 3, None])
def test_an_empty_selector_is_refused_when_read(value):
    with pytest.raises(ValueError, match=r"must"):
        read_selector(value)


def test_a_kernel_by_name_is_the_function_itself():
    got = back(criterion="flat").criterion
    assert (got.kind, got.name, got.options) == ("criterion", "flat", {})
    assert got.fn(3) == 3
    assert got.plain() == "flat"


def test_options_of_a_kernel_are_bound():
    got = back(criterion={"name": "power", "p": 3, "scale": 2}).criterion
    assert got.fn(1) == 8
    assert got.plain() == {"name": "power", "p": 3, "scale": 2}


def test_a_kernel_that_is_a_class_becomes_a_factory():
    got = kernel("criterion", "memory", momentum=0.5)
    one, two = got.fn(), got.fn()
    assert one.momentum == 0.5
    assert one is not two
    assert kernel("criterion", "memory").fn().momentum == 0.9


def test_kernels_compare_by_what_they_say():
    assert kernel("criterion", "power", p=3) == kernel("criterion", "power", p=3)
    assert kernel("criterion", "power", p=3) != kernel("criterion", "power", p=2)
    assert len({kernel("criterion", "power", p=p) for p in (1, 2, 1)}) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("powr", {}, "unknown criterion 'powr'. Nearest: 'power'"),
        ("power", {"q": 1}, "has no option 'q'"),
        ("power", {"p": 1.5}, "'p' must be a whole number, got 1.5"),
        ("power", {"absolute": 1}, "'absolute' must be a bool"),
        ("flat", {"p": 1}, "has no option 'p'"),
    ],
)
def test_a_wrong_kernel_is_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        kernel("criterion", name, **options)


@given(st.floats(0, 1))
def test_a_fixed_level_does_not_move(progress):
    assert read_level(0.3).at(progress) == 0.3


@given(st.floats(0, 1), st.floats(0, 0.99), st.floats(0, 0.99))
def test_a_ramped_level_is_its_ramp(progress, initial, final):
    level = back(level={"ramp": "cubic", "initial": initial, "final": final}).level
    assert level.at(progress) == cubic(progress, initial, final)
    assert level.plain() == {"ramp": "cubic", "initial": initial, "final": final}


def test_a_level_starts_from_0_if_not_told():
    assert read_level({"ramp": "linear", "final": 0.8}).at(0.5) == pytest.approx(0.4)
    assert back(level=0).level.plain() == 0.0


@pytest.mark.parametrize(
    "value",
    [
        *(1, 1.0, -0.1, True, None, "0.5", [0.5], {}, {"final": 0.5}, {"ramp": "cubic"}),
        {"ramp": "cubic", "final": 1},
        {"ramp": "cubic", "final": 0.5, "initial": -1},
        {"ramp": {"name": "cubic", "x": 1}, "final": 0.5},
        {"ramp": 3, "final": 0.5},
    ],
    ids=str,
)
def test_a_level_out_of_range_or_shape_is_refused(value):
    with pytest.raises(ValueError, match=r"must|needs|has no"):
        read_level(value)


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ({"name": "multistep", "steps": [0.5, 0.2]}, "multistep needs steps that rise"),
        ({"name": "polynomial", "power": -1}, "polynomial needs a power of more than 0"),
    ],
)
def test_a_ramp_that_cannot_go_between_the_ends_is_refused_when_read(ramp, message):
    with pytest.raises(ValueError, match=message) as error:
        read_level({"ramp": ramp, "final": 0.5})
    assert error.value.keys == ("ramp",)


def test_an_amount_may_be_more_than_1():
    amount = back(amount={"ramp": "linear", "initial": 1, "final": 5}).amount
    assert amount.at(0.25) == 2.0
    assert back(amount=2.5).amount.plain() == 2.5


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, True, None, "2", [2], {"ramp": "linear", "final": 0}),
        {"ramp": "linear", "initial": -1, "final": 2},
        {"ramp": "exponential", "initial": 0, "final": 2},
    ],
    ids=str,
)
def test_an_amount_that_is_not_positive_is_refused(value):
    with pytest.raises(ValueError, match=r"must|needs"):
        read_amount(value)


def test_a_kernel_option_may_allow_a_word():
    assert back(choose="any").choose == "any"
    assert back(choose="flat").choose == kernel("criterion", "flat")
    assert back(choose={"name": "power", "p": 3}).choose.options == {"p": 3}
