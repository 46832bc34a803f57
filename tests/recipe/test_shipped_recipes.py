from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_damage import damaged, loads_or_refuses

from gracile.recipe import load, loads

ROOT = Path(__file__).parents[2]
RECIPES = [
    *sorted(ROOT.glob("recipes/**/*.yaml")),
    *sorted(ROOT.glob("src/gracile/cli/demo/*.yaml")),
]


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_shipped_recipe_loads_and_survives_saving(path):
    recipe = load(path)
    again = loads(recipe.to_yaml())
    assert again == recipe
    assert again.sha == recipe.sha
    assert set(recipe.lines) == set(recipe.methods)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_shipped_recipe_loads_or_is_refused_with_its_line(path, data):
    loads_or_refuses(data.draw(damaged(path.read_text())))
