"""Factors by a scheme's name, and what rank rules ask of it.

All that is known of a scheme lies in its registration (`gracile.core.kinds.factorizer`); here it is
asked, and what does not fit is refused before anything is computed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gracile import registry
from gracile.core.kinds import check_options
from gracile.errors import UserError
from gracile.nn.chain import Layer
from gracile.nn.schemes import chain_of, full_ranks


def factorize(
    scheme: str,
    weight: Tensor,
    layer: Layer,
    ranks: Sequence[int],
    evidence: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The factors of a weight, one for each of the chain's shapes.

    Args:
        scheme, layer, ranks: see `chain_of`.
        weight: (outputs, inputs / groups, *kernel); (inputs, outputs) of a lookup.
        evidence: what the scheme needs beyond the weight, by name (`needs_of`).
        options: of the scheme.

    Raises:
        UserError: as `chain_of`; a wrong shape, an unknown option, missing evidence.
    """
    chain = chain_of(scheme, layer, ranks)
    if tuple(weight.shape) != layer.weight_shape:
        raise UserError(
            f"the weight must have the layer's shape {layer.weight_shape}, got "
            f"{tuple(weight.shape)}."
        )
    check_options("factorizer", scheme, options)
    known = evidence or {}
    missing = [n for n in needs_of(scheme) if n not in known]
    if missing:
        raise UserError(f"'{scheme}' needs {', '.join(missing)}, which it was not given.")
    extra = [known[n] for n in needs_of(scheme)]
    entry = registry.get("factorizer", scheme)
    weight = weight.T if layer.lookup else weight
    factors: tuple[Tensor, ...] = entry.obj(weight, layer.groups, tuple(ranks), *extra, **options)
    if layer.lookup:
        factors = (factors[0].T, *factors[1:])
    shapes = tuple(tuple(f.shape) for f in factors)
    if shapes != chain.shapes:
        raise ValueError(f"'{scheme}' gave factors {shapes}, its chain has {chain.shapes}.")
    return factors


def needs_of(scheme: str) -> tuple[str, ...]:
    """What a scheme wants to know beyond the weight: gram, cross, generator."""
    needs: tuple[str, ...] = registry.get("factorizer", scheme).meta["needs"]
    return needs


def fixed_of(scheme: str) -> tuple[int, ...]:
    """Which of a scheme's factors stay as they are in training, by place."""
    fixed: tuple[int, ...] = registry.get("factorizer", scheme).meta["fixed"]
    return fixed


def matrices(scheme: str, weight: Tensor, layer: Layer) -> tuple[Tensor, ...]:
    """For each rank (batch, rows, columns): matrices that share it.

    Raises:
        UserError: the scheme has no matrices whose singular values would say what a rank costs.
    """
    entry = registry.get("factorizer", scheme)
    full_ranks(scheme, layer)
    if entry.meta["matrices"] is None:
        raise UserError(
            f"the ranks of '{scheme}' are not those of a matrix, so no singular values choose "
            "them; use the rule params, macs or fixed."
        )
    weight = weight.detach().double()
    found: tuple[Tensor, ...] = entry.meta["matrices"](
        weight.T if layer.lookup else weight, layer.groups
    )
    return found


def along(scheme: str, layer: Layer, t: int) -> tuple[int, ...]:
    """The ranks at step t of the way from 1 to full that rules for a ratio follow."""
    full = full_ranks(scheme, layer)
    way = registry.get("factorizer", scheme).meta["along"]
    if way is None:
        return tuple(min(t, n) for n in full)
    ranks: tuple[int, ...] = way(layer, t)
    return ranks
