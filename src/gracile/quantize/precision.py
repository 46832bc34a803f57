"""Mixed precision: which layer gets how many bits, so that the loss suffers least within a limit.

Each choice of bits for a weight is charged with (mean curvature) * ||Q(W) - W||^2, and an integer
program finds the cheapest assignment. HAWQ's idea (arXiv:1911.03852, arXiv:2011.10680); limits are
counted against the same network with 8 bits everywhere, not between the smallest and the largest.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from gracile.analyze.cost import cost
from gracile.errors import BindError, UserError, nearest
from gracile.graph.dependency import canonical_addresses
from gracile.graph.graph import Graph
from gracile.quantize.bits import BitMap, added, layers, read_by
from gracile.quantize.placement import Placement
from gracile.quantize.program import Resource, assign, least

REFERENCE = 8  # bits of what limits are shares of
MB = 10**6
Width = Annotated[int, Field(ge=1, le=16)]
Times = Mapping[str, Mapping[str, float]]  # layer -> bits -> milliseconds


class Limit(BaseModel):
    """What the quantized layers may take; all that are given hold at once.

    Attributes:
        size: bytes of weights, as a share of those with 8 bits everywhere.
        size_mb: bytes of weights, in 10^6.
        bit_operations: multiply-adds times bits of weight times bits of activation, as a share of
            the same with 8 bits.
        mac_bits: multiply-adds times bits of weight, as a share of the same with 8 bits.
        latency: sum of the layers' times, as a share of the sum at 8 bits; needs `table`.
        latency_ms: sum of the layers' times; needs `table`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: float | None = Field(default=None, gt=0)
    size_mb: float | None = Field(default=None, gt=0)
    bit_operations: float | None = Field(default=None, gt=0)
    mac_bits: float | None = Field(default=None, gt=0)
    latency: float | None = Field(default=None, gt=0)
    latency_ms: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not self.given:
            raise ValueError("needs a limit; write such as size: 0.6")
        return self

    @property
    def given(self) -> dict[str, float]:
        """Name -> value of those that are set."""
        return {k: v for k, v in self if v is not None}


class Precision(BaseModel):
    """How bits are chosen.

    Attributes:
        bits: to choose from: of weights, or pairs [weight, activation] for a layer's weight and
            what it reads. No two of the same bits of weight, as only changes of weights are judged.
        limit: see `Limit`.
        sensitivity: fisher: mean squared gradient of each weight, image by image; hessian: mean
            Hessian trace as in the papers, by random vectors, which needs many passes to be more
            than noise for small layers.
        samples: calibration images for it; default all.
        rounds: passes over them, at most; of hessian.
        tolerance: hessian stops when no weight's trace has changed by more than this share.
        table: milliseconds of each layer by bits, `{layer1.0.conv1: {"4": 0.2, "8": 0.3}}` (or by
            pair, `"4/8"`), or a JSON file of this beside the recipe.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: tuple[Width | tuple[Width, Width], ...] = Field(default=(4, 8), min_length=1)
    limit: Limit
    sensitivity: Literal["fisher", "hessian"] = "fisher"
    samples: int | None = Field(default=None, ge=1)
    rounds: int = Field(default=20, ge=1)
    tolerance: float = Field(default=0.02, ge=0, lt=1)
    table: str | dict[str, dict[str, Annotated[float, Field(ge=0)]]] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if len({isinstance(b, int) for b in self.bits}) > 1:
            raise ValueError("bits must be numbers or pairs, not both; write [[4, 8], [8, 8]]")
        weights = [w for w, _ in self.choices(0)]
        if len(set(weights)) < len(weights):
            raise ValueError(
                f"bits has {max(weights, key=weights.count)} bits of weight twice; what it costs "
                "to change activations is not judged, so write one pair for each"
            )
        timed = {"latency", "latency_ms"} & set(self.limit.given)
        if timed and self.table is None:
            raise ValueError(f"limit.{min(timed)} needs a table; write table: times.json")
        return self

    @property
    def pairs(self) -> bool:
        """Whether activations are chosen with the weights."""
        return not isinstance(self.bits[0], int)

    def choices(self, activation: int) -> list[tuple[int, int]]:
        """(bits of weight, bits of activation); the latter as given where they are not chosen."""
        return [(b, activation) if isinstance(b, int) else b for b in self.bits]


@dataclass(frozen=True)
class Unit:
    """One weight, with all layers that read it.

    Attributes:
        address: of the weight.
        layers: nodes that read it.
        numel: entries.
        macs: multiply-adds for one sample, of all these layers.
        reads: quantized activations they read, by the first of those sharing a scale.
        choices: (bits of weight, bits of activation).
    """

    address: str
    layers: tuple[str, ...]
    numel: int
    macs: int
    reads: tuple[str, ...]
    choices: tuple[tuple[int, int], ...]

    @property
    def free(self) -> bool:
        """Whether there is anything to choose."""
        return len(self.choices) > 1


class Search:
    """The choices of a placement, what they cost, and what must be equal.

    Args:
        precision: as in the recipe.
        placement: of all quantizers, with the bits they have otherwise.
        graph: the captured model it was made for.
        model: its parameters.
        fixed: bits that are decided already.
        table: see `Precision`.

    Raises:
        BindError: nothing to choose; a layer that is not in the table.
    """

    def __init__(
        self,
        precision: Precision,
        placement: Placement,
        graph: Graph,
        model: nn.Module,
        fixed: BitMap,
        table: Times | None = None,
    ):
        self.precision, self.table = precision, table
        same = canonical_addresses(model)
        reads = read_by(placement, graph, same)
        asked = {a.id: a.bits for a in placement.activations}
        self.fixed = BitMap({}, {id: asked[id] for a in fixed.weights for id in reads.get(a, ())})
        self.fixed = self.fixed | fixed
        macs: dict[str, int] = {}
        for row in cost(model, graph):
            if row.weight is not None:
                address = same.get(row.weight, row.weight)
                macs[address] = macs.get(address, 0) + row.macs
        nodes: dict[str, list[str]] = {}
        for address, id in layers(graph, same):
            nodes.setdefault(address, []).append(id)
        self.units = [
            Unit(
                w.address,
                tuple(nodes.get(w.address, ())),
                model.get_parameter(w.address).numel(),
                macs.get(w.address, 0),
                reads[w.address],
                self._choices(w.address, reads[w.address], asked),
            )
            for w in placement.weights
        ]
        if not any(u.free for u in self.units):
            raise BindError("precision has nothing to choose: give more bits, or fewer overrides.")
        self.groups = _groups(placement, graph) if precision.pairs else {}
        self.kinds = [[a for _, a in u.choices] for u in self.units]
        self.ties = self._ties()
        self.resources = [
            self._resource(name, value) for name, value in precision.limit.given.items()
        ]

    def refuse_the_impossible(self) -> None:
        """Look whether the limits can be kept to at all.

        Raises:
            BindError: they cannot; names the smallest that can.
        """
        if self._solve([[0.0] * len(u.choices) for u in self.units]) is not None:
            return
        bits = json.dumps(self.precision.bits)
        for r in self.resources:
            smallest = least(r, self.kinds, self.ties)
            if smallest > r.limit:
                given = self.precision.limit.given[r.name]
                # rounded up, so that what is told can be written
                reach = f"{smallest / r.limit * given * (1 + 5e-4):.3g}"
                raise BindError(
                    f"precision.limit.{r.name}: {given:g} cannot be reached with bits {bits}; the "
                    f"smallest is {reach}. Raise the limit, or give fewer bits."
                )
        raise BindError(
            f"precision.limit: these limits cannot be kept to together with bits {bits}. Raise one."
        )

    def best(self, losses: Sequence[Sequence[float]]) -> list[int]:
        """Index of the choice of each unit.

        Raises:
            BindError: see `refuse_the_impossible`.
        """
        chosen = self._solve(losses)
        if chosen is None:
            self.refuse_the_impossible()
        assert chosen is not None
        return chosen

    def bits(self, chosen: Sequence[int]) -> BitMap:
        """What was chosen; what is fixed is not in it."""
        weights: dict[str, int] = {}
        activations: dict[str, int] = {}
        for unit, k in zip(self.units, chosen, strict=True):
            weight, activation = unit.choices[k]
            weights[unit.address] = weight
            if self.precision.pairs:
                for id in unit.reads:
                    group = dict.fromkeys(self.groups[id], activation)
                    # what is fixed pulls its group along only where nothing was chosen for it
                    activations = group | activations if self._held(id) else activations | group
        return BitMap(weights, activations)

    def spent(self, chosen: Sequence[int]) -> dict[str, float]:
        """Name of each limit -> what is used of it, in the limit's own terms."""
        given = self.precision.limit.given
        return {r.name: r.of(chosen) / r.limit * given[r.name] for r in self.resources}

    def _solve(self, losses: Sequence[Sequence[float]]) -> list[int] | None:
        return assign(losses, self.resources, self.kinds, self.ties)

    def _choices(
        self, address: str, reads: Sequence[str], asked: Mapping[str, int]
    ) -> tuple[tuple[int, int], ...]:
        usual = asked[reads[0]] if reads else 0
        held = next((self.fixed.activations[id] for id in reads if self._held(id)), None)
        out: dict[tuple[int, int], None] = {}
        for weight, activation in self.precision.choices(usual):
            weight = self.fixed.weights.get(address, weight)
            out[weight, activation if held is None else held] = None
        return tuple(out)

    def _held(self, id: str) -> bool:
        return id in self.fixed.activations

    def _ties(self) -> list[list[int]]:
        """Units whose inputs must have the same bits."""
        of_group: dict[tuple[str, ...], list[int]] = {}
        for i, unit in enumerate(self.units):
            if unit.reads and unit.free and not any(self._held(id) for id in unit.reads):
                for id in unit.reads:
                    of_group.setdefault(self.groups.get(id, (id,)), []).append(i)
        found = (list(dict.fromkeys(group)) for group in of_group.values())
        return [group for group in found if len(group) > 1]

    def _resource(self, name: str, value: float) -> Resource:
        costs = [[self._cost(name, u, *pair) for pair in u.choices] for u in self.units]
        if name.endswith(("_mb", "_ms")):
            return Resource(name, costs, value * (MB if name == "size_mb" else 1))
        full = sum(self._cost(name, u, REFERENCE, REFERENCE) for u in self.units)
        return Resource(name, costs, value * full)

    def _cost(self, name: str, unit: Unit, weight: int, activation: int) -> float:
        if name in ("size", "size_mb"):
            return unit.numel * weight / 8
        if name == "bit_operations":
            return float(unit.macs * weight * activation)
        if name == "mac_bits":
            return float(unit.macs * weight)
        return sum(self._time(id, weight, activation) for id in unit.layers)

    def _time(self, layer: str, weight: int, activation: int) -> float:
        assert self.table is not None
        if layer not in self.table:
            raise BindError(
                f"precision.table has no times of '{layer}'.{nearest(layer, self.table)} Measure "
                "it, or leave the layer out with an override, bits: float."
            )
        times = self.table[layer]
        pair = f"{weight}/{activation}"
        if pair not in times and str(weight) not in times:
            raise BindError(
                f"precision.table.{layer} has no time at {weight} bits (nor at {pair}), only at "
                f"{', '.join(times)}. Measure it."
            )
        return float(times[pair] if pair in times else times[str(weight)])


def read_table(table: str | Times | None, recipe: str) -> Times | None:
    """The times that `Precision.table` means.

    Args:
        table: the times themselves, or a file's name, relative to the recipe's folder.
        recipe: where the recipe was read from; `<python>` stands for the working directory.

    Raises:
        UserError: no such file, or not `{layer: {bits: ms}}`.
    """
    if not isinstance(table, str):
        return table
    path = (Path() if recipe.startswith("<") else Path(recipe).parent) / table
    if not path.is_file():
        raise UserError(
            f"precision.table: {path}: no such file; it is looked for beside the recipe."
        )
    try:
        found = json.loads(path.read_text())
        return {
            str(layer): {str(bits): float(ms) for bits, ms in times.items()}
            for layer, times in found.items()
        }
    except (ValueError, TypeError, AttributeError):
        raise UserError(
            f'precision.table: {path} must be JSON such as {{"conv1": {{"4": 0.2, "8": 0.3}}}}.'
        ) from None


def _groups(placement: Placement, graph: Graph) -> dict[str, tuple[str, ...]]:
    """Activation -> those with which it must have the same bits: operands of one addition."""
    group = {a.id: {a.id} for a in placement.activations if a.shares_scale_with is None}
    for operands in added(placement, graph):
        joined = set[str]().union(*(group[id] for id in operands))
        for id in joined:
            group[id] = joined
    return {id: tuple(sorted(ids)) for id, ids in group.items()}


def positive(curvature: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """Curvature without what is not positive, and the names of these weights.

    A negative trace would pay for rounding; the smallest positive one stands for it.
    """
    wrong = [name for name, value in curvature.items() if not value > 0]
    least = min((v for v in curvature.values() if v > 0), default=0.0)
    return {k: v if v > 0 else least for k, v in curvature.items()}, wrong
