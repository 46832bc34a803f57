"""Bits of single layers and activations, as a recipe writes them down."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gracile.core.address import select
from gracile.errors import BindError, nearest
from gracile.quantize.bits import BitMap, leaders
from gracile.quantize.placement import Placement
from gracile.recipe.fields import Selector

FLOAT = ("float", 32)
Width = Annotated[int, Field(ge=1, le=16)]


class Override(BaseModel):
    """Other bits for some layers, or for some activations.

    Attributes:
        weights: of the layers this is about, or
        activations: graph nodes behind which a quantizer stands (ids as `gracile groups` and the
            plan write them; `x` or such for the model's input).
        bits: of the layers' weights and of what they read; of the activations. `float` (or 32)
            leaves the layers in float.
        weight_bits: of weights alone.
        activation_bits: of what the layers read alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Selector | None = None
    activations: Selector | None = None
    bits: Width | Literal["float", 32] | None = None
    weight_bits: Width | None = None
    activation_bits: Width | None = None

    @model_validator(mode="after")
    def _one_thing(self) -> Self:
        if (self.weights is None) == (self.activations is None):
            raise ValueError("needs either 'weights' or 'activations'; write two for both")
        single = [k for k in ("weight_bits", "activation_bits") if getattr(self, k) is not None]
        if self.bits is None and not single:
            raise ValueError("needs 'bits'; write bits: 4, or bits: float")
        if self.weights is None and (single or self.bits in FLOAT):
            raise ValueError(
                "is about activations: write bits: 4. An operator runs in float if its weight "
                "does: write weights: ..., bits: float"
            )
        if self.bits in FLOAT and single:
            raise ValueError(f"leaves layers in float, which have no {single[0]}; leave it out")
        return self

    @property
    def is_float(self) -> bool:
        """Whether it leaves its layers in float."""
        return self.bits in FLOAT

    @property
    def on_activations(self) -> bool:
        """Whether it gives activations bits."""
        return self.activations is not None or self.activation_bits is not None

    @property
    def widths(self) -> list[int]:
        """Every number of bits it gives a grid."""
        own = [self.weight_bits, self.activation_bits, None if self.is_float else self.bits]
        return [int(b) for b in own if b is not None]


Tensors = Callable[[Any], Sequence[str]]  # selector -> addresses of parameters


def left_float(overrides: Sequence[Override], tensors: Tensors) -> set[str]:
    """Weights that stay in float; of several overrides on one the last counts.

    Raises:
        BindError: a selector matches nothing.
    """
    out: set[str] = set()
    for o in overrides:
        if o.weights is not None:
            found = set(tensors(o.weights))
            out = out | found if o.is_float else out - found
    return out


def bits_of(
    overrides: Sequence[Override],
    tensors: Tensors,
    placement: Placement,
    reads: dict[str, tuple[str, ...]],
) -> BitMap:
    """Bits that overrides give; later ones win.

    Args:
        overrides: in the recipe's order.
        tensors: what a selector of weights means.
        placement: of all quantizers, without what is left in float.
        reads: see `bits.read_by`.

    Raises:
        BindError: an override is about nothing that is quantized; names its place.
    """
    weights: dict[str, int] = {}
    activations: dict[str, int] = {}
    placed = {w.address for w in placement.weights}
    leader = leaders(placement)
    for k, o in enumerate(overrides):
        if o.is_float:
            continue
        if o.activations is not None:
            chosen = select(o.activations, list(leader), {}, what="quantized activation")
            activations |= _all({leader[id] for id in chosen}, o.bits)
            continue
        assert o.weights is not None
        found = [a for a in tensors(o.weights) if a in placed]
        if not found:
            raise BindError(
                f"overrides.{k}: {o.weights!r} means no weight that is quantized."
                f"{nearest(str(o.weights), placed)}"
            )
        weights |= _all(found, o.weight_bits or o.bits)
        read = [id for a in found for id in reads[a]]
        activations |= _all(read, o.activation_bits or o.bits)
    return BitMap(weights, activations)


def _all(keys: Iterable[str] | Collection[str], bits: Any) -> dict[str, int]:
    return {} if bits is None else dict.fromkeys(keys, int(bits))
