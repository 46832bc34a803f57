"""How a recipe names the teachers of a distillation: `original`, a model with weights, or a list.

`original` is the network as it was before compression; another word names one that a Python
caller gives: `Session(..., teachers={"large": network})`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from gracile.errors import UserError
from gracile.recipe.fields import plain_type
from gracile.recipe.messages import FieldError, show, unknown_key

ORIGINAL = "original"
EXAMPLE = "{model: resnet56_cifar_a, weights: resnet56.safetensors}"


@dataclass(frozen=True)
class TeacherSpec:
    """A network of its own to learn from.

    Attributes:
        model: a model specification, as on the command line; not code from a file.
        weights: file of its weights, beside the recipe or in the working directory; None for a
            model that comes with its own.
    """

    model: str
    weights: str | None = None

    def plain(self) -> dict[str, str]:
        """The YAML form."""
        return {"model": self.model, **({"weights": self.weights} if self.weights else {})}

    def __str__(self) -> str:
        return self.model


Teacher = str | TeacherSpec


def read_teachers(value: object) -> tuple[Teacher, ...]:
    """Read `original`, a name, `{model, weights}`, or a list of these.

    Raises:
        FieldError: another shape, an unknown key, a file of code, the same one twice.
    """
    if not isinstance(value, (list, tuple)):
        return (_read_one(value),)
    if not value:
        raise FieldError(f"must name at least one teacher, got []. Write {ORIGINAL}.")
    out: list[Teacher] = []
    for k, item in enumerate(value):
        try:
            out.append(_read_one(item))
        except FieldError as e:
            raise FieldError(e.text, (k, *e.keys), e.key) from None
    if len(set(out)) < len(out):
        raise FieldError("must not name a teacher twice. Leave one of them out.")
    return tuple(out)


def _read_one(value: object) -> Teacher:
    if isinstance(value, TeacherSpec):
        return value
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, dict):
        raise FieldError(f"must be {ORIGINAL} or a model, got {show(value)}. Write {EXAMPLE}.")
    known = ("model", "weights")
    for key in value:
        if key not in known:
            raise unknown_key(key, known)
    if "model" not in value:
        raise FieldError(f"needs 'model'. Write {EXAMPLE}.")
    for key in known:
        if not (isinstance(value.get(key), str) and value[key]) and key in value:
            raise FieldError(f"must be a text, got {show(value[key])}. Write {EXAMPLE}.", (key,))
    if value["model"].partition("?")[0].rpartition(":")[0].endswith(".py"):
        raise FieldError(
            f"must be no code from a file, got {show(value['model'])}: a recipe runs none. Give "
            "it a name here, and in Python the network: Session(..., teachers={name: network}).",
            ("model",),
        )
    return TeacherSpec(value["model"], value.get("weights"))


def comes_trained(model: str) -> bool:
    """Whether a model specification may bring its own weights: nobody knows of a file of code."""
    name, _, arguments = model.partition("?")
    asked = any(f"{key}=" in arguments for key in ("pretrained", "weights"))
    return asked or name.startswith("hf:") or ".py:" in name


def find_weights(name: str, recipe: str) -> Path:
    """The file that a teacher's `weights` means: beside the recipe, else in the working directory.

    Args:
        name: as in the recipe.
        recipe: where the recipe was read from; `<python>` has no folder.

    Raises:
        UserError: no such file.
    """
    folders = [Path()] if recipe.startswith("<") else [Path(recipe).parent, Path()]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"teacher.weights: {folders[0] / name}: no such file; it is looked for beside the recipe, "
        "then in the working directory."
    )


def _plain(teachers: tuple[Teacher, ...]) -> Any:
    out = [t if isinstance(t, str) else t.plain() for t in teachers]
    return out[0] if len(out) == 1 else out


Teachers = Annotated[tuple[str | TeacherSpec, ...], plain_type(read_teachers, _plain)]
