"""Random damage to a recipe's text, and what must come of it."""

import re

from hypothesis import strategies as st

from gracile.errors import RecipeError
from gracile.recipe import loads

JUNK = st.one_of(
    st.sampled_from(["", "null", "true", "-1", "1e400", "[]", "{}", "[[1]]", "{a: b}", "'", "\t"]),
    st.sampled_from(["*x", "&x y", "!!set", "<<", "- -", "? ", "%", "|", "\0", "\ud800", "\x85"]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8),
)
KEYS = re.compile(r"[\w.]+(?=:)")
VALUES = re.compile(r"(?<=: )[^\s,{}\[\]]+")


@st.composite
def damaged(draw: st.DrawFn, text: str) -> str:
    """The text after one to three random edits."""
    for _ in range(draw(st.integers(1, 3))):
        lines = text.splitlines(keepends=True)
        kind = draw(st.sampled_from(["drop", "double", "swap", "key", "value", "cut", "insert"]))
        i = draw(st.integers(0, max(0, len(lines) - 1)))
        at = draw(st.integers(0, len(text)))
        if kind == "drop":
            del lines[i : i + 1]
            text = "".join(lines)
        elif kind == "double":
            text = "".join([*lines[:i], *lines[i : i + 1] * 2, *lines[i + 1 :]])
        elif kind == "swap" and lines:
            j = draw(st.integers(0, len(lines) - 1))
            lines[i], lines[j] = lines[j], lines[i]
            text = "".join(lines)
        elif kind in ("key", "value"):
            spots = list((KEYS if kind == "key" else VALUES).finditer(text))
            if spots:
                m = draw(st.sampled_from(spots))
                text = text[: m.start()] + draw(JUNK) + text[m.end() :]
        elif kind == "cut":
            text = text[:at]
        elif kind == "insert":
            text = text[:at] + draw(JUNK) + text[at:]
    return text


def loads_or_refuses(text: str) -> None:
    """Either a recipe that survives saving, or one message that begins with its line."""
    try:
        recipe = loads(text, name="mutant.yaml")
    except RecipeError as e:
        said = str(e)
    else:
        assert loads(recipe.to_yaml()) == recipe
        return
    assert re.match(r"mutant\.yaml:\d+: .", said), said
