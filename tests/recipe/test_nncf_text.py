import json
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gracile.errors import RecipeError
from gracile.recipe.nncf.text import parse

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(PLAIN, st.sampled_from([None, 1, "\t"]))
def test_reads_what_the_standard_library_reads(value, indent):
    text = json.dumps(value, indent=indent)
    assert parse(text, "c").data == json.loads(text)


@given(st.dictionaries(st.text(), PLAIN, min_size=1))
def test_every_key_of_an_indented_file_has_its_line(value):
    text = json.dumps(value, indent=1)
    document = parse(text, "c")
    for key in value:
        line = text.splitlines()[document.line((key,)) - 1]
        assert line.startswith(f" {json.dumps(key)}:")


def test_comments_and_trailing_commas_are_blank():
    text = '{ // one\n "a": [1, 2,], /* two\n lines */ "b//c": "/* text */",\n}'
    document = parse(text, "c.json")
    assert document.data == {"a": [1, 2], "b//c": "/* text */"}
    assert document.line(("a",)) == 2
    assert document.line(("b//c",)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"a": 1,\n"a": 2}', r"c:3: duplicate key 'a', first at c:2"),
        ('{\n"a" 1}', r"c:2: not JSON: ':' is missing after \"a\""),
        ("{\n\n'a': 1}", r"c:3: not JSON: a key must be a text in double quotes"),
        ('{"a": 1\n "b": 2}', r"c:2: not JSON: ',' or '}' is missing"),
        ('{"a": [1,\n2', r"c:2: not JSON: the file ends before its brackets close"),
        ('{"a": yes}', r"c:1: not JSON: Expecting value"),
        ('{"a": "b\nc"}', r"c:1: not JSON: Invalid control character"),
        ('{"a": NaN}', r"c:1: a number must be finite, got NaN"),
        ("{}\n{}", r"c:2: not JSON: the first value ends before this"),
        ("", r"c:1: not JSON: the file ends"),
        ("[" * 60, r"c:1: must not be nested deeper than 50"),
        ("9" * 5000, r"c:1: not JSON: "),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text, message):
    with pytest.raises(RecipeError, match=message):
        parse(text, "c")


@given(st.text(alphabet='{}[]",:/*1a\n\\ '))
def test_any_text_is_read_or_refused(text):
    with suppress_refusal():
        parse(text, "c")


@contextmanager
def suppress_refusal():
    try:
        yield
    except RecipeError as e:
        refused = str(e)
    else:
        refused = "c:"
    assert refused.startswith("c:")
