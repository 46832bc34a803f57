"""A schedule of Distiller in, a recipe out: the same firings, spans, levels, masks and rates."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from gracile.recipe.distiller import pruners, quantizers, rates, regularizers
from gracile.recipe.distiller.read import Policy, Schedule, read
from gracile.recipe.distiller.timing import Entry, firings
from gracile.recipe.document import Document
from gracile.recipe.load import document


@dataclass(frozen=True)
class Training:
    """What a schedule leaves to the command line, with the defaults of Distiller's classifier.

    Attributes:
        epochs: length of training; None for the last end of all policies.
        batch_size, lr, momentum, weight_decay: of SGD.
    """

    epochs: int | None = None
    batch_size: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4


@dataclass(frozen=True)
class Converted:
    """A recipe, and what it does not say as the schedule did.

    Attributes:
        document: the recipe as plain values, in the order of its file.
        warnings: (code, sentence that begins with file:line). `no-method`: an entry names a
            method that this version does not have.
    """

    document: Document
    warnings: tuple[tuple[str, str], ...]


def convert(
    text: str | bytes, name: str, training: Training | None = None, *, strict: bool = False
) -> Converted:
    """Read a schedule and write it as a recipe.

    Args:
        text: YAML, or its UTF-8 bytes.
        name: stands for the file in messages.
        training: what the schedule does not say.
        strict: write a recipe of `compat: strict`, that does what Distiller did where that is a
            defect.

    Raises:
        RecipeError: the schedule is wrong, or says what no recipe can; begins with `name:line:`.
    """
    training = training or Training()
    twice: list[str] = []
    s = read(document(text, name, twice))
    s.strict = strict
    s.warnings[:0] = [("duplicate-key", t) for t in twice]
    ends = max((p.stop for p in s.policies), default=0)
    s.epochs = ends if training.epochs is None else training.epochs
    compat = {"compat": "strict"} if strict else {}
    data = {"recipe": 1, **compat, "train": _train(s, training), "methods": _methods(s)}
    return Converted(Document(name, data), tuple(s.warnings))


def _train(s: Schedule, t: Training) -> dict[str, Any]:
    optimizer = {
        "class": "SGD", "lr": t.lr, "momentum": t.momentum, "weight_decay": t.weight_decay,
    }  # fmt: skip
    lr = rates.convert(s)
    return {
        "epochs": s.epochs,
        "batch_size": t.batch_size,
        "optimizer": optimizer,
        **({"lr": lr} if lr else {}),
    }


def _methods(s: Schedule) -> dict[str, Entry]:
    out: dict[str, Entry] = {}
    for p in s.policies:
        if p.start >= s.epochs and p.kind != "quantizer":
            text = (
                f"begins in epoch {p.start}, after training ({s.epochs} epochs), and is left out."
            )
            s.warn("too-late", p.keys, text)
        elif p.kind in _KINDS:
            _add(out, p.component.name, _KINDS[p.kind](s, p))
    for c in s.components:
        if c.kind == "quantizer":
            used = next((p for p in s.policies if p.component is c), None)
            if used is not None or quantizers.METHODS[c.cls] == "ptq":
                _add(out, c.name, quantizers.convert(s, c, used))
    return out


def _thin(s: Schedule, p: Policy) -> list[Entry]:
    masked = any(q.kind in ("pruner", "regularizer") and q.start <= p.start for q in s.policies)
    if not masked:
        s.warn("zeros-stay", p.keys, "cuts out what is masked, not zeros the weights come with.")
    return [{"prune": "thin", "when": firings(s, p)}]


_KINDS: dict[str, Callable[[Schedule, Policy], list[Entry]]] = {
    "pruner": pruners.convert,
    "regularizer": regularizers.convert,
    "extension": _thin,
}


def _add(out: dict[str, Entry], name: str, entries: Iterable[Entry]) -> None:
    """Give each entry an id of its own, from the component's name."""
    entries, base = list(entries), re.sub(r"[^A-Za-z0-9_-]", "_", name).lstrip("-") or "entry"
    for i, entry in enumerate(entries, 1):
        wanted = base if len(entries) == 1 else f"{base}_{i}"
        n, id = 1, wanted
        while id in out:
            n, id = n + 1, f"{wanted}_{n + 1}"
        out[id] = entry
