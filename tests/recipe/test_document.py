import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gracile.errors import RecipeError
from gracile.recipe.document import dump, parse, scalar, unprintable


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        ("5.0e-4", 5e-4),
        (".5", 0.5),
        ("-1.", -1.0),
        ("+3", 3),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("true", True),
        ("FALSE", False),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("n", "n"),
        ("tRUE", "tRUE"),
        ("~", None),
        ("null", None),
        ("", None),
        ("None", "None"),
        ("2ep", "2ep"),
        ("e5", "e5"),
        (".", "."),
        ("-", "-"),
    ],
)
def test_what_an_unquoted_word_means(text, value):
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


@pytest.mark.parametrize("text", [".inf", "-.Inf", ".NaN", "1e400", str(2**63), "9" * 5000])
def test_a_number_no_machine_holds_is_refused(text):
    with pytest.raises(ValueError, match=r"finite|64 bits"):
        scalar(text)


def test_every_path_knows_its_line():
    got = parse("a: 1\nb:\n  c: [x,\n    y]\n  d: {e: 2}\n", "f.yaml")
    assert got.data == {"a": 1, "b": {"c": ["x", "y"], "d": {"e": 2}}}
    lines = {keys: got.line(keys) for keys in got.places}
    assert lines == {
        (): 1, ("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "c", 0): 3, ("b", "c", 1): 4,
        ("b", "d"): 5, ("b", "d", "e"): 5,
    }  # fmt: skip
    assert got.place(("b", "d", "missing", 0)) == "f.yaml:5"
    assert got.line(("nothing",)) is None


def test_an_alias_repeats_its_value():
    got = parse("a: &x {k: [1, 2]}\nb: *x\nc: [*x, *x]\n", "f")
    assert got.data["b"] == {"k": [1, 2]}
    assert got.data["c"] == [got.data["a"]] * 2
    assert got.place(("b", "k", 0)) == "f:2"


def test_what_an_alias_repeats_counts_every_time():
    ten = "a: &a [" + "x, " * 99 + "x]\nb: ["
    assert len(parse(ten + "*a, " * 90 + "*a]", "f").data["b"]) == 91
    with pytest.raises(RecipeError, match="more than 10000 values"):
        parse(ten + "*a, " * 110 + "*a]", "f")


def test_an_alias_cannot_hide_depth():
    text = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 60))
    with pytest.raises(RecipeError, match=r"f:5\d: .*nested deeper than 50"):
        parse(text, "f")


def test_a_byte_order_mark_and_windows_lines_are_fine():
    assert parse("\ufeffa: 1\r\nb: 2\r\n", "f").data == {"a": 1, "b": 2}


words = st.text(max_size=12).filter(lambda s: not unprintable(s))
keys = words.filter(lambda k: len(k) < 200)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    words,
    st.sampled_from(["yes", "1e-6", "0x1", "~", "<<", "null", "*a", "!x", "&b", "1:30", "- ", "#"]),
)
values = st.recursive(
    scalars,
    lambda v: st.one_of(st.lists(v, max_size=4), st.dictionaries(keys, v, max_size=4)),
    max_leaves=12,
)


@given(values)
def test_what_is_written_reads_back_equal(value):
    again = parse(dump({"top": value}), "f").data["top"]
    assert again == value
    assert _types(again) == _types(value)


def _types(value):
    if isinstance(value, dict):
        return {k: _types(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_types(v) for v in value]
    return type(value), math.copysign(1, value) if isinstance(value, float) else None


def test_files_of_others_may_repeat_keys_and_have_numbers_as_keys():
    twice: list[str] = []
    text = "a:\n  b: {x: [1]}\n  1.0: {y: 2}\n  b:\n    x: 4\na2: 1\n"
    document = parse(text, "f.yaml", twice)
    assert document.data == {"a": {"b": {"x": 4}, "1.0": {"y": 2}}, "a2": 1}
    assert twice == ["f.yaml:4: 'b' was on line 2 already; this one counts."]
    assert document.line(("a", "b", "x")) == 5
    assert document.place(("a", "b", "x", 0)) == "f.yaml:5"  # not the first one's list
    for strict in (text, "1: 2"):
        with pytest.raises(RecipeError):
            parse(strict, "f.yaml")
    for never in ("a: !!python/name:os.system", "? [a]\n: 1", "<<: {a: 1}", "true: 1"):
        with pytest.raises(RecipeError):
            parse(never, "f.yaml", [])
