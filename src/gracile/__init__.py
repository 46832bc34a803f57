"""gracile: make a PyTorch model smaller and measurably faster on its device, and prove it.

Importing this is light: torch and the runtimes are loaded by what needs them.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "GracileError",
    "Plan",
    "Recipe",
    "Record",
    "Result",
    "Session",
    "add_arguments",
    "benchmark",
    "capture",
    "channel_groups",
    "compress",
    "export",
    "load_model",
    "load_recipe",
    "open_data",
    "recipe_from",
    "resolve_model",
    "save_model",
]

if TYPE_CHECKING:
    from gracile.api import (
        Artifact,
        GracileError,
        Plan,
        Recipe,
        Record,
        Result,
        Session,
        add_arguments,
        benchmark,
        capture,
        channel_groups,
        compress,
        export,
        load_model,
        load_recipe,
        open_data,
        recipe_from,
        resolve_model,
        save_model,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:
        import gracile.api

        return getattr(gracile.api, name)
    raise AttributeError(f"module 'gracile' has no attribute '{name}'")
