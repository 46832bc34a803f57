"""Bits of single weights and activations, and putting them on a placement of quantizers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from gracile.graph.graph import Graph
from gracile.quantize.patterns import PAIR_OPS, TRANSPARENT_OPS, WEIGHT_OPS
from gracile.quantize.placement import Placement


@dataclass(frozen=True)
class BitMap:
    """Bits where they differ from the rest.

    Attributes:
        weights: address -> bits.
        activations: node id -> bits; of those that share a scale, the id of the first.
    """

    weights: Mapping[str, int] = field(default_factory=dict)
    activations: Mapping[str, int] = field(default_factory=dict)

    def __or__(self, later: "BitMap") -> Self:
        """Both; the later one counts where they differ."""
        return type(self)(
            {**self.weights, **later.weights}, {**self.activations, **later.activations}
        )


def with_bits(
    placement: Placement, bits: BitMap, of_weight: Callable[[int], int] = lambda b: b
) -> Placement:
    """The same placement with these bits.

    Args:
        placement: of all quantizers.
        bits: which; addresses that have no quantizer are passed over.
        of_weight: bits asked for -> bits of a weight's grid.
    """
    leader = leaders(placement)
    return replace(
        placement,
        weights=tuple(
            replace(w, bits=of_weight(bits.weights[w.address])) if w.address in bits.weights else w
            for w in placement.weights
        ),
        activations=tuple(
            replace(a, bits=bits.activations[leader[a.id]])
            if leader[a.id] in bits.activations
            else a
            for a in placement.activations
        ),
    )


def leaders(placement: Placement) -> dict[str, str]:
    """Quantized activation -> the one whose scale, and so whose bits, it has."""
    return {a.id: a.leader for a in placement.activations}


def read_by(
    placement: Placement, graph: Graph, same: Mapping[str, str] | None = None
) -> dict[str, tuple[str, ...]]:
    """Weight -> the quantized activations its layers read, by the first of those sharing a scale.

    Args:
        placement: of all quantizers.
        graph: the captured graph it was made for.
        same: other names of tied weights -> the one that is placed.
    """
    leader, found = leaders(placement), {w.address: dict[str, None]() for w in placement.weights}
    for address, id in layers(graph, same):
        fed = graph[id].inputs if address in found else ()
        at = quantized(leader, graph, fed[0]) if fed else None
        if at is not None:
            found[address][at] = None
    return {address: tuple(ids) for address, ids in found.items()}


def layers(graph: Graph, same: Mapping[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """(weight, id) of every convolution and linear layer."""
    for n in graph.of_op(*WEIGHT_OPS):
        address = n.params.get("weight")
        if address is not None:
            yield (same or {}).get(address, address), n.id


def added(placement: Placement, graph: Graph) -> list[tuple[str, ...]]:
    """The quantized activations that are operands of one addition (or product), where several."""
    leader, out = leaders(placement), []
    for n in graph.of_op(*PAIR_OPS):
        ids = [quantized(leader, graph, i) for i in n.inputs]
        operands = tuple(dict.fromkeys(i for i in ids if i is not None))
        if len(operands) > 1:
            out.append(operands)
    return out


def quantized(leader: Mapping[str, str], graph: Graph, id: str) -> str | None:
    """The activation whose grid this value is on; None if it is in float."""
    while id not in leader and graph[id].op in (*TRANSPARENT_OPS, "quantize"):
        id = graph[id].inputs[0]
    return leader.get(id)
