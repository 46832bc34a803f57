"""Registering the members of a family that differ in numbers only: resnet20, resnet32, ..."""

from collections.abc import Callable

from torch import nn

from gracile import registry


def register_variant(
    name: str, factory: Callable[..., nn.Module], *, source: str, summary: str
) -> None:
    """File `factory` as the model `name`; it gets this name and `summary` as its docstring.

    Args:
        name: what a recipe or the command line writes.
        factory: a function of its own (not shared with another name) with keyword arguments only.
        source: paper or project the network follows.
        summary: one sentence for lists of models.
    """
    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = summary
    registry.register("model", name, source=source)(factory)
