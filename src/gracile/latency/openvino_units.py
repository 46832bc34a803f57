"""The units of a network in OpenVINO, and small networks that hold one of them.

The execution graph of a compiled model says what is executed and what was fused into it. It cannot
be run again, so a unit is described by what it computes, and built from public operators behind a
convolution that gives it its input in the layout it will have: OpenVINO then fuses it the same way.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gracile.benchmark.runtimes.openvino import OpenVino
from gracile.latency.unit import Unit

SKIPPED = ("Const", "Input", "Output", "Reshape", "MemoryInput", "MemoryOutput")
ACTIVATIONS = {
    "Relu": "relu", "Clamp": "clamp", "Sigmoid": "sigmoid", "Swish": "swish", "HSwish": "hswish",
    "HSigmoid": "hsigmoid", "Gelu": "gelu", "Tanh": "tanh", "Elu": "elu", "PRelu": "prelu",
}  # fmt: skip
ELEMENTWISE = ("Add", "Multiply", "Subtract", "Divide", "Maximum", "Minimum")
CONVS = ("Convolution", "GroupConvolution")
SOURCE = 8  # channels of the image that context convolutions read
LITERAL = 64
INTEGER = ("u8", "i8")


def units_of(loaded: OpenVino) -> list[tuple[str, Unit]]:
    """(name, unit) of every step, in execution order; steps that cost nothing are left out."""
    source, executed = loaded.program()
    known = {op.get_friendly_name(): op for op in source.get_ordered_ops()}
    out = []
    for node in executed.get_ordered_ops():
        facts = _facts(node)
        if facts["layerType"] in SKIPPED or not _reads_data(node):
            continue
        names = [node.get_friendly_name(), *facts["originalLayersNames"].split(",")]
        ops = [known[n] for n in dict.fromkeys(names) if n in known]
        out.append((node.get_friendly_name(), _unit(node, facts, ops)))
    return out


def small_networks(unit: Unit) -> tuple[Any, Any]:
    """Two ``openvino.Model``: the context with the unit behind it, and the context alone.

    Both end in a pooling that reads one pixel, so that neither pays for the layout of its output.
    """
    whole, alone = _Built(), _Built()
    for built, wanted in ((whole, True), (alone, False)):
        built.make(unit, wanted)
    return whole.model(), alone.model()


def isolated_network(unit: Unit) -> Any:
    """An ``openvino.Model`` of a unit that reads the caller's tensors and writes to them."""
    built = _Built(plain=True)
    built.make(unit, True)
    return built.model()


def _facts(node: Any) -> dict[str, str]:
    found = node.get_rt_info()
    keys = ("layerType", "runtimePrecision", "outputPrecisions", "originalLayersNames")
    return {k: str(found[k].astype(str)) if k in found else "" for k in keys}


def _reads_data(node: Any) -> bool:
    """Whether a step depends on the network's input; what does not is computed once."""
    seen, todo = set(), [node]
    while todo:
        op = todo.pop()
        for k in range(op.get_input_size()):
            maker = op.input_value(k).get_node()
            kind = _facts(maker)["layerType"]
            if kind == "Input":
                return True
            if maker.get_friendly_name() not in seen and kind != "Const":
                seen.add(maker.get_friendly_name())
                todo.append(maker)
    return False


def _data_inputs(node: Any) -> list[tuple[list[int], str]]:
    """(shape, precision) of the inputs that depend on the network's input."""
    out = []
    for k in range(node.get_input_size()):
        maker = node.input_value(k).get_node()
        facts = _facts(maker)
        if facts["layerType"] == "Input" or (facts["layerType"] != "Const" and _reads_data(maker)):
            shape = [int(d) for d in node.get_input_shape(k)]
            out.append((shape, facts["outputPrecisions"].split(",")[0]))
    return out


def _unit(node: Any, facts: Mapping[str, str], ops: Sequence[Any]) -> Unit:
    reads = _data_inputs(node)
    writes = [int(d) for d in node.get_output_shape(0)]
    out = facts["outputPrecisions"].split(",")[0]
    kinds = [op.get_type_name() for op in ops]
    common = {
        "precision": "int8" if facts["runtimePrecision"] in INTEGER else facts["runtimePrecision"],
        "out": out,
        "act": next((ACTIVATIONS[k] for k in kinds if k in ACTIVATIONS), ""),
    }
    layer = next((op for op in ops if op.get_type_name() in CONVS), None)
    if facts["layerType"] == "Convolution" and layer is not None and len(writes) == 4:
        return _of_conv(node.get_input_size() > 2, layer, reads, writes, common)
    if facts["layerType"] == "FullyConnected" and len(reads) == 1:
        (i, o), rest = (reads[0][0][-1], writes[-1]), reads[0][0][:-1]
        return Unit.of("linear", (i, o), {**common, "rows": rest, "in": reads[0][1]})
    same = bool(reads) and all(s == writes for s, _ in reads)
    if facts["layerType"] in ("Eltwise", "Subgraph") and same and len(writes) == 4:
        joined = next((k for k in kinds if k in ELEMENTWISE), "") if len(reads) > 1 else ""
        c, size = writes[1], writes[2:]
        more = {"joined": joined, "in": [p for _, p in reads], "size": size, "batch": writes[0]}
        return Unit.of("elementwise", (c,), {**common, **more})
    if facts["layerType"] == "Reduce" and len(writes) == 4 and writes[2:] == [1, 1]:
        more = {"size": reads[0][0][2:], "batch": writes[0], "in": reads[0][1]}
        return Unit.of("mean", (writes[1],), {**common, **more})
    if facts["layerType"] == "Reorder" and len(writes) == 4:
        more = {"size": writes[2:], "batch": writes[0], "in": reads[0][1]}
        return Unit.of("reorder", (writes[1],), {**common, **more})
    return _of_operator(facts["layerType"], ops, reads, writes, common)


def _of_conv(
    bias: bool,
    layer: Any,
    reads: Sequence[tuple[list[int], str]],
    writes: list[int],
    common: Mapping[str, Any],
) -> Unit:
    weight = [int(d) for d in layer.get_input_shape(1)]
    given = layer.get_attributes()
    grouped = layer.get_type_name() == "GroupConvolution"
    groups = weight[0] if grouped else 1
    x = reads[0][0]
    i, o = x[1], writes[1]
    facts = {
        **common,
        "batch": x[0],
        "size": x[2:],
        "kernel": weight[-2:],
        "stride": [int(s) for s in given["strides"]],
        "dilation": [int(s) for s in given["dilations"]],
        "pad": [[int(p) for p in given[k]] for k in ("pads_begin", "pads_end")],
        "in": reads[0][1],
        "add": [p for _, p in reads[1:]],
        "bias": bias,
    }
    if groups == 1:
        return Unit.of("conv", (i, o), facts)
    if groups == i == o:
        return Unit.of("depthwise", (i,), facts)
    return Unit.of("grouped", (), {**facts, "groups": groups, "channels": [i, o]})


def _of_operator(
    kind: str,
    ops: Sequence[Any],
    reads: Sequence[tuple[list[int], str]],
    writes: list[int],
    common: Mapping[str, Any],
) -> Unit:
    """An operator that is built from its own name, attributes and inputs; sizes as they are."""
    op = next((op for op in ops if op.get_type_name() != "FakeQuantize"), None)
    shapes = [s for s, _ in reads]
    facts = {**common, "in": [p for _, p in reads], "reads": shapes, "writes": writes}
    if op is None:
        return Unit.of(kind, (), facts)
    constants: list[Any] = []
    for k in range(op.get_input_size()):
        maker = op.input_value(k).get_node()
        value = maker.get_data() if maker.get_type_name() == "Constant" else None
        if value is not None and value.size <= LITERAL:
            constants.append([str(value.dtype), value.tolist()])
        else:
            constants.append(None)
    attributes = json.loads(json.dumps(op.get_attributes(), default=str))
    more = {"op": op.get_type_name(), "attributes": attributes, "constants": constants}
    return Unit.of(kind, (), {**facts, **more})


class _Built:
    """An OpenVINO model of a unit and its context, as it grows; `plain` leaves the context out."""

    def __init__(self, plain: bool = False) -> None:
        self.plain = plain
        self.rng = np.random.default_rng(0)
        self.parameters: list[Any] = []
        self.results: list[Any] = []

    def model(self) -> Any:
        import openvino as ov

        return ov.Model([_ops().result(r) for r in self.results], self.parameters, "unit")

    def make(self, unit: Unit, wanted: bool) -> None:
        """Add the context of a unit, then the unit if it is wanted, then the end."""
        f = unit.detail
        if unit.kind in ("conv", "depthwise", "grouped"):
            self._conv(unit, f, wanted)
        elif unit.kind == "linear":
            x = self._rows([*f["rows"], unit.widths[0]], f["in"])
            self.results.append(self._linear(x, unit, f) if wanted else x)
        elif unit.kind in ("elementwise", "mean", "reorder"):
            shape = [f["batch"], unit.widths[0], *f["size"]]
            kinds = f["in"] if isinstance(f["in"], list) else [f["in"]]
            xs = [self.context(shape, p) for p in kinds]
            self._ends(xs, lambda: self._simple(unit.kind, f, xs), wanted, unit.kind)
        else:
            xs = [self.context(s, p) for s, p in zip(f["reads"], f["in"], strict=True)]
            self._ends(xs, lambda: self._operator(f, xs), wanted, "")

    def context(self, shape: Sequence[int], precision: str) -> Any:
        """A tensor of this shape that a layer computed, on a grid if it is an integer."""
        if len(shape) != 4 or self.plain:
            return self._rows(shape, precision)
        x = self._parameter([shape[0], SOURCE, *shape[2:]])
        if precision in INTEGER:
            x = self._grid(x)
        y = self._layer(x, [shape[1], SOURCE, 1, 1], precision in INTEGER)
        y = _ops().relu(y).output(0)
        return self._grid(y) if precision in INTEGER else y

    def _conv(self, unit: Unit, f: dict[str, Any], wanted: bool) -> None:
        i, o = f["channels"] if unit.kind == "grouped" else (unit.widths[0], unit.widths[-1])
        groups = {"conv": 1, "depthwise": i}.get(unit.kind) or f["groups"]
        integer = f["precision"] == "int8"
        x = self.context([f["batch"], i, *f["size"]], "u8" if integer else "f32")
        grow = zip(f["size"], f["kernel"], f["stride"], f["dilation"], *f["pad"], strict=True)
        size = [(n + a + b - d * (k - 1) - 1) // s + 1 for n, k, s, d, a, b in grow]
        added = [self.context([f["batch"], o, *size], p) for p in f["add"]]

        def layer() -> Any:
            ops = _ops()
            shape = [o // groups, i // groups, *f["kernel"]]
            y = self._layer(x, [groups, *shape] if groups > 1 else shape, integer, f)
            for other in added:
                y = ops.add(y, other).output(0)
            return self._after(y, f)

        self._ends([x, *added], layer, wanted, "")

    def _layer(
        self, x: Any, shape: Sequence[int], integer: bool, f: Mapping[str, Any] | None = None
    ) -> Any:
        ops = _ops()
        weight = ops.constant(self.rng.normal(0, 0.1, shape).astype(np.float32)).output(0)
        if integer:
            weight = self._weight_grid(weight, len(shape))
        begin, end = f["pad"] if f else ([0, 0], [0, 0])
        stride, dilation = (f["stride"], f["dilation"]) if f else ([1, 1], [1, 1])
        make = ops.group_convolution if len(shape) == 5 else ops.convolution
        y = make(x, weight, stride, begin, end, dilation).output(0)
        if f is None or f["bias"]:
            out = shape[0] if len(shape) == 4 else shape[0] * shape[1]
            bias = self.rng.normal(0, 0.1, (1, out, 1, 1)).astype(np.float32)
            y = ops.add(y, ops.constant(bias)).output(0)
        return y

    def _linear(self, x: Any, unit: Unit, f: dict[str, Any]) -> Any:
        ops = _ops()
        i, o = unit.widths
        weight = ops.constant(self.rng.normal(0, 0.1, (o, i)).astype(np.float32)).output(0)
        if f["precision"] == "int8":
            weight = self._weight_grid(weight, 2)
        y = ops.matmul(x, weight, False, True).output(0)
        y = ops.add(y, ops.constant(self.rng.normal(0, 0.1, (1, o)).astype(np.float32))).output(0)
        return self._after(y, f)

    def _simple(self, kind: str, f: dict[str, Any], xs: Sequence[Any]) -> Any:
        ops = _ops()
        if kind == "reorder":
            return xs[0]
        if kind == "mean":
            y = ops.reduce_mean(xs[0], ops.constant(np.array([2, 3])), True).output(0)
            return self._after(y, f)
        y = xs[0]
        for other in xs[1:]:
            y = getattr(ops, f["joined"].lower())(y, other).output(0)
        return self._after(y, f)

    def _operator(self, f: dict[str, Any], xs: Sequence[Any]) -> Any:
        from openvino.utils.node_factory import NodeFactory

        if "op" not in f:
            return None
        ops, given, inputs = _ops(), iter(xs), []
        for spec in f["constants"]:
            if spec is None:
                inputs.append(next(given, None))
            else:
                inputs.append(ops.constant(np.asarray(spec[1], spec[0])).output(0))
        if any(i is None for i in inputs):
            return None
        made = NodeFactory("opset13").create(f["op"], inputs, f["attributes"])
        return self._after(made.output(0), f)

    def _after(self, y: Any, f: Mapping[str, Any]) -> Any:
        ops = _ops()
        act = f.get("act")
        if act == "clamp":
            y = ops.clamp(y, 0.0, 6.0).output(0)
        elif act == "gelu":
            y = ops.gelu(y, "erf").output(0)
        elif act in ("hswish", "hsigmoid", "relu", "sigmoid", "tanh", "swish"):
            y = getattr(ops, act)(y).output(0)
        return self._grid(y) if f["out"] in INTEGER else y

    def _ends(self, xs: Sequence[Any], unit: Any, wanted: bool, kind: str) -> None:
        made = unit() if wanted else None
        if made is None:
            self.results += [_end(x) for x in xs]
        elif self.plain or kind in ("reorder", "mean"):
            self.results.append(made)
        else:  # as many ends as without the unit, so that they cancel
            self.results += [_end(made, k) for k in range(len(xs))]

    def _rows(self, shape: Sequence[int], precision: str) -> Any:
        x = self._parameter(shape)
        x = x if self.plain else _ops().relu(x).output(0)
        return self._grid(x) if precision in INTEGER else x

    def _parameter(self, shape: Sequence[int]) -> Any:
        made = _ops().parameter(list(shape), np.float32)
        self.parameters.append(made)
        return made.output(0)

    def _grid(self, x: Any) -> Any:
        low, high = (_ops().constant(np.float32(v)) for v in (0.0, 2.55))
        return _ops().fake_quantize(x, low, high, low, high, 256).output(0)

    def _weight_grid(self, weight: Any, dims: int) -> Any:
        shape = [int(d) for d in weight.get_shape()]
        outer = 2 if dims == 5 else 1  # groups and filters, or filters
        kept = shape[:outer] + [1] * (dims - outer)
        high = _ops().constant(self.rng.uniform(0.3, 0.5, kept).astype(np.float32))
        low = _ops().constant(-np.asarray(high.get_data()))
        return _ops().fake_quantize(weight, low, high, low, high, 255).output(0)


def _end(x: Any, k: int = 0) -> Any:
    """One pixel of a tensor; ends of one tensor differ in k, else OpenVINO would join them."""
    shape = [int(d) for d in x.get_shape()]
    if len(shape) != 4:
        return x
    stride = [n + k for n in shape[2:]]
    return _ops().max_pool(x, stride, [1, 1], [0, 0], [0, 0], [1, 1]).output(0)


def _ops() -> Any:
    from openvino import opset13

    return opset13
