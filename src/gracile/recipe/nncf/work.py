"""What the parts of the conversion share: the file, the model, the entries made so far."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any, NoReturn, Protocol

from gracile.errors import UserError
from gracile.recipe.document import Document, Keys
from gracile.recipe.nncf.scopes import Layer, Layers, resolve_scopes
from gracile.recipe.nncf.text import error

CONV_LINEAR = ("_ConvNd", "Linear")
WORDS = {"_ConvNd": "convolutions", "Linear": "linear layers"}


class Scopes(Protocol):
    """Any part of the configuration with scopes."""

    ignored_scopes: list[str]
    target_scopes: list[str] | None


@dataclass
class Work:
    """One conversion.

    Attributes:
        document: the file.
        layers: of the model; None if there is none at hand.
        epochs: length of training.
        adaptive: whether the last level of sparsity or pruning is still looked for in training.
        train: the recipe's `train`, as far as it is known.
        methods: the recipe's entries so far.
        samples: how many the initializers want to see, each.
        warnings: what is different from NNCF, with its place.
    """

    document: Document
    layers: Layers | None
    epochs: int
    adaptive: bool = False
    train: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def tell(self, keys: Keys, text: str) -> None:
        """Add a warning about the value at `keys`; the same one is kept once."""
        line = str(error(self.document, keys, text))
        if line not in self.warnings:
            self.warnings.append(line)

    def refuse(self, keys: Keys, text: str) -> NoReturn:
        """Give up.

        Raises:
            RecipeError: with the place of the value at `keys`.
        """
        raise error(self.document, keys, text)

    def add(self, id: str, entry: dict[str, Any]) -> str:
        """Add an entry under a name of its own, which is returned."""
        name = next(
            n for n in chain([id], (f"{id}-{i}" for i in count(2))) if n not in self.methods
        )
        self.methods[name] = {k: v for k, v in entry.items() if v is not None}
        return name

    def paths(self, scopes: Sequence[str], keys: Keys, validate: bool = True) -> list[str]:
        """Module paths that scopes mean; see `resolve_scopes`."""
        try:
            return resolve_scopes(
                scopes,
                self.layers,
                validate=validate,
                tell=lambda text: self.tell(keys, f"has {text}"),
            )
        except UserError as e:
            self.refuse(keys, f"has {e}")

    def weights(
        self,
        scoped: Scopes,
        keys: Keys,
        kinds: Sequence[str] = CONV_LINEAR,
        leave: Callable[[str, Layer], bool] = lambda path, layer: False,
    ) -> list[str]:
        """The selector of the weights an algorithm acts on.

        Args:
            scoped: its target and ignored scopes.
            keys: of the algorithm.
            kinds: of layers it can act on.
            leave: layers it leaves alone all the same; asked only where the model is known.
        """
        validate = getattr(scoped, "validate_scopes", True)
        ignored = self.paths(scoped.ignored_scopes, (*keys, "ignored_scopes"), validate)
        layers = self.layers
        if layers is not None:
            able = [p for p, layer in layers.items() if layer.kind in kinds]
            ignored = [p for p in able if p in ignored or leave(p, layers[p])]
        if scoped.target_scopes is not None:
            target = self.paths(scoped.target_scopes, (*keys, "target_scopes"), validate)
            chosen = [p for p in target if p not in ignored]
            if layers is not None:
                chosen = [p for p in chosen if p in able]
            if not chosen:
                self.refuse(
                    (*keys, "target_scopes"), "leaves nothing to act on. Name other layers."
                )
            return chosen
        there = [k for k in kinds if layers is None or any(x.kind == k for x in layers.values())]
        if not there:
            words = " and ".join(WORDS[k] for k in kinds)
            self.refuse(keys, f"acts on {words}, and the model has none.")
        return [*(f"type:{k}" for k in there), *(f"!{p}" for p in ignored)]
