"""Two networks side by side: what each operator costs, how many zeros it has, where results part.

Operators are matched by their names, which surgery and quantization keep; quantizers are none.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gracile.analyze.cost import CostRow, Totals, cost, totals
from gracile.analyze.sparsity import sparsity_rows
from gracile.benchmark.runtimes.pytorch import node_values
from gracile.core.csv_text import csv_text
from gracile.errors import UserError
from gracile.graph.capture import as_inputs, capture
from gracile.graph.graph import Graph

COLUMNS = (
    "operator", "kind", "status", "shape", "shape_other", "macs", "macs_other", "params",
    "params_other", "zeros", "zeros_other", "distance",
)  # fmt: skip
Status = Literal["same", "changed", "gone", "new"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Side:
    """An operator in one of the networks.

    Attributes:
        shape: of its output for one sample; None if it has none.
        macs, params: see `cost.CostRow`.
        zeros: share of its weight that is zero; None without a weight.
    """

    shape: Shape | None
    macs: int
    params: int
    zeros: float | None


@dataclass(frozen=True)
class ComparedOperator:
    """An operator in both.

    Attributes:
        id, op: its name, and what it computes.
        one, other: in each network; None where it is not there.
        distance: |one - other| / |one| of its outputs, Euclidean; None where the shapes differ.
    """

    id: str
    op: str
    one: Side | None
    other: Side | None
    distance: float | None

    @property
    def status(self) -> Status:
        """same: shape, cost and zeros are equal; what it computes may still differ."""
        if self.one is None:
            return "new"
        if self.other is None:
            return "gone"
        return "same" if self.one == self.other else "changed"


@dataclass(frozen=True)
class Comparison:
    """Two networks.

    Attributes:
        operators: of the first in its order, then those that only the other has.
        one, other: what each costs as a whole.
    """

    operators: tuple[ComparedOperator, ...]
    one: Totals
    other: Totals

    def of_status(self, *status: Status) -> list[ComparedOperator]:
        """Those that are the same, changed, gone or new."""
        return [o for o in self.operators if o.status in status]

    def to_csv(self) -> str:
        """One line an operator, under `COLUMNS`; empty where there is nothing."""
        return csv_text(COLUMNS, (_line(o) for o in self.operators))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        operators = [dict(zip(COLUMNS, _line(o), strict=True)) for o in self.operators]
        return {"one": vars(self.one), "other": vars(self.other), "operators": operators}


def compare_models(
    model: nn.Module, other: nn.Module, example: Tensor | tuple[Tensor, ...]
) -> Comparison:
    """Put two networks side by side, operator by operator.

    Neither is changed; both run in eval mode.

    Args:
        model: the one that was there before.
        other: what became of it: compressed, retrained, or another network altogether.
        example: an input batch that both take (a tuple for several inputs).

    Raises:
        UserError: one of them does not take the example.
    """
    inputs = as_inputs(example)
    one, totals_one, values = _sides(model, inputs)
    two, totals_two, others = _sides(other, inputs)
    found = []
    for id in dict.fromkeys([*one, *two]):
        op = (one.get(id) or two[id])[0]
        sides = one.get(id, (op, None))[1], two.get(id, (op, None))[1]
        distance = _distance(values.get(id), others.get(id))
        found.append(ComparedOperator(id, op, *sides, distance))
    return Comparison(tuple(found), totals_one, totals_two)


def _sides(
    model: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[dict[str, tuple[str, Side]], Totals, dict[str, Any]]:
    model = copy.deepcopy(model).eval()
    try:
        with torch.no_grad():
            model(*inputs)
    except (RuntimeError, TypeError, ValueError) as e:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise UserError(
            f"{type(model).__name__} does not take inputs of shape {shapes}: {e}. Both networks "
            "must take the same."
        ) from None
    graph = capture(model, inputs)
    zeros = {r.tensor: r.element for r in sparsity_rows(model)}
    rows = [r for r in cost(model, graph) if r.op != "quantize"]
    sides = {r.id: (r.op, _side(graph, r, zeros)) for r in rows}
    values: dict[str, Any] = {}
    if graph.module is not None:
        with torch.no_grad():
            values = node_values(graph.module.eval(), list(sides), inputs)
    return sides, totals(model, graph), values


def _side(graph: Graph, row: CostRow, zeros: dict[str, float]) -> Side:
    shape = graph[row.id].shape
    weight = None if row.weight is None else zeros.get(row.weight)
    return Side(None if shape is None else tuple(shape[1:]), row.macs, row.params, weight)


def _distance(one: Any, other: Any) -> float | None:
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray):
        return None
    if one.shape != other.shape:
        return None
    size = float(np.linalg.norm(one.astype(np.float64)))
    off = float(np.linalg.norm(one.astype(np.float64) - other.astype(np.float64)))
    return off / size if size else (0.0 if off == 0 else None)


def _line(o: ComparedOperator) -> tuple[Any, ...]:
    sides = (o.one, o.other)
    shapes = ("x".join(map(str, s.shape)) if s and s.shape is not None else "" for s in sides)
    return (
        o.id, o.op, o.status, *shapes, *(s.macs if s else "" for s in sides),
        *(s.params if s else "" for s in sides),
        *("" if s is None or s.zeros is None else round(s.zeros, 6) for s in sides),
        "" if o.distance is None else float(f"{o.distance:.6g}"),
    )  # fmt: skip
