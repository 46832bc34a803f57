"""Products that are no plain matrix product: einsum, bilinear forms, sums with a product."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Flow, Labels, Value
from gracile.graph.operands import join, operands
from gracile.graph.oprule import Kept, OpRule, Shape, oprule
from gracile.graph.ops.elementwise import broadcast
from gracile.graph.producers import mark_product


@dataclass(frozen=True)
class Equation:
    """An einsum with a name for every dim.

    Attributes:
        inputs: names of each operand's dims.
        output: names of the result's dims.
    """

    inputs: tuple[tuple[str, ...], ...]
    output: tuple[str, ...]


def parse(text: str, ranks: Sequence[int]) -> Equation:
    """Name every dim; those of an ellipsis are `...1`, `...0`, counted from the right.

    Raises:
        ValueError: the equation does not fit these ranks.

    >>> parse("b...i, oi -> b...o", [4, 2]).output
    ('b', '...1', '...0', 'o')
    """
    left, arrow, right = text.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise ValueError(f"'{text}' has {len(terms)} operands, got {len(ranks)}.")
    inputs = tuple(_named(term, rank) for term, rank in zip(terms, ranks, strict=True))
    dots = max((sum(n.startswith("...") for n in term) for term in inputs), default=0)
    more = tuple(f"...{k}" for k in range(dots))[::-1]
    if not arrow:  # every letter that appears once, in alphabetical order
        letters = left.replace("...", "").replace(",", "")
        return Equation(inputs, (*more, *sorted(c for c in letters if letters.count(c) == 1)))
    before, found, after = right.partition("...")
    return Equation(inputs, (*before, *(more if found else ()), *after))


def _roles(equation: Equation) -> list[tuple[list[int], list[int]]]:
    """For each operand the dims that are summed, and those that only it has: what it makes."""
    everywhere = [name for names in equation.inputs for name in set(names)]
    return [
        (
            [d for d, name in enumerate(names) if name not in equation.output],
            [
                d
                for d, name in enumerate(names)
                if name in equation.output and everywhere.count(name) == 1
            ],
        )
        for names in equation.inputs
    ]


def _named(term: str, rank: int) -> tuple[str, ...]:
    before, found, after = term.partition("...")
    more = rank - len(before) - len(after)
    if more < 0 or (more and not found):
        raise ValueError(f"'{term}' does not name {rank} dims.")
    return (*before, *(f"...{k}" for k in reversed(range(more))), *after)


@oprule("einsum", source="torch.einsum")
class Einsum(OpRule):
    """Dims with one letter are one dim: summed if it is not in the output."""

    calls = {torch.einsum: ("equation", "*tensors"), "aten.einsum": ("equation", "tensors")}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Tie what has one letter. A letter twice in one operand is its diagonal, which stays."""
        text, shapes = node.attrs.get("equation"), [flow.shape_of(i) for i in node.inputs]
        axes = [v for v in values if isinstance(v, Axes)]
        if not isinstance(text, str) or len(axes) != len(shapes) or node.shape is None:
            return flow.give_up(node, values, "'einsum' has an equation that cannot be read")
        try:
            equation = parse(text, [len(s or ()) for s in shapes])
        except ValueError:
            return flow.give_up(node, values, f"'einsum' has an equation '{text}' as no other")
        mark_product(node, values, flow, *_roles(equation))
        met = self._met(node, equation, axes, [s or () for s in shapes], flow)
        return Axes(tuple(met.get(name) for name in equation.output), axes[0].why)

    def _met(
        self,
        node: Node,
        equation: Equation,
        axes: Sequence[Axes],
        shapes: Sequence[Shape],
        flow: Flow,
    ) -> dict[str, Labels | None]:
        """Name -> the labels of all dims of that name."""
        met: dict[str, Labels | None] = {}
        size: dict[str, int] = {}
        for names, shape in zip(equation.inputs, shapes, strict=True):
            for name, n in zip(names, shape, strict=True):
                size[name] = max(n, size.get(name, 1))
        why = f"'{node.id}' multiplies it with something that stays"
        for names, value, shape in zip(equation.inputs, axes, shapes, strict=True):
            for name, labels, n in zip(names, value.dims, shape, strict=True):
                if n != size[name] or names.count(name) > 1:
                    flow.protect(labels, f"'{node.id}' broadcasts it or takes its diagonal")
                    if n != size[name]:
                        continue
                    labels = None
                met[name] = join(flow, met[name], labels, why) if name in met else labels
        return met

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Product of all sizes: exact for two operands."""
        text = node.attrs.get("equation")
        if not isinstance(text, str) or any(s is None for s in inputs):
            return 0
        shapes = [s or () for s in inputs]
        try:
            equation = parse(text, [len(s) for s in shapes])
        except ValueError:
            return 0
        sizes: dict[str, int] = {}
        for names, shape in zip(equation.inputs, shapes, strict=True):
            for name, n in zip(names, shape, strict=True):
                sizes[name] = max(n, sizes.get(name, 1))
        return prod(sizes.values()) if len(shapes) > 1 else 0


@oprule("bilinear", source="torch.nn.functional.bilinear: weight (O, I1, I2)")
class Bilinear(OpRule):
    """y_o = a' W_o b + bias_o."""

    modules = (nn.Bilinear,)
    calls = dict.fromkeys(
        (F.bilinear, torch.bilinear, "aten.bilinear"), ("input1", "input2", "weight", "bias")
    )
    roles = ("weight", "bias")
    attributes = ("in1_features", "in2_features", "out_features")

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Outputs are new; each input's last dim is tied to a dim of the weight."""
        weight = node.params.get("weight")
        given = operands(node, values, flow, ("input1", "input2", "weight", "bias"))
        pair = [o for name in ("input1", "input2") if (o := given.get(name)) and o.shape]
        if weight is None or len(pair) != 2 or any(o.axes is None for o in pair):
            return flow.give_up(node, values, "the weight of 'bilinear' is computed")
        out = flow.written(weight, 0)
        for dim, operand in enumerate(pair, 1):
            last, labels = len(operand.shape or ()) - 1, flow.read(weight, dim)
            fed = flow.along(operand.value, node, last, len(labels))
            flow.tie(fed, labels, f"the inputs of '{node.id}' stay")
        if "bias" in node.params:
            flow.tie(out, flow.axis(node.params["bias"], 0), f"the outputs of '{node.id}' stay")
        a, b = (o.axes for o in pair)
        assert a is not None
        assert b is not None
        why = f"'{node.id}' multiplies it with something that stays"
        lead = [join(flow, x, y, why) for x, y in zip(a.dims[:-1], b.dims[:-1], strict=True)]
        return Axes((*lead, out), a.why)

    def resize(self, module: Any, kept: Kept) -> None:
        """Feature counts from the weight."""
        module.out_features, module.in1_features, module.in2_features = module.weight.shape

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Output elements x both inputs' features."""
        if node.shape is None or "weight" not in params:
            return 0
        return prod(node.shape) * prod(params["weight"][1:])


@oprule("addmm", source="torch.addmm, torch.baddbmm: c + a b")
class Addmm(OpRule):
    """A sum with a matrix product, of matrices or of batches of them."""

    calls = {
        **dict.fromkeys((torch.addmm, ".addmm", "aten.addmm"), ("input", "a", "b")),
        **dict.fromkeys((torch.baddbmm, ".baddbmm", "aten.baddbmm"), ("input", "a", "b")),
    }

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The inner dims are tied; the sum is tied to the result."""
        shapes = [flow.shape_of(i) for i in node.inputs]
        axes = [v for v in values if isinstance(v, Axes)]
        if len(axes) != 3 or node.shape is None or any(s is None for s in shapes):
            return flow.give_up(node, values, "'addmm' does not read three tensors")
        c, a, b = axes
        mark_product(node, values, flow, ((), ()), ((-1,), (-2,)), ((-2,), (-1,)))
        why = f"'{node.id}' multiplies it with something that stays"
        join(flow, a.dims[-1], b.dims[-2], why)
        lead = [join(flow, x, y, why) for x, y in zip(a.dims[:-2], b.dims[:-2], strict=True)]
        made = Axes((*lead, a.dims[-2], b.dims[-1]), a.why)
        return broadcast(node, [made, c], [node.shape, shapes[0] or ()], node.shape, flow)

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Output elements x length of the inner dim."""
        if node.shape is None or len(inputs) != 3 or inputs[1] is None:
            return 0
        return prod(node.shape) * inputs[1][-1]


@oprule("mv", source="torch.mv, torch.dot, torch.outer: products with vectors")
class WithVector(OpRule):
    """Matrix times vector, or two vectors."""

    calls = {
        **dict.fromkeys((torch.mv, ".mv", "aten.mv"), ("a", "b")),
        **dict.fromkeys((torch.dot, ".dot", "aten.dot"), ("a", "b")),
        **dict.fromkeys((torch.outer, ".outer", "aten.outer"), ("a", "b")),
    }

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The summed dims are tied; of an outer product each operand has its own."""
        if len(values) != 2 or node.shape is None:
            return flow.give_up(node, values, "a product with a vector reads one tensor")
        a, b = values
        if not isinstance(a, Axes) or not isinstance(b, Axes):
            return flow.give_up(node, values, "a product with a vector reads no tensors")
        if len(a.dims) == 1 and len(node.shape) == 2:
            mark_product(node, values, flow, ((), (0,)), ((), (0,)))
            return Axes((a.dims[0], b.dims[0]), a.why)
        mark_product(node, values, flow, ((-1,), range(len(a.dims) - 1)), ((0,), ()))
        join(flow, a.dims[-1], b.dims[0], f"'{node.id}' multiplies it with something that stays")
        return Axes(a.dims[:-1], a.why)

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Elements of the larger operand; of an outer product, of the result."""
        shapes = [s for s in inputs if s is not None]
        if node.shape is None or not shapes:
            return 0
        return max(prod(node.shape), *(prod(s) for s in shapes))
