"""Legacy configurations of NNCF: read, checked and said as recipes."""

from gracile.recipe.nncf.convert import convert, convert_document
from gracile.recipe.nncf.scopes import resolve_scopes

__all__ = ["convert", "convert_document", "resolve_scopes"]
