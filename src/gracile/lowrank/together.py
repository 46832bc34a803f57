"""Ranks of all layers of a session at once: candidates, their costs, and the harm each does."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from gracile.core.kinds import kernel_options
from gracile.errors import BindError, UserError
from gracile.graph.graph import Node
from gracile.lowrank.budget import check_options
from gracile.lowrank.candidates import Candidate, Ranks, ladder, response_error
from gracile.lowrank.faster import Faster
from gracile.lowrank.layers import layers, path_of, size_of, sums, weight_of
from gracile.lowrank.predicted import Predicted
from gracile.lowrank.scheme import factorize, needs_of
from gracile.nn.chain import Chain, Layer, Size, layer_of
from gracile.nn.schemes import chain_of, product
from gracile.recipe.fields import Kernel

Tables = dict[str, list[Candidate]]


class Together:
    """Asks a rule that sees all layers.

    Args:
        by: the method.
        scheme, rule: kernels with the recipe's options.
        period: ranks are multiples of it.

    Attributes:
        by: what errors are: responses or loss.

    Raises:
        UserError: the rule does not take its options.
    """

    def __init__(self, method: Any, scheme: Kernel, rule: Kernel, period: int):
        self.method, self.scheme, self.rule, self.period = method, scheme, rule, period
        known = kernel_options(rule.fn)
        asked = {n: rule.options.get(n, p.default) for n, p in known.items()}
        self.of, self.by = asked["of"], asked["by"]
        self.count: int = asked["candidates"]
        self.predicted: Predicted | None = None
        check_options(asked["ratio"], self.of, self.by, self.count)

    def check(self, s: Any, addresses: Sequence[str], faster: Faster | None = None) -> None:
        """Before training: refuse a budget that no ranks keep to, and a loss that nobody gave.

        Args:
            s, addresses, faster: see `ranks`.

        Raises:
            BindError: says which.
        """
        if self.by == "loss":
            s.loss_for(self.method)
        try:
            self._pick(self._tables(s, addresses, faster))
        except UserError as e:
            raise BindError(f"'{self.method.id}': {e}") from None

    def ranks(
        self, s: Any, addresses: Sequence[str], faster: Faster | None = None
    ) -> dict[str, Ranks | None]:
        """Weight -> ranks, None where the layer stays whole.

        Args:
            s: the Session.
            addresses: of weights; what is no layer any more is left out.
            faster: the table of latencies, where the budget is one.
        """
        tables = self._judged(s, self._tables(s, addresses, faster))
        picks = self._pick(tables)
        return {a: tables[a][k].ranks for a, k in zip(tables, picks, strict=True)}

    def _pick(self, tables: Tables) -> list[int]:
        picks: list[int] = self.rule.fn(list(tables.values()))
        return picks

    def _tables(self, s: Any, addresses: Sequence[str], faster: Faster | None) -> Tables:
        """What every layer may become and what that costs; errors are not known yet."""
        nodes, out = layers(s), {}
        for address in (a for a in addresses if a in nodes):
            layer = layer_of(s.model.get_submodule(path_of(address)))
            size = size_of(s, nodes[address], layer)
            ways = ladder(self.scheme.name, layer, size, self.count, self.period)
            chains = [chain_of(self.scheme.name, layer, r) for r in ways]
            if self.of == "latency":
                assert faster is not None
                self.predicted = self.predicted or Predicted(faster)
                whole, *costs = self.predicted.ms(layer, chains, _shape(s, nodes[address]))
            else:
                whole, costs = self._cost(layer, size), [self._cost(c, size) for c in chains]
            made = (Candidate(r, c) for r, c in zip(ways, costs, strict=True) if c < whole)
            out[address] = [Candidate(None, whole), *made]
        return out

    def _cost(self, what: Layer | Chain, size: Size) -> float:
        return what.params if self.of == "params" else what.macs(size)

    def _judged(self, s: Any, tables: Tables) -> Tables:
        """The same candidates with their errors."""
        out = dict(tables)
        for address, seen in self._seen(s, [a for a, table in tables.items() if len(table) > 1]):
            layer = layer_of(s.model.get_submodule(path_of(address)))
            weight, (whole, *rest) = weight_of(s, address), tables[address]
            near = [self._near(s, address, weight, layer, c, seen) for c in rest]
            if self.by == "loss":
                errors = s.losses_with(self.method, address, near)
            else:
                errors = [response_error(weight, n, seen["gram"], layer.groups) for n in near]
            judged = (replace(c, error=e) for c, e in zip(rest, errors, strict=True))
            out[address] = [whole, *judged]
        return out

    def _seen(self, s: Any, addresses: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        if self.by == "responses" or "gram" in needs_of(self.scheme.name):
            yield from sums(s, self.method, addresses)
        else:
            yield from ((a, {}) for a in addresses)

    def _near(
        self, s: Any, address: str, weight: Tensor, layer: Layer, c: Candidate,
        seen: Mapping[str, Tensor],
    ) -> Tensor:  # fmt: skip
        assert c.ranks is not None
        evidence = {**seen, "generator": s.generator(self.method.id, address)}
        options = self.scheme.options
        factors = factorize(self.scheme.name, weight, layer, c.ranks, evidence, **options)
        near: Tensor = product(chain_of(self.scheme.name, layer, c.ranks), factors, layer)
        return near


def _shape(s: Any, node: Node) -> tuple[int, ...]:
    """Of what a layer reads."""
    shape = s.graph[node.inputs[0]].shape
    assert shape is not None
    return tuple(shape)
