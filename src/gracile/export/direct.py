"""Write a prepared model as ONNX node by node, where all its operators are plain ones.

torch's own exporter traces the network twice more and takes seconds; what a search exports by the
hundred should take none. Everything is read from the traced module: an operator is what its OpRule
says it is, shapes come from two batch sizes on the meta device, so that a dimension that depends
on the batch is known as one. What is not in the table below goes to torch's exporter.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from gracile.export.plain import (
    Dims,
    NotPlain,
    check_dropout_is_off,
    check_in_place,
    check_running_statistics,
    constant_padding,
    dims_of,
    each,
    part_lengths,
    read_call,
    returned,
    slices,
    stored,
    window,
)
from gracile.export.prepare import BIAS, WEIGHT, MarkedLayer, Prepared
from gracile.graph.normalize import Call
from gracile.graph.oprule import COMPUTED
from gracile.graph.ops.shape import permuted_dims

DOMAIN = "gracile"  # of marks
IR_VERSION = 10
FLOAT = 1  # TensorProto.FLOAT
INPUTS = {torch.float32: "FLOAT", torch.int64: "INT64"}


def to_proto(prepared: Prepared, example: Sequence[Tensor], opset: int) -> Any:
    """The model with its marks, as an ``onnx.ModelProto`` with a free batch size.

    Raises:
        NotPlain: with the operator.
    """
    from onnx import TensorProto, helper

    if any(x.dtype not in INPUTS for x in example):
        raise NotPlain("an input that is neither float32 nor int64")
    kinds = iter(INPUTS[x.dtype] for x in example)
    writer = Writer(prepared.module, dims_of(prepared.module, example))
    inputs = []
    names = iter(name for name, _ in prepared.inputs)
    for node in prepared.module.graph.nodes:
        if node.op == "placeholder":
            name = next(names)
            writer.names[node] = name
            inputs.append(_info(name, writer.dims[node], next(kinds)))
        elif node.op == "output":
            results = returned(node)
        else:
            writer.names[node] = writer.write(node)
    if len({writer.name(r) for r in results}) < len(results):
        raise NotPlain("one tensor is returned twice")
    graph = helper.make_graph(
        writer.nodes,
        "model",
        inputs,
        [_info(writer.name(r), writer.dims[r]) for r in results],
        list(writer.tensors.values()),
        value_info=[
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [_size(d) for d in dims])
            for name, dims in writer.known.items()
        ],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


class Writer:
    """The ONNX nodes of a traced module, as far as they are written.

    Attributes:
        names: fx node -> its tensor; a list where it makes several.
        dims: fx node -> the dims of its output; None where it is not one tensor.
        known: tensor -> its dims.
    """

    def __init__(self, module: fx.GraphModule, dims: Mapping[fx.Node, Dims | None]):
        self.module, self.dims = module, dims
        self.names: dict[fx.Node, Any] = {}
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}
        self.known: dict[str, Dims] = {}

    def write(self, node: fx.Node) -> Any:
        """Write one fx node; what its output is called."""
        if node.op == "get_attr":
            return self.tensor(str(node.target), stored(self.module, str(node.target)))
        call = read_call(self.module, node)
        if call.op == "size":  # a number; whoever needs it reads the shape of his own output
            return None
        emit, known = EMIT.get(call.op), (*SHAPES, *(call.rule.roles if call.rule else ()))
        if emit is None or any(v == COMPUTED for k, v in call.attrs.items() if k not in known):
            raise NotPlain(f"'{call.name}'")
        if call.attrs.keys() & OTHER_NAMES:
            raise NotPlain(f"'{call.name}' with NumPy's names of its arguments")
        check_in_place(node, call)
        before = len(self.nodes)
        made = emit(self, node, call)
        dims = self.dims.get(node)
        if isinstance(made, str) and dims is not None and len(self.nodes) > before:
            self.known[made] = dims
        return made

    def name(self, node: fx.Node) -> str:
        """The tensor of an fx node."""
        name = self.names[node]
        if not isinstance(name, str):
            raise NotPlain(f"'{node}' is not one tensor")
        return name

    def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """One ONNX node; the name of its output."""
        return self.several(op, inputs, 1, **attributes)[0]

    def several(self, op: str, inputs: Sequence[str], n: int, **attributes: Any) -> list[str]:
        """One ONNX node with n outputs; their names."""
        from onnx import helper

        names = [f"{op.lower()}{len(self.nodes)}.{k}" for k in range(n)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names

    def mark(self, name: str, x: str) -> str:
        """A `Mark` operator."""
        from onnx import helper

        made = self.add("Mark", [x], domain=DOMAIN)
        self.nodes[-1].attribute.append(helper.make_attribute("name", name))
        return made

    def tensor(self, name: str, value: Tensor | np.ndarray[Any, Any]) -> str:
        """A stored tensor, once under each name."""
        from onnx import numpy_helper

        if name not in self.tensors:
            if isinstance(value, Tensor):
                if value.dtype != torch.float32:
                    raise NotPlain(f"'{name}' of type {value.dtype}")
                value = value.detach().cpu().numpy()
            self.tensors[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def numbers(self, values: Sequence[int]) -> str:
        """Stored int64 values."""
        return self.tensor(f"const{len(self.tensors)}", np.asarray(values, np.int64))

    def scalar(self, value: float) -> str:
        """A stored float32 number."""
        return self.tensor(f"const{len(self.tensors)}", np.asarray(value, np.float32))


# ------------------------------------------------------------------ operators

Emit = Callable[[Writer, fx.Node, Call], Any]
SHAPES = ("shape", "unflattened_size", "sizes")  # read from the output, not from the call
OTHER_NAMES = {"axis", "axes", "keepdims", "out"}  # that torch takes as well


def _mark(w: Writer, node: fx.Node, call: Call) -> str:
    return w.mark(call.attrs["name"], w.name(node.all_input_nodes[0]))


def _same(w: Writer, node: fx.Node, call: Call) -> str:
    return w.name(call.args[0])


def _dropout(w: Writer, node: fx.Node, call: Call) -> str:
    check_dropout_is_off(w.module, node, call)
    return w.name(call.args[0])


def _plain(op: str, **attributes: Any) -> Emit:
    def emit(w: Writer, node: fx.Node, call: Call) -> Any:
        return w.add(op, [w.name(a) for a in call.args], **attributes)

    return emit


def _with(op: str, **names: tuple[str, Any]) -> Emit:
    """ONNX attribute = (torch argument, its default)."""

    def emit(w: Writer, node: fx.Node, call: Call) -> Any:
        values = {k: call.attrs.get(arg) for k, (arg, _) in names.items()}
        filled = {k: names[k][1] if v is None else v for k, v in values.items()}
        return w.add(op, [w.name(a) for a in call.args], **filled)

    return emit


def _clip(low: tuple[str, float | None], high: tuple[str, float | None]) -> Emit:
    def emit(w: Writer, node: fx.Node, call: Call) -> Any:
        ends = [call.attrs.get(name, default) for name, default in (low, high)]
        given = ["" if e is None else w.scalar(float(e)) for e in ends]
        return w.add("Clip", [w.name(call.args[0]), *given])

    return emit


def _silu(w: Writer, node: fx.Node, call: Call) -> Any:
    x = w.name(call.args[0])
    return w.add("Mul", [x, w.add("Sigmoid", [x])])


def _binary(op: str) -> Emit:
    def emit(w: Writer, node: fx.Node, call: Call) -> Any:
        a = call.attrs
        if a.get("alpha") not in (None, 1) or a.get("rounding_mode") or "rsub" in str(node.target):
            raise NotPlain(f"'{call.op}' with options")
        rest = iter(w.name(n) for n in call.args)
        operands = [
            w.scalar(float(a[side])) if isinstance(a.get(side), (int, float)) else next(rest)
            for side in ("input", "other")
        ]
        return w.add(op, operands)

    return emit


def _operands(w: Writer, node: fx.Node, call: Call) -> tuple[str, str, str | None]:
    """Input, weight and bias of a layer; marked ones where the layer is marked."""
    names = [w.name(a) for a in call.args]
    if node.op != "call_module":
        return names[0], names[1], names[2] if len(names) > 2 else None
    module = w.module.get_submodule(str(node.target))
    found = {r: w.tensor(a, stored(w.module, a)) for r, a in call.params.items()}
    if isinstance(module, MarkedLayer):
        found["weight"] = w.mark(WEIGHT + module.address, found["weight"])
        if "bias" in found:
            found["bias"] = w.mark(BIAS + module.address, found["bias"])
    return names[0], found["weight"], found.get("bias")


def _convolution(op: str) -> Emit:
    def emit(w: Writer, node: fx.Node, call: Call) -> Any:
        x, weight, bias = _operands(w, node, call)
        a, spatial = call.attrs, len(w.dims[call.args[0]] or ()) - 2
        if a["padding_mode"] != "zeros" or isinstance(a["padding"], str) or spatial < 1:
            raise NotPlain(f"'{call.op}' with padding {a['padding']}, {a['padding_mode']}")
        padding = each(a["padding"], spatial)
        extra = (
            {"output_padding": each(a["output_padding"], spatial)} if "output_padding" in a else {}
        )
        return w.add(
            op,
            [x, weight] if bias is None else [x, weight, bias],
            strides=each(a["stride"], spatial),
            pads=[*padding, *padding],
            dilations=each(a["dilation"], spatial),
            group=int(a["groups"]),
            **extra,
        )

    return emit


def _linear(w: Writer, node: fx.Node, call: Call) -> Any:
    x, weight, bias = _operands(w, node, call)
    if len(w.dims[call.args[0]] or ()) == 2:
        return w.add("Gemm", [x, weight] if bias is None else [x, weight, bias], transB=1)
    product = w.add("MatMul", [x, w.add("Transpose", [weight], perm=[1, 0])])
    return product if bias is None else w.add("Add", [product, bias])


def _embedding(w: Writer, node: fx.Node, call: Call) -> Any:
    """Rows of a table; indices are int64 where they are inputs, and nothing else makes them."""
    if node.op != "call_module" or call.args[0].op != "placeholder":
        raise NotPlain("a look-up of numbers that are no input")
    module: Any = w.module.get_submodule(str(node.target))
    table = module.layer if isinstance(module, MarkedLayer) else module
    if table.max_norm is not None:
        raise NotPlain("an embedding that scales its rows")
    x, weight, _ = _operands(w, node, call)
    return w.add("Gather", [weight, x], axis=0)


def _batch_norm(w: Writer, node: fx.Node, call: Call) -> Any:
    check_running_statistics(w.module, node, call)
    kept = {r: w.tensor(a, stored(w.module, a)) for r, a in call.params.items()}
    count = len(stored(w.module, call.params["running_mean"]))
    scale = kept.get("weight") or w.tensor(f"{node.target}.ones", np.ones(count, np.float32))
    shift = kept.get("bias") or w.tensor(f"{node.target}.zeros", np.zeros(count, np.float32))
    names = [w.name(call.args[0]), scale, shift, kept["running_mean"], kept["running_var"]]
    return w.add("BatchNormalization", names, epsilon=float(call.attrs["eps"]))


def _max_pool(w: Writer, node: fx.Node, call: Call) -> Any:
    if call.attrs.get("return_indices"):
        raise NotPlain("a pooling that returns its indices")
    spatial = len(w.dims[call.args[0]] or ()) - 2
    return w.add("MaxPool", [w.name(call.args[0])], **_window(call, spatial),
                 dilations=each(call.attrs["dilation"], spatial))  # fmt: skip


def _avg_pool(w: Writer, node: fx.Node, call: Call) -> Any:
    if call.attrs.get("divisor_override"):
        raise NotPlain("a pooling with a divisor of its own")
    counted = int(bool(call.attrs.get("count_include_pad", True)))
    spatial = len(w.dims[call.args[0]] or ()) - 2
    return w.add("AveragePool", [w.name(call.args[0])], **_window(call, spatial),
                 count_include_pad=counted)  # fmt: skip


def _window(call: Call, spatial: int) -> dict[str, Any]:
    kernel, stride, padding = window(call, spatial)
    return {"kernel_shape": kernel, "strides": stride, "pads": [*padding, *padding]}


def _adaptive_pool(w: Writer, node: fx.Node, call: Call) -> Any:
    """A global mean, or windows of one size that cover the image without a rest."""
    x, dims, out = w.name(call.args[0]), w.dims[call.args[0]], w.dims[node]
    if dims is None or out is None or None in dims[2:]:
        raise NotPlain("an adaptive pooling of an unknown size")
    if set(out[2:]) == {1}:
        return w.add("GlobalAveragePool", [x])
    pairs = [(d or 0, o or 1) for d, o in zip(dims[2:], out[2:], strict=True)]
    if any(d % o for d, o in pairs):
        raise NotPlain("an adaptive pooling by windows of several sizes")
    kernel = [d // o for d, o in pairs]
    if set(kernel) == {1}:
        return x
    return w.add("AveragePool", [x], kernel_shape=kernel, strides=kernel)


def _mean(w: Writer, node: fx.Node, call: Call) -> Any:
    dims, keep = call.attrs.get("dim"), call.attrs.get("keepdim")
    if dims is None or call.attrs.get("dtype") is not None:
        raise NotPlain("a mean over everything, or of another type")
    axes = [dims] if isinstance(dims, int) else list(dims)
    return w.add("ReduceMean", [w.name(call.args[0]), w.numbers(axes)], keepdims=int(bool(keep)))


def _reshape(w: Writer, node: fx.Node, call: Call) -> Any:
    """Whatever the call looks like: the output's shape says what it does."""
    dims, before = w.dims[node], w.dims[call.args[0]]
    if dims is None or before is None or sum(d is None for d in dims) > 1:
        raise NotPlain("a reshape with two dims that follow the batch")
    keeps = bool(dims) and bool(before) and dims[0] is None and before[0] is None
    rest = _product(dims) == _product(before)
    sizes = [
        (0 if k == 0 and keeps and rest else -1) if d is None else d for k, d in enumerate(dims)
    ]
    return w.add("Reshape", [w.name(call.args[0]), w.numbers(sizes)])


def _permute(w: Writer, node: fx.Node, call: Call) -> Any:
    order = permuted_dims(call.attrs, len(w.dims[call.args[0]] or ()))
    if order is None:
        raise NotPlain("a permutation that cannot be read")
    return w.add("Transpose", [w.name(call.args[0])], perm=order)


def _cat(w: Writer, node: fx.Node, call: Call) -> Any:
    return w.add("Concat", [w.name(a) for a in call.args], axis=int(call.attrs["dim"]))


def _parts(w: Writer, node: fx.Node, call: Call) -> Any:
    lengths = part_lengths(call, w.dims[call.args[0]])
    names = [w.name(call.args[0]), w.numbers(lengths)]
    return w.several("Split", names, len(lengths), axis=int(call.attrs["dim"]))


def _getitem(w: Writer, node: fx.Node, call: Call) -> Any:
    source, index = node.args[0], node.args[1]
    if not isinstance(source, fx.Node):
        raise NotPlain("an index into something else than a tensor")
    if isinstance(w.names[source], list):
        if not isinstance(index, int):
            raise NotPlain("a slice of a tuple")
        return w.names[source][index]
    if w.names[source] is None:
        return None  # of a size
    return _sliced(w, w.name(source), index)


def _sliced(w: Writer, x: str, index: Any) -> str:
    cuts = [
        (part.start or 0, 2**62 if part.stop is None else part.stop, axis, part.step or 1)
        for axis, part in slices(index)
    ]
    if not cuts:
        return x
    starts, stops, axes, steps = zip(*cuts, strict=True)
    return w.add("Slice", [x, *(w.numbers(v) for v in (starts, stops, axes, steps))])


def _pad(w: Writer, node: fx.Node, call: Call) -> Any:
    rank = len(w.dims[call.args[0]] or ())
    around, value = constant_padding(w.module, node, call)
    return w.add("Pad", [w.name(call.args[0]), *_padding(w, around, rank, value)])


def _padding(w: Writer, around: Sequence[int], rank: int, value: float = 0.0) -> list[str]:
    before, after = [0] * rank, [0] * rank
    for k in range(len(around) // 2):
        before[rank - 1 - k], after[rank - 1 - k] = around[2 * k], around[2 * k + 1]
    return [w.numbers([*before, *after]), *([w.scalar(value)] if value else [])]


def _channel_pad(w: Writer, node: fx.Node, call: Call) -> Any:
    m: Any = w.module.get_submodule(str(node.target))
    x = w.name(call.args[0])
    if m.stride > 1:
        every = slice(None, None, m.stride)
        x = _sliced(w, x, (slice(None), slice(None), every, every))
    if m.contiguous:
        return w.add("Pad", [x, *_padding(w, (0, 0, 0, 0, m.front, m.back), 4)])
    padded = w.add("Pad", [x, *_padding(w, (0, 0, 0, 0, 0, 1), 4)])
    w.known[padded] = (None, m.in_channels + 1, None, None)
    index = [i if i >= 0 else m.in_channels for i in m.source]
    return w.add("Gather", [padded, w.numbers(index)], axis=1)


def _step(w: Writer, node: fx.Node, call: Call) -> Any:
    m: Any = w.module.get_submodule(str(node.target))
    x, dims = w.name(call.args[0]), w.dims[node]
    if dims is None:
        raise NotPlain("a step of something that is no tensor")
    shape = [1] * len(dims)
    shape[m.dim] = -1
    level = w.tensor(f"const{len(w.tensors)}", m.level.reshape(shape))
    one = w.add("Cast", [w.add("Greater", [x, level])], to=FLOAT)
    return w.add("Mul", [one, w.scalar(float(m.scale))])


EMIT: Mapping[str, Emit] = {
    "mark": _mark,
    "identity": _same,
    "dropout": _dropout,
    "conv": _convolution("Conv"),
    "conv_transpose": _convolution("ConvTranspose"),
    "linear": _linear,
    "embedding": _embedding,
    "matmul": _plain("MatMul"),
    "batch_norm": _batch_norm,
    "relu": _plain("Relu"),
    "relu6": _clip(("", 0.0), ("", 6.0)),
    "hardtanh": _clip(("min_val", -1.0), ("max_val", 1.0)),
    "clamp": _clip(("min", None), ("max", None)),
    "sigmoid": _plain("Sigmoid"),
    "tanh": _plain("Tanh"),
    "hardsigmoid": _plain("HardSigmoid", alpha=1 / 6, beta=0.5),
    "hardswish": _plain("HardSwish"),
    "silu": _silu,
    "gelu": _with("Gelu", approximate=("approximate", "none")),
    "leaky_relu": _with("LeakyRelu", alpha=("negative_slope", 0.01)),
    "elu": _with("Elu", alpha=("alpha", 1.0)),
    "softmax": _with("Softmax", axis=("dim", -1)),
    "log_softmax": _with("LogSoftmax", axis=("dim", -1)),
    "add": _binary("Add"),
    "sub": _binary("Sub"),
    "mul": _binary("Mul"),
    "div": _binary("Div"),
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": _adaptive_pool,
    "mean": _mean,
    "flatten": _reshape,
    "reshape": _reshape,
    "squeeze": _reshape,
    "unsqueeze": _reshape,
    "permute": _permute,
    "cat": _cat,
    "chunk": _parts,
    "split": _parts,
    "getitem": _getitem,
    "pad": _pad,
    "channel_pad": _channel_pad,
    "step": _step,
}


# ------------------------------------------------------------------ inside


def _product(dims: Dims) -> int:
    known = 1
    for d in dims:
        known *= 1 if d is None else d
    return known


def _info(name: str, dims: Dims | None, kind: str = "FLOAT") -> Any:
    from onnx import TensorProto, helper

    if dims is None:
        raise NotPlain(f"'{name}' is no tensor")
    return helper.make_tensor_value_info(name, getattr(TensorProto, kind), [_size(d) for d in dims])


def _size(dim: int | None) -> int | str:
    return "batch" if dim is None else dim
