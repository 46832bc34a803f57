"""Recipes: what the user wants, as validated text; loading, building, patching, explaining."""

from gracile.recipe.load import load, loads
from gracile.recipe.schema import Recipe

__all__ = ["Recipe", "load", "loads"]
