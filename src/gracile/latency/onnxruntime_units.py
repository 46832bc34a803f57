"""The units of a network in ONNX Runtime, and small networks that hold one of them.

ONNX Runtime writes out the program it executes: fused operators, blocked layouts, the reorders in
between. A node of it is a unit. The optimized form is a valid model itself, so a node can be put
alone, at any width, into a model that is run without further optimization.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gracile.benchmark.runtimes.onnxruntime import OnnxRuntime
from gracile.latency.unit import Unit

FREE = ("Reshape", "Flatten", "Identity", "Squeeze", "Unsqueeze")  # a copy of a few numbers
# Operator -> which input holds the weights.
CONVS = {"Conv": 1, "FusedConv": 1, "QLinearConv": 3}
LINEARS = {"Gemm": 1, "FusedGemm": 1, "MatMul": 1, "QGemm": 3}
LITERAL = 64  # so many values of a constant are part of a unit
DOMAINS = {"": 21, "com.microsoft": 1, "com.microsoft.nchwc": 1}
Spec = dict[str, Any]


def units_of(loaded: OnnxRuntime) -> list[tuple[str, Unit]]:
    """(name, unit) of every step, in execution order; steps that cost nothing are left out."""
    graph, values = loaded.program()
    constants = _constants(graph)
    out = []
    for node in graph.node:
        if node.op_type in FREE or node.op_type == "Constant":
            continue
        if all(not name or name in constants for name in node.input):
            continue
        out.append((node.name or node.output[0], _unit(node, values, constants)))
    return out


def small_network(unit: Unit, copies: int) -> Any:
    """An ``onnx.ModelProto`` that computes a unit so many times, on weights of its own each time.

    All copies read the same inputs, and the output of the first is that of the model.
    """
    from onnx import helper, numpy_helper

    facts, rng = unit.detail, np.random.default_rng(0)
    inputs: list[Any] = []
    tensors: list[Any] = []
    nodes = []
    for k in range(copies):
        names = []
        for n, spec in enumerate(facts["inputs"]):
            if not spec:
                names.append("")
            elif "shape" in spec and not spec.get("constant"):
                names.append(f"x{n}")
                if k == 0:
                    kind = helper.np_dtype_to_tensor_dtype(np.dtype(spec["dtype"]))
                    shape = unit.dims(spec["shape"])
                    inputs.append(helper.make_tensor_value_info(f"x{n}", kind, shape))
            else:
                names.append(f"w{n}.{k}")
                tensors.append(numpy_helper.from_array(_constant(spec, unit, rng), names[-1]))
        outputs = [f"y{k}.{j}" for j in range(facts["outputs"])]
        node = helper.make_node(facts["op"], names, outputs, f"n{k}", domain=facts["domain"])
        for name, value in facts["attributes"].items():
            value = unit.dims([value])[0] if value == "c" else value
            node.attribute.append(helper.make_attribute(name, value))
        nodes.append(node)
    results = [helper.make_empty_tensor_value_info(o) for o in nodes[0].output[:1]]
    graph = helper.make_graph(nodes, "unit", inputs, results, tensors)
    opsets = [helper.make_opsetid(domain, version) for domain, version in DOMAINS.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _constants(graph: Any) -> dict[str, np.ndarray[Any, Any]]:
    from onnx import numpy_helper

    found = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def _unit(node: Any, values: Mapping[str, Any], constants: Mapping[str, Any]) -> Unit:
    from onnx import helper

    attributes = {a.name: _plain(helper.get_attribute_value(a)) for a in node.attribute}
    specs: list[Spec] = []
    for name in node.input:
        if not name:
            specs.append({})
        elif name in constants:
            specs.append(_constant_spec(constants[name]))
        else:
            dtype, shape = values[name]
            specs.append({"dtype": str(dtype), "shape": list(shape)})
    facts: dict[str, Any] = {
        "op": node.op_type,
        "domain": node.domain,
        "attributes": attributes,
        "inputs": specs,
        "outputs": len(node.output),
        "precision": _precision(specs),
    }
    kind, widths = _name_widths(node, facts)
    return Unit.of(kind, widths, facts)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return list(value) if isinstance(value, (list, tuple)) else value


def _constant_spec(value: np.ndarray[Any, Any]) -> Spec:
    if value.dtype == np.int64 and value.size <= LITERAL:
        return {"constant": True, "dtype": str(value.dtype), "values": value.tolist()}
    return {"constant": True, "dtype": str(value.dtype), "shape": list(value.shape)}


def _constant(spec: Spec, unit: Unit, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    dtype = np.dtype(spec["dtype"])
    if "values" in spec:
        return np.asarray(spec["values"], dtype)
    shape = unit.dims(spec["shape"])
    if np.issubdtype(dtype, np.floating):
        small = rng.uniform(0.01, 0.1, shape) if len(shape) < 2 else rng.normal(0, 0.1, shape)
        return np.asarray(small, dtype)
    if len(shape) < 2:  # zero points and biases
        return np.zeros(shape, dtype)
    low, high = (0, 255) if dtype == np.uint8 else (-64, 64)
    return np.asarray(rng.integers(low, high, shape), dtype)


def _precision(specs: list[Spec]) -> str:
    reads = [s["dtype"] for s in specs if s and not s.get("constant")]
    return "int8" if reads and reads[0] in ("uint8", "int8") else "f32"


def _name_widths(node: Any, facts: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
    """The kind of a unit and its widths; their places in the shapes become names."""
    op, specs, attributes = node.op_type, facts["inputs"], facts["attributes"]
    place = f"{node.domain.rpartition('.')[2]}." if node.domain.endswith("nchwc") else ""
    if op in CONVS and len(specs[0].get("shape", ())) == 4:
        return _of_conv(f"{place}{op}", specs, attributes, CONVS[op])
    if op in LINEARS and len(specs[0].get("shape", ())) == 2 and "shape" in specs[LINEARS[op]]:
        return _of_linear(op, specs, attributes, LINEARS[op])
    return _of_others(f"{place}{op}", specs, attributes)


def _of_conv(
    kind: str, specs: list[Spec], attributes: dict[str, Any], at: int
) -> tuple[str, tuple[int, ...]]:
    x, w = specs[0]["shape"], specs[at]["shape"]
    axis = 3 if attributes.get("channels_last") else 1
    i, o, groups = x[axis], w[0], attributes.get("group", 1)
    one = groups > 1
    if (one and (groups, w[1], o) != (i, 1, i)) or (not one and w[1] != i):
        return kind, ()
    name_i, name_o = ("c", "c") if one else ("i", "o")
    x[axis] = name_i
    w[0] = name_o
    if one:
        attributes["group"] = "c"
    else:
        w[1] = name_i
    for n, spec in enumerate(specs):
        if n in (0, at) or not spec or "shape" not in spec:
            continue
        spec["shape"] = _replaced(spec["shape"], o, name_o, axis)
    return (f"{kind} depthwise", (i,)) if one else (kind, (i, o))


def _of_linear(
    kind: str, specs: list[Spec], attributes: dict[str, Any], at: int
) -> tuple[str, tuple[int, ...]]:
    w = specs[at]["shape"]
    o_first = bool(attributes.get("transB", 0))
    o, i = (w[0], w[1]) if o_first else (w[1], w[0])
    w[:] = ["o", "i"] if o_first else ["i", "o"]
    specs[0]["shape"][1] = "i"
    for n, spec in enumerate(specs):
        if n not in (0, at) and spec and spec.get("shape") in ([o], [1, o]):
            spec["shape"][-1] = "o"
    return kind, (i, o)


def _of_others(
    kind: str, specs: list[Spec], attributes: dict[str, Any]
) -> tuple[str, tuple[int, ...]]:
    """Operators that treat all channels alike: one width, if every input has it."""
    last = attributes.get("channels_last", 0) or "NhwcFusion" in kind
    reads = [s for s in specs if s and not s.get("constant")]
    shapes = [s["shape"] for s in reads]
    literal = any("values" in s for s in specs)
    if not shapes or literal or any(len(s) != 4 for s in shapes) or "perm" in attributes:
        return kind, ()
    axis = 3 if last else 1
    c = shapes[0][axis]
    if any(s[axis] != c for s in shapes) or "channels" in attributes:
        return kind, ()
    for s in shapes:
        s[axis] = "c"
    return kind, (c,)


def _replaced(shape: list[Any], size: int, name: str, axis: int) -> list[Any]:
    if len(shape) == 4:
        return [name if k == axis and d == size else d for k, d in enumerate(shape)]
    return [name if d == size else d for d in shape]
