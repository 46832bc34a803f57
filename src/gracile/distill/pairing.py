"""Which layer of the student learns from which of the teacher: names, patterns, pairs."""

from collections.abc import Mapping
from typing import Annotated, Any

from torch import nn

from gracile.core.address import select
from gracile.errors import BindError, nearest
from gracile.graph.graph import Graph
from gracile.recipe.fields import plain_type, read_selector
from gracile.recipe.messages import FieldError, show

WEIGHTED = ("conv", "conv_transpose", "linear")


def read_layers(value: object) -> Any:
    """Read `{student's: teacher's}`, a pattern, or a list of patterns of names both have.

    Raises:
        FieldError: another shape.
    """
    if value is None or isinstance(value, Pairs):
        return value
    if not isinstance(value, Mapping):
        return read_selector(value)
    if not value:
        raise FieldError("must pair layers, got {}. Write {layer1: layer1}.")
    for key, name in value.items():
        if not isinstance(name, str) or not name:
            raise FieldError(f"must be a layer's name, got {show(name)}. Write one.", (key,))
    return Pairs(tuple(value.items()))


class Pairs(tuple[tuple[str, str], ...]):
    """Names of layers: the student's and the teacher's, in the recipe's order."""

    def __new__(cls, pairs: tuple[tuple[str, str], ...]) -> "Pairs":
        return super().__new__(cls, pairs)


def _plain(value: Any) -> Any:
    if isinstance(value, Pairs):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


Layers = Annotated[Any, plain_type(read_layers, _plain)]


Network = tuple[nn.Module, Graph, Mapping[str, str]]


def pairs_of(at: Any, student: Network, teacher: Network, whose: str) -> list[tuple[str, str]]:
    """The names that a recipe's `at` pairs, in the order the student runs.

    Args:
        at: of `read_layers`; None for all layers with weights that both networks have.
        student: the network, its graph, its names (see `graph.taps.names_of`).
        teacher: the same of the teacher.
        whose: the teacher's name.

    Raises:
        BindError: no such layer of the student, or none of the teacher; names the nearest.
    """
    mine, theirs = student[2], teacher[2]
    if at is None:
        names = [n.id for n in student[1].of_op(*WEIGHTED) if n.id in theirs and n.id in mine]
        if not names:
            raise BindError(
                f"student and teacher '{whose}' have no layer of one name. Pair them: at: "
                "{student's: teacher's}."
            )
        return [(n, n) for n in names]
    if isinstance(at, Pairs):
        found = list(at)
        for name, _ in found:
            if name not in mine:
                raise BindError(f"'{name}' is no layer of the student.{nearest(name, mine)}")
    else:
        patterns = [at] if isinstance(at, str) else list(at)
        found = [(n, n) for n in _selected(patterns, mine, student[0])]
    for name, its in found:
        if its not in theirs:
            raise BindError(
                f"'{its}' is no layer of the teacher '{whose}'.{nearest(its, theirs)} Pair them: "
                f"at: {{{name}: <the teacher's>}}."
            )
    return found


def _selected(patterns: list[str], names: Mapping[str, str], model: nn.Module) -> list[str]:
    """Names that patterns mean; `type:` those of a class of modules."""
    classes: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        for c in type(module).__mro__:
            if path in names:
                classes.setdefault(c.__name__, []).append(path)
    plain = []
    for pattern in patterns:
        minus, body = ("!", pattern[1:]) if pattern.startswith("!") else ("", pattern)
        if body.startswith("type:"):
            if body[5:] not in classes:
                raise BindError(f"'{body}' matches no layer.{nearest(body[5:], classes)}")
            plain += [minus + path for path in classes[body[5:]]]
        else:
            plain.append(pattern)
    return select(plain, list(names), {}, what="layer", model=type(model).__name__)
