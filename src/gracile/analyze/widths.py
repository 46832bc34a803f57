"""What is left after a cut, before it is made: parameters and MACs for any widths of the tensors.

A removal order is a list of blocks of units. Since cost only falls along it, the shortest prefix
that meets a target is found by bisection, with any function of the widths as the cost.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from gracile.analyze.cost import cost
from gracile.graph.dependency import ChannelGroup, Slice, canonical_addresses
from gracile.graph.graph import Graph, Node

Axis = tuple[str, int]  # (address, dim)
Widths = Mapping[Axis, int]  # indices that are kept; an axis that is missing keeps all of them


@dataclass(frozen=True)
class Term:
    """A share of the cost that is proportional to the widths of some axes."""

    amount: int
    sizes: tuple[tuple[Axis, int], ...]

    def at(self, kept: Widths) -> int:
        """Its amount at these widths."""
        now = prod(kept.get(axis, size) for axis, size in self.sizes)
        return self.amount * now // prod(size for _, size in self.sizes)


@dataclass(frozen=True)
class CostModel:
    """Parameters and MACs of a model as a function of the widths of its tensors.

    Exact for parameters and for everything that multiplies by a weight: each element of a weight is
    used a fixed number of times, so MACs shrink as the weight does, with both of its sides. A
    product of two activations (attention) follows the width of the layer that made its operand;
    the inner products of a fused attention module follow its projection weights.

    Attributes:
        params: one term a parameter tensor.
        macs: one or more terms an operator, for one sample.
    """

    params: tuple[Term, ...]
    macs: tuple[Term, ...]

    @classmethod
    def of(cls, model: nn.Module, graph: Graph, groups: Iterable[ChannelGroup]) -> "CostModel":
        """Build it once for a model as it is.

        Args:
            model: the model the graph was captured from.
            graph: see `graph.capture`.
            groups: all groups of the model; only their axes can change.
        """
        axes = {axis for g in groups for axis in g.sizes}
        writes = {axis[0]: axis for g in groups for axis in g.writes.items()}
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        canonical = canonical_addresses(model)
        made = _Terms(graph, shapes, canonical, axes, writes)
        return cls(
            params=tuple(made.of_tensor(name, prod(shape)) for name, shape in shapes.items()),
            macs=tuple(
                term
                for row in cost(model, graph)
                if row.macs
                for term in made.of_operator(graph[row.id], row.macs)
            ),
        )

    def total(self, measure: str, kept: Widths) -> int:
        """`params` or `macs` (of one sample) at these widths."""
        terms = self.params if measure == "params" else self.macs
        return sum(term.at(kept) for term in terms)

    def touched(self, measure: str, group: ChannelGroup) -> int:
        """What would go with a whole group. Of a weight between two groups both count all of it."""
        gone = Timeline([group.units], group.sizes)
        return self.total(measure, {}) - self.total(measure, gone.kept(1))


class Timeline:
    """When each index of each axis goes, along a sequence of blocks of units.

    An index may belong to several units (a head, and the width in each head): it goes with the
    first of them.

    Args:
        blocks: each a list of units, in the order they are removed.
        sizes: axis -> number of its indices; all axes of the units.
    """

    def __init__(
        self, blocks: Iterable[Iterable[Collection[Slice]]], sizes: Mapping[Axis, int]
    ) -> None:
        first: dict[Axis, dict[int, int]] = {}
        for position, block in enumerate(blocks):
            for unit in block:
                for part in unit:
                    found = first.setdefault((part.at, part.dim), {})
                    for i in part.index:
                        found.setdefault(i, position)
        self._gone = {axis: list(found.values()) for axis, found in first.items()}  # ascending
        self._sizes = {axis: sizes[axis] for axis in first}

    def kept(self, k: int) -> dict[Axis, int]:
        """Widths after the first k blocks, of every axis that some block touches."""
        return {a: self._sizes[a] - bisect_left(gone, k) for a, gone in self._gone.items()}


def shortest_prefix(n: int, cost_of: Callable[[int], float], limit: float) -> int | None:
    """The smallest k in 0..n with `cost_of(k) <= limit`; None if even n costs more.

    Args:
        n: length of the sequence.
        cost_of: cost after the first k steps; falls with k.
        limit: what is allowed.

    >>> shortest_prefix(9, lambda k: 100 - 10 * k, 65)
    4
    """
    if cost_of(0) <= limit:
        return 0
    if not cost_of(n) <= limit:
        return None
    low, high = 0, n  # cost_of(low) > limit >= cost_of(high)
    while high - low > 1:
        middle = (low + high) // 2
        if cost_of(middle) <= limit:
            high = middle
        else:
            low = middle
    return high


def nearest_prefix(sizes: Sequence[int], wanted: int) -> int:
    """How many of these steps bring the sum nearest to `wanted`; of two equally near, fewer.

    >>> nearest_prefix([8, 16, 16], 20), nearest_prefix([1, 1, 1], 2)
    (2, 2)
    """
    total, best, nearest = 0, 0, abs(wanted)
    for k, size in enumerate(sizes, 1):
        total += size
        if abs(total - wanted) < nearest:
            best, nearest = k, abs(total - wanted)
    return best


class _Terms:
    """Makes terms: what each operator's cost is proportional to."""

    def __init__(
        self,
        graph: Graph,
        shapes: Mapping[str, tuple[int, ...]],
        canonical: Mapping[str, str],
        axes: Collection[Axis],
        writes: Mapping[str, Axis],
    ):
        self.graph, self.shapes, self.canonical = graph, shapes, canonical
        self.axes, self.writes = axes, writes
        self.sizes = {(at, d): n for at, shape in shapes.items() for d, n in enumerate(shape)}

    def of_tensor(self, address: str, amount: int) -> Term:
        dims = range(len(self.shapes[address]))
        sizes = ((axis, self.sizes[axis]) for d in dims if (axis := (address, d)) in self.axes)
        return Term(amount, tuple(sizes))

    def of_operator(self, node: Node, macs: int) -> Iterator[Term]:
        weights = self._weights(node)
        if weights:
            elements = [prod(self.shapes[w]) for w in weights]
            for weight, part in zip(weights, _shared(macs, elements), strict=True):
                yield self.of_tensor(weight, part)
            return
        # softmax(q k) v in one call is two products, as wide as q and as v
        sides = (node.inputs[:1], node.inputs[2:3]) if len(node.inputs) > 2 else (node.inputs,)
        for side, part in zip(sides, _shared(macs, [1] * len(sides)), strict=True):
            found = next((axis for i in side if (axis := self._maker(i, set()))), None)
            yield Term(part, ((found, self.sizes[found]),) if found else ())

    def _weights(self, node: Node) -> list[str]:
        bare = [self.graph[i].params["value"] for i in node.inputs if self.graph[i].op == "param"]
        own = dict.fromkeys(self.canonical.get(a, a) for a in (*node.params.values(), *bare))
        return [a for a in own if len(self.shapes.get(a, ())) > 1]

    def _maker(self, id: str, seen: set[str]) -> Axis | None:
        """The axis of the weight that made a node's channels; does not look behind a product."""
        if id in seen:
            return None
        seen.add(id)
        node = self.graph[id]
        weights = self._weights(node) or [self.canonical.get(a, a) for a in node.params.values()]
        made = [
            self.writes[a] for a in weights if a in self.writes and self.writes[a] in self.sizes
        ]
        if made or _multiplies(node):
            return made[-1] if made else None
        return next((axis for i in node.inputs if (axis := self._maker(i, seen))), None)


def _multiplies(node: Node) -> bool:
    return node.op in ("matmul", "einsum", "bilinear") or "attention" in node.op


def _shared(amount: int, weights: Sequence[int]) -> list[int]:
    """Divide a whole number in proportion; the last part takes what rounding leaves."""
    parts = [amount * w // sum(weights) for w in weights]
    return [*parts[:-1], amount - sum(parts[:-1])]
