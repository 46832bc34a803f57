import importlib.util
import re
from pathlib import Path

import pytest

import gracile
from gracile import registry

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def pages(hooks):
    return hooks.pages()


def test_everything_registered_has_a_page_with_its_source(pages):
    for kind in registry.HOMES:
        for e in registry.entries(kind):
            page = pages[f"reference/{kind}/{e.name.replace('/', '-')}.md"]
            assert e.source in page
            assert e.module in page
            assert e.summary in page


def test_every_method_option_is_explained(hooks):
    for e in registry.entries("method"):
        rows = [r for r in hooks.model_table(e.obj.Options, "Options") if r.startswith("| `")]
        assert len(rows) == len(e.obj.Options.model_fields)
        empty = [r for r in rows if r.endswith("|  |")]
        assert not empty, f"{e.name}: {empty}"


def test_every_recipe_key_is_explained(pages):
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", pages["reference/recipe.md"], re.M)
    assert len(rows) > 20
    assert not [key for key, meaning in rows if not meaning.strip()]


def test_every_command_is_in_the_reference(pages):
    page = pages["reference/cli.md"]
    files = (ROOT / "src" / "gracile" / "cli" / "commands").glob("[a-z]*.py")
    for path in files:
        assert f"## gracile {path.stem}" in page
    assert "--runtime" in page


def test_every_public_name_is_in_the_reference(pages):
    headings = re.findall(r"heading: (\w+)", pages["reference/api.md"])
    assert sorted(headings) == sorted(gracile.__all__)


def test_a_docstring_becomes_lists_and_code(hooks):
    text = (
        "Do it.\n\nArgs:\n    a, b: two\n        lines.\n\nReturns:\n    A value.\n\n>>> do(1)\n2\n"
    )
    got = hooks.docstring(text)
    assert "**Args**\n\n- `a, b`: two lines." in got
    assert "**Returns**\n\nA value." in got
    assert "```python\n>>> do(1)\n2\n```" in got


def test_a_profile_is_shown_as_it_is(hooks):
    page = hooks.on_page_markdown("before\n<!-- profile: openvino -->\nafter")
    assert "ops_integer:" in page
    assert page.startswith("before\n```yaml\n#")
