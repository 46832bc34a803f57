"""gracile: make a PyTorch model smaller and measurably faster on its device, and prove it.

Importing this is light: torch and the runtimes are loaded by what needs them.
"""

import sys
from types import ModuleType
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
    "activations",
    "add_arguments",
    "apply_plan",
    "benchmark",
    "capture",
    "channel_groups",
    "compare_models",
    "compress",
    "export",
    "finish",
    "load_model",
    "load_recipe",
    "open_data",
    "preflight",
    "prune_channels",
    "recipe_from",
    "resolve_model",
    "save_model",
    "sensitivity",
    "session_from",
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
        activations,
        add_arguments,
        apply_plan,
        benchmark,
        capture,
        channel_groups,
        compare_models,
        compress,
        export,
        finish,
        load_model,
        load_recipe,
        open_data,
        preflight,
        prune_channels,
        recipe_from,
        resolve_model,
        save_model,
        sensitivity,
        session_from,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:
        import gracile.api

        return getattr(gracile.api, name)
    raise AttributeError(f"module 'gracile' has no attribute '{name}'")


class _Package(ModuleType):
    """`gracile.export` and `gracile.benchmark` are the verbs, not the rooms of the same names.

    Importing a room would put its module over the verb; `from gracile.export import ...` finds it
    without.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
