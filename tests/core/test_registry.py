import pytest

from gracile import registry
from gracile.core.kinds import check_options, kernel_options
from gracile.errors import UserError
from gracile.registry import Entry, register


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """A copy that a test may write to."""
    for kind in ("ramp", "criterion"):
        registry.load(kind)
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def test_a_registered_thing_is_found_with_its_facts():
    @register("criterion", "mine", source="a paper", colour="red")
    def mine(weight):
        """First line.

        Second.
        """

    entry = registry.get("criterion", "mine")
    assert entry == Entry("criterion", "mine", mine, "a paper", __name__, {"colour": "red"})
    assert entry.summary == "First line."
    assert "mine" in registry.names("criterion")
    assert entry in list(registry.entries("criterion"))


def test_a_thing_without_docstring_has_an_empty_summary():
    register("criterion", "bare", source="-")(lambda w: w)
    assert registry.get("criterion", "bare").summary == ""


def test_one_thing_may_have_two_names_but_not_two_things_one_name():
    def one(w): ...

    def two(w): ...

    register("criterion", "x", source="-")(one)
    register("criterion", "y", source="-")(one)
    register("criterion", "x", source="-")(one)  # as on a re-import
    with pytest.raises(ValueError, match=r"criterion 'x' of .* is already registered by"):
        register("criterion", "x", source="-")(two)


def test_kinds_do_not_share_names():
    register("criterion", "linear", source="-")(lambda w: w)
    assert registry.get("ramp", "linear").obj is not registry.get("criterion", "linear").obj


def test_an_unknown_kind_or_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown kind 'criterium'\. Nearest: 'criterion'"):
        register("criterium", "x", source="-")
    with pytest.raises(UserError, match=r"unknown ramp 'cubik'\. Nearest: 'cubic'"):
        registry.get("ramp", "cubik")
    with pytest.raises(UserError, match=r"unknown ramp 'zzz'\. Known: agp, const"):
        registry.get("ramp", "zzz")


def test_names_are_sorted():
    assert registry.names("ramp") == sorted(registry.names("ramp"))
    assert [e.name for e in registry.entries("ramp")] == registry.names("ramp")


def test_options_of_a_function_and_of_a_class():
    def fn(w, *, k: int = 2): ...

    class Cls:
        def __init__(self, *, q: float = 99.9): ...

    assert list(kernel_options(fn)) == ["k"]
    assert list(kernel_options(Cls)) == ["q"]


def test_options_are_checked_by_name_and_type():
    @register("criterion", "opts", source="-")
    def opts(w, *, k: int = 2, on: bool = True, how: str = "a", free=None): ...

    check_options("criterion", "opts", {"k": 3, "on": False, "how": "b", "free": [1]})
    for options, message in [
        ({"kk": 1}, "has no option 'kk'.*k"),
        ({"k": "3"}, "option 'k' must be a whole number, got '3'"),
        ({"k": True}, "option 'k' must be a whole number"),
        ({"on": 1}, "option 'on' must be a bool"),
        ({"how": 1}, "option 'how' must be a text"),
    ]:
        with pytest.raises(UserError, match=message):
            check_options("criterion", "opts", options)
