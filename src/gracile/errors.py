"""Every error a user can meet: one sentence with the rule, the value, the place and the way out.

The class decides the exit status of the command line (`exit_code`), so a library caller and a shell
script can tell a bad recipe from a failed proof without reading text.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class GracileError(Exception):
    """Base of all errors raised on purpose. Anything else that escapes is a bug of ours."""

    exit_code = 2


class UserError(GracileError, ValueError):
    """A value from the user is wrong: a flag, a file, a model, a data specification."""


class RecipeError(UserError):
    """The recipe text breaks its grammar. The message starts with `file:line:`."""


class BindError(UserError):
    """The recipe is well formed but does not fit this model, data or training length."""


class PlanConflict(BindError):
    """Two recipe entries decide about the same thing."""


class VerificationError(GracileError):
    """A surgery changed what the model computes. The model was rolled back.

    Args:
        text: the message.
        edits: the smallest part of the surgery that was seen to fail; empty if it is not known.
        operator: the first operator that differs, with its neighbours
            (`gracile.graph.reproduce.Operator`); None if it could not be found.
    """

    exit_code = 3

    def __init__(self, text: str, edits: Iterable[Any] = (), operator: Any = None):
        super().__init__(text)
        self.edits, self.operator = tuple(edits), operator


class ParityError(GracileError):
    """An exported artifact does not compute what the PyTorch model computes."""

    exit_code = 3


class ResumeError(UserError):
    """A run cannot be continued as it was: other recipe, torch, threads or processor."""


class MissingExtra(GracileError):
    """An optional package is not installed. The message gives the pip command."""

    exit_code = 4

    def __init__(self, what: str, extra: str):
        super().__init__(f"{what} needs an extra: pip install 'gracile[{extra}]'")
        self.extra = extra


def nearest(name: str, known: Iterable[str], n: int = 1) -> str:
    """Say what the user may have meant: ``" Nearest: 'l1'."``, or the known names if none is close.

    >>> nearest("epochz", ["epochs", "seed"])
    " Nearest: 'epochs'."
    >>> nearest("zzz", ["a", "b"])
    ' Known: a, b.'
    """
    known = sorted(set(known))
    close = get_close_matches(name, known, n=n, cutoff=0.6)
    if close:
        return " Nearest: " + ", ".join(f"'{c}'" for c in close) + "."
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f" Known: {shown}." if known else ""
