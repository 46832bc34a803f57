"""Reading a recipe. Whatever is in the file, the outcome is a Recipe or a RecipeError."""

from pathlib import Path

from gracile.errors import RecipeError, nearest
from gracile.recipe.document import MAX_BYTES, Document, parse, show_kind
from gracile.recipe.schema import Recipe


def load(path: str | Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: no such file, not readable, or what `loads` refuses; begins with `file:line:`.
    """
    return loads(read(path), str(path))


def read(path: str | Path) -> bytes:
    """What is in a recipe file.

    Raises:
        RecipeError: no such file, or not readable; begins with `file:line:`.
    """
    path = Path(path)
    if not path.exists():
        folder = path.parent if path.parent.is_dir() else Path()
        there = [p.name for p in folder.glob("*.y*ml")]
        guess = nearest(path.name, there) or " Give the path of a YAML file."
        raise RecipeError(f"{path}:1: no such recipe.{guess}")
    if not path.is_file():
        raise RecipeError(f"{path}:1: must be a file, got a folder. Name a file in it.")
    try:
        with path.open("rb") as f:
            return f.read(MAX_BYTES + 1)
    except OSError as e:
        raise RecipeError(
            f"{path}:1: cannot be read: {e.strerror}. Check its permissions."
        ) from None


def loads(text: str | bytes, name: str = "<string>") -> Recipe:
    """Read a recipe from text.

    Args:
        text: YAML; bytes must be UTF-8.
        name: stands for the file in messages.

    Raises:
        RecipeError: begins with `name:line:`.
    """
    return Recipe.read(document(text, name))


def document(text: str | bytes, name: str, lenient: list[str] | None = None) -> Document:
    """The plain values of a recipe text, its top being a mapping.

    Args:
        text, name, lenient: see `parse`.

    Raises:
        RecipeError: begins with `name:line:`.
    """
    if isinstance(text, bytes):
        if len(text) > MAX_BYTES:
            raise RecipeError(
                f"{name}:1: a recipe must not be larger than 1 MiB. Is this the right file?"
            )
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            line = e.object.count(b"\n", 0, e.start) + 1
            raise RecipeError(
                f"{name}:{line}: must be UTF-8 text, got the byte {e.object[e.start]:#04x}. "
                "Save the file as UTF-8."
            ) from None
    out = parse(text, name, lenient)
    if not isinstance(out.data, dict):
        raise RecipeError(
            f"{out.place(())}: a recipe must be a mapping, got {show_kind(out.data)}. "
            "Begin it with recipe: 1."
        )
    return out
