"""Compression schedules of Distiller (Intel's, archived 2023), read and told as recipes.

The grammar and its meaning are those of its last version; see docs/guide/from-distiller.md.
"""

from gracile.recipe.distiller.convert import Converted, Training, convert

__all__ = ["Converted", "Training", "convert"]
