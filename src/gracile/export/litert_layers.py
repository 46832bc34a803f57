"""How each operator is written for LiteRT, whose tensors of four dims have their channels last.

Shapes and axes in the names here are PyTorch's, with the batch, unless "file" is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from gracile.benchmark.tflite import IMAGE
from gracile.export.litert_steps import Value, Weight
from gracile.export.plain import (
    NotPlain,
    check_dropout_is_off,
    check_rows_of_a_line,
    check_running_statistics,
    constant_padding,
    each,
    image_window,
    layer_operands,
    part_lengths,
    read_call,
    slices,
    stored,
)
from gracile.graph.normalize import Call
from gracile.graph.ops.shape import permuted_dims

if TYPE_CHECKING:
    from gracile.export.litert import Writer

Emit = Callable[["Writer", fx.Node, Call], Any]
SAME, VALID = 0, 1
LOWEST = -3.4e38  # below what is compared in a maximum
TO_FILE = (0, 3, 1, 2)  # axis of an image in PyTorch -> its axis in the file
OPERATIONS = {"add": "ADD", "sub": "SUB", "mul": "MUL", "div": "DIV"}


def _same(w: Writer, node: fx.Node, call: Call) -> Value:
    return w.raw(call.args[0])


def _dropout(w: Writer, node: fx.Node, call: Call) -> Value:
    check_dropout_is_off(w.module, node, call)
    return w.raw(call.args[0])


def _plain(type: str) -> Emit:
    def emit(w: Writer, node: fx.Node, call: Call) -> Value:
        w.shape(node)
        x = w.float(call.args[0])
        return w.add(type, [x], x.shape)

    return emit


def _gelu(w: Writer, node: fx.Node, call: Call) -> Value:
    x = w.float(call.args[0])
    return w.add("GELU", [x], x.shape, approximate=call.attrs.get("approximate") == "tanh")


def _leaky_relu(w: Writer, node: fx.Node, call: Call) -> Value:
    slope, x = call.attrs.get("negative_slope"), w.float(call.args[0])
    return w.add("LEAKY_RELU", [x], x.shape, alpha=0.01 if slope is None else float(slope))


def _elu(w: Writer, node: fx.Node, call: Call) -> Value:
    if call.attrs.get("alpha") not in (None, 1, 1.0):
        raise NotPlain("'elu' with another alpha than 1")
    return _plain("ELU")(w, node, call)  # type: ignore[no-any-return]


def _silu(w: Writer, node: fx.Node, call: Call) -> Value:
    x = w.float(call.args[0])
    return w.add("MUL", [x, w.add("LOGISTIC", [x], x.shape)], x.shape)


def _hard_sigmoid(w: Writer, node: fx.Node, call: Call) -> Value:
    x = w.float(call.args[0])
    six = w.add("RELU6", [w.add("ADD", [x, w.constant([3.0])], x.shape)], x.shape)
    return w.add("MUL", [six, w.constant([1 / 6])], x.shape)


def _clip(low: tuple[str, float | None], high: tuple[str, float | None]) -> Emit:
    def emit(w: Writer, node: fx.Node, call: Call) -> Value:
        x = w.float(call.args[0])
        for type, (name, default) in (("MAXIMUM", low), ("MINIMUM", high)):
            end = call.attrs.get(name, default)
            if end is not None:
                x = w.add(type, [x, w.constant([float(end)])], x.shape)
        return x

    return emit


def _softmax(type: str, **options: Any) -> Emit:
    def emit(w: Writer, node: fx.Node, call: Call) -> Value:
        dims = len(w.shape(node)) + 1
        axis = _axis(call.attrs.get("dim"), dims)
        x, last = w.float(call.args[0]), dims - 1
        at = TO_FILE[axis] if dims == IMAGE else axis
        order = [*(k for k in range(dims) if k != at), at]  # it runs along the last axis
        back = [order.index(k) for k in range(dims)]
        x = w.transposed(x, order) if at != last else x
        x = w.add(type, [x], x.shape, **options)
        return w.transposed(x, back) if at != last else x

    return emit


def _binary(w: Writer, node: fx.Node, call: Call) -> Value:
    a = call.attrs
    if a.get("alpha") not in (None, 1) or a.get("rounding_mode") or "rsub" in str(node.target):
        raise NotPlain(f"'{call.op}' with options")
    type, out = OPERATIONS[call.op], _file_shape((1, *w.shape(node)))
    number = next((s for s in ("input", "other") if isinstance(a.get(s), (int, float))), None)
    if number is not None:
        operands = [w.float(call.args[0]), w.constant([float(a[number])])]
        return w.add(type, operands[::-1] if number == "input" else operands, out)
    operands = [_operand(w, arg, len(out)) for arg in call.args]
    if len(operands) != 2:
        raise NotPlain(f"'{call.op}' of something that is no tensor")
    return w.add(type, operands, out)


def _operand(w: Writer, node: fx.Node, dims: int) -> Value:
    """An operand of as many dims as the result; a stored one is spread over the batch."""
    if node.op != "get_attr":
        if len(w.shape(node)) != dims - 1:
            raise NotPlain("an addition or product of tensors with different numbers of axes")
        return w.float(node)
    value = stored(w.module, str(node.target)).detach().cpu().float()
    if value.ndim > dims or (value.ndim == dims and value.shape[0] != 1):
        raise NotPlain(f"'{node.target}', a stored tensor with a batch")
    value = value.reshape([1] * (dims - value.ndim) + list(value.shape))
    return w.constant((value.permute(0, 2, 3, 1) if dims == IMAGE else value).numpy())


def _matmul(w: Writer, node: fx.Node, call: Call) -> Value:
    if any(a.op == "get_attr" or len(w.shape(a)) < 2 for a in call.args):
        raise NotPlain("a product of other things than matrices of each sample")
    operands = [w.plain(w.float(a)) for a in call.args]
    return w.image(w.add("BATCH_MATMUL", operands, (1, *w.shape(node))))


def _convolution(w: Writer, node: fx.Node, call: Call) -> Value:
    source, weight, bias, address = layer_operands(w.prepared, node, call)
    a, into = call.attrs, w.shape(source)
    spatial, given = len(into) - 1, call.attrs["padding"]
    if spatial != 2 or a["padding_mode"] != "zeros":
        raise NotPlain(f"'{call.op}' of {spatial} dims with padding {given}, {a['padding_mode']}")
    dilation, stride = each(a["dilation"], 2), each(a["stride"], 2)
    kernel = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if isinstance(given, str):
        before = [(k - 1) // 2 if given == "same" else 0 for k in kernel]
        after = [k - 1 - b if given == "same" else 0 for k, b in zip(kernel, before, strict=True)]
    else:
        before = after = each(given, 2)
    groups, out = int(a["groups"]), (1, *w.shape(node)[1:], weight.shape[0])
    x, padding = _window(w, w.float(source), kernel, stride, before, after, out, 0.0)
    options: dict[str, Any] = {
        "padding": padding, "strideH": stride[0], "strideW": stride[1],
        "dilationHFactor": dilation[0], "dilationWFactor": dilation[1],
    }  # fmt: skip
    depthwise = groups > 1 and groups == into[0]
    if depthwise:
        options["depthMultiplier"] = weight.shape[0] // groups
    return _layer(
        w, "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", [x], weight, bias, address,
        (lambda t: t.permute(1, 2, 3, 0)) if depthwise else (lambda t: t.permute(0, 2, 3, 1)),
        3 if depthwise else 0, out, options,
    )  # fmt: skip


def _linear(w: Writer, node: fx.Node, call: Call) -> Value:
    source, weight, bias, address = layer_operands(w.prepared, node, call)
    x, out = w.plain(w.float(source)), (1, *w.shape(node))
    made = _layer(
        w, "FULLY_CONNECTED", [x], weight, bias, address, lambda t: t, 0, out,
        {"keepNumDims": len(out) > 2},
    )  # fmt: skip
    return w.image(made)


def _layer(
    w: Writer,
    type: str,
    inputs: Sequence[Value],
    weight: Tensor,
    bias: Tensor | None,
    address: str,
    arranged: Callable[[Tensor], Tensor],
    axis: int,
    out: Sequence[int],
    options: Mapping[str, Any],
) -> Value:
    """A layer in floats, and what it takes to make it one of integers."""
    numbers = torch.zeros(weight.shape[0]) if bias is None else bias
    operands = [
        *inputs,
        w.constant(arranged(weight).contiguous().numpy()),
        w.constant(numbers.numpy()),
    ]
    made = w.add(type, operands, out, **options)
    grid = w.prepared.weights.get(address)
    if grid is not None:
        w.steps[-1].weight = Weight(address, grid, arranged, axis, numbers.numpy())
    return made


def _window(
    w: Writer,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    out: Sequence[int],
    fill: float,
    *,
    only_same: bool = False,
) -> tuple[Value, int]:
    """What windows are laid over, and which of LiteRT's two paddings does that.

    Its SAME pads as little as it can, more behind than before; where that is not what is asked
    for, the padding is an operator of its own.
    """
    if not any((*before, *after)):
        return x, VALID
    same = True
    for k in (0, 1):
        n = x.shape[1 + k]
        total = max((-(-n // stride[k]) - 1) * stride[k] + kernel[k] - n, 0)
        same &= -(-n // stride[k]) == out[1 + k] and total // 2 == before[k]
    if same:
        return x, SAME
    if only_same:
        raise NotPlain("an average that leaves out such a padding")
    around = ((0, 0), (before[0], after[0]), (before[1], after[1]), (0, 0))
    return _padded(w, x, around, fill), VALID


def _padded(w: Writer, x: Value, around: Sequence[tuple[int, int]], fill: float = 0.0) -> Value:
    """Padding in the file's order."""
    sizes = w.constant(around, np.int32)
    shape = [n + sum(p) for n, p in zip(x.shape, around, strict=True)]
    if fill == 0:
        return w.add("PAD", [x, sizes], shape)
    return w.add("PADV2", [x, sizes, w.constant([fill])], shape)


def _batch_norm(w: Writer, node: fx.Node, call: Call) -> Value:
    check_running_statistics(w.module, node, call)
    found = {r: stored(w.module, a).detach().cpu().double() for r, a in call.params.items()}
    mean, variance = found["running_mean"], found["running_var"]
    factor = found.get("weight", torch.ones_like(mean)) / (variance + call.attrs["eps"]).sqrt()
    shift = found.get("bias", torch.zeros_like(mean)) - mean * factor
    x = w.float(call.args[0])
    sizes = [1, -1, 1] if len(x.shape) == 3 else [1] * (len(x.shape) - 1) + [-1]
    x = w.add("MUL", [x, w.constant(factor.reshape(sizes).numpy())], x.shape)
    return w.add("ADD", [x, w.constant(shift.reshape(sizes).numpy())], x.shape)


def _embedding(w: Writer, node: fx.Node, call: Call) -> Value:
    check_rows_of_a_line(w.module, w.dims, node, call)
    _, weight, _, address = layer_operands(w.prepared, node, call)
    if address in w.prepared.weights:
        w.floats[address] = "rows are looked up in floats"
    inputs = [w.constant(weight.numpy()), w.raw(call.args[0])]
    return w.add("GATHER", inputs, (1, *w.shape(node)), axis=0)


def _pool(type: str) -> Emit:
    def emit(w: Writer, node: fx.Node, call: Call) -> Value:
        kernel, stride, around = image_window(call, len(w.shape(node)) - 1)
        out, x = _file_shape((1, *w.shape(node))), w.float(call.args[0])
        mean = type == "AVERAGE_POOL_2D"
        if mean and any(around) and call.attrs.get("count_include_pad", True):
            pads = ((0, 0), (around[0], around[0]), (around[1], around[1]), (0, 0))
            x, padding = _padded(w, x, pads), VALID
        else:
            fill = 0.0 if _never_negative(w, call.args[0]) else LOWEST
            x, padding = _window(w, x, kernel, stride, around, around, out, fill, only_same=mean)
        return w.add(
            type, [x], out, padding=padding, strideH=stride[0], strideW=stride[1],
            filterHeight=kernel[0], filterWidth=kernel[1],
        )  # fmt: skip

    return emit


def _never_negative(w: Writer, node: fx.Node) -> bool:
    """Whether a tensor is what a relu makes, so that 0 is as low as anything."""
    call = read_call(w.module, node)
    while call.op in ("mark", "identity", "max_pool"):
        node = node.all_input_nodes[0]
        call = read_call(w.module, node)
    return call.op in ("relu", "relu6", "sigmoid")


def _adaptive_pool(w: Writer, node: fx.Node, call: Call) -> Value:
    into, out = w.shape(call.args[0]), w.shape(node)
    if len(out) != 3:
        raise NotPlain(f"'{call.op}' of other things than images")
    x, shape = w.float(call.args[0]), _file_shape((1, *out))
    if out[1:] == (1, 1):
        return w.add("MEAN", [x, w.constant((1, 2), np.int32)], shape, keepDims=True)
    if into[1] % out[1] or into[2] % out[2]:
        raise NotPlain(f"'{call.op}' to a size that does not divide what is pooled")
    h, width = into[1] // out[1], into[2] // out[2]
    return w.add(
        "AVERAGE_POOL_2D", [x], shape, padding=VALID, strideH=h, strideW=width, filterHeight=h,
        filterWidth=width,
    )  # fmt: skip


def _mean(w: Writer, node: fx.Node, call: Call) -> Value:
    given, dims = call.attrs.get("dim"), len(w.shape(call.args[0])) + 1
    if given is None or call.attrs.get("dtype") is not None:
        raise NotPlain("a mean over everything, or of another type")
    axes = sorted(_axis(d, dims) for d in ([given] if isinstance(given, int) else given))
    x, out = w.float(call.args[0]), (1, *w.shape(node))
    keep = len(out) == dims
    if keep or (dims == IMAGE and axes in ([1], [2, 3], [1, 2, 3])):
        at = sorted(TO_FILE[d] for d in axes) if dims == IMAGE else axes
        shape = _file_shape(out) if keep else out
        return w.add("MEAN", [x, w.constant(at, np.int32)], shape, keepDims=keep)
    return w.add("MEAN", [w.plain(x), w.constant(axes, np.int32)], out, keepDims=False)


def _reshape(w: Writer, node: fx.Node, call: Call) -> Value:
    into, out = w.shape(call.args[0]), w.shape(node)
    if prod(into) != prod(out):
        raise NotPlain("a reshape that mixes the samples of a batch")
    x = w.float(call.args[0])
    if into == out:
        return x
    shape = (1, *out)
    if not _one_order(into):
        x = w.plain(x)
    if _one_order(out):
        return w.reshaped(x, _file_shape(shape))
    return w.image(w.reshaped(x, shape))


def _one_order(sizes: Sequence[int]) -> bool:
    """Whether numbers lie alike in both orders."""
    return len(sizes) != 3 or sizes[0] == 1 or sizes[1] * sizes[2] == 1


def _permute(w: Writer, node: fx.Node, call: Call) -> Value:
    dims = len(w.shape(call.args[0])) + 1
    order = permuted_dims(call.attrs, dims)
    if order is None or order[0] != 0:
        raise NotPlain("a permutation that cannot be read, or that moves the batch")
    x = w.float(call.args[0])
    if dims == IMAGE:
        order = [TO_FILE[order[d]] for d in (0, 2, 3, 1)]
    return w.transposed(x, list(order))


def _cat(w: Writer, node: fx.Node, call: Call) -> Value:
    shape = (1, *w.shape(node))
    axis = _axis(call.attrs["dim"], len(shape))
    operands = [_operand(w, a, len(shape)) for a in call.args]
    at = TO_FILE[axis] if len(shape) == IMAGE else axis
    return w.add("CONCATENATION", operands, _file_shape(shape), axis=at)


def _parts(w: Writer, node: fx.Node, call: Call) -> list[Value]:
    lengths = part_lengths(call, w.dims[call.args[0]])
    sizes = (1, *w.shape(call.args[0]))
    axis, x, start, out = _axis(call.attrs["dim"], len(sizes)), w.float(call.args[0]), 0, []
    for n in lengths:
        out.append(_cut(w, x, sizes, {axis: (start, start + n, 1)}))
        start += n
    return out


def _getitem(w: Writer, node: fx.Node, call: Call) -> Any:
    source, index = node.args[0], node.args[1]
    if not isinstance(source, fx.Node):
        raise NotPlain("an index into something else than a tensor")
    made = w.names[source]
    if isinstance(made, list):
        if not isinstance(index, int):
            raise NotPlain("a slice of a tuple")
        return made[index]
    if made is None:
        return None
    sizes, parts = (1, *w.shape(source)), slices(index)
    if any(axis == 0 for axis, _ in parts):
        raise NotPlain("a slice of the batch")
    return _cut(w, w.float(source), sizes, {a: p.indices(sizes[a]) for a, p in parts})


def _cut(
    w: Writer, x: Value, sizes: Sequence[int], ranges: Mapping[int, tuple[int, int, int]]
) -> Value:
    """Slices along some axes; the others, and the batch, stay whole."""
    if any(r[2] < 1 for r in ranges.values()):
        raise NotPlain("a slice that runs backwards")
    every = [ranges.get(d, (0, n, 1)) for d, n in enumerate(sizes)]
    out = [len(range(*r)) for r in every]
    if out == list(sizes):
        return x
    if len(sizes) == IMAGE:
        every = [every[d] for d in (0, 2, 3, 1)]
    begin, end, step = (w.constant([r[k] for r in every], np.int32) for k in range(3))
    return w.add("STRIDED_SLICE", [x, begin, end, step], _file_shape(out), beginMask=1, endMask=1)


def _pad(w: Writer, node: fx.Node, call: Call) -> Value:
    around, value = constant_padding(w.module, node, call)
    x = w.float(call.args[0])
    dims = len(x.shape)
    if len(around) > 2 * (dims - 1):
        raise NotPlain("a padding of the batch")
    pads = [(0, 0)] * dims
    for k in range(len(around) // 2):
        axis = dims - 1 - k
        pads[TO_FILE[axis] if dims == IMAGE else axis] = (around[2 * k], around[2 * k + 1])
    return _padded(w, x, pads, value)


def _channel_pad(w: Writer, node: fx.Node, call: Call) -> Value:
    m: Any = w.module.get_submodule(str(node.target))
    x, sizes = w.float(call.args[0]), (1, *w.shape(call.args[0]))
    if len(sizes) != IMAGE:
        raise NotPlain("a padding of channels of other things than images")
    if m.stride > 1:
        x = _cut(w, x, sizes, {d: (0, sizes[d], m.stride) for d in (2, 3)})
    if m.contiguous:
        return _padded(w, x, ((0, 0), (0, 0), (0, 0), (m.front, m.back)))
    x = _padded(w, x, ((0, 0), (0, 0), (0, 0), (0, 1)))  # the channel that missing ones read
    picked = w.constant([sizes[1] if i < 0 else i for i in m.source], np.int32)
    return w.add("GATHER", [x, picked], _file_shape((1, *w.shape(node))), axis=3)


def _interpolate(w: Writer, node: fx.Node, call: Call) -> Value:
    into, out, a = w.shape(call.args[0]), w.shape(node), call.attrs
    kind = "bilinear" if "bilinear" in str(node.target) else "nearest"  # where it names no mode
    mode, corners = a.get("mode") or kind, bool(a.get("align_corners"))
    whole = len(out) == 3 and out[1] % into[1] == 0 and out[2] % into[2] == 0
    if not whole or mode not in ("nearest", "bilinear"):
        raise NotPlain(f"'{call.op}' with mode {mode}, or by a factor that is not whole")
    inputs = [w.float(call.args[0]), w.constant(out[1:], np.int32)]
    shape = _file_shape((1, *out))
    if mode == "nearest":
        return w.add("RESIZE_NEAREST_NEIGHBOR", inputs, shape)
    return w.add(
        "RESIZE_BILINEAR", inputs, shape, alignCorners=corners, halfPixelCenters=not corners
    )


def _axis(dim: Any, dims: int) -> int:
    """A dim of a tensor, counted from the first."""
    if not isinstance(dim, int) or dim % dims == 0:
        raise NotPlain("something along the batch, or along axes that cannot be read,")
    return dim % dims


def _file_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """PyTorch's order -> the file's."""
    return tuple(shape[d] for d in (0, 2, 3, 1)) if len(shape) == IMAGE else tuple(shape)


EMIT: Mapping[str, Emit] = {
    "identity": _same,
    "dropout": _dropout,
    "conv": _convolution,
    "linear": _linear,
    "embedding": _embedding,
    "matmul": _matmul,
    "batch_norm": _batch_norm,
    "relu": _plain("RELU"),
    "relu6": _plain("RELU6"),
    "hardtanh": _clip(("min_val", -1.0), ("max_val", 1.0)),
    "clamp": _clip(("min", None), ("max", None)),
    "sigmoid": _plain("LOGISTIC"),
    "tanh": _plain("TANH"),
    "hardsigmoid": _hard_sigmoid,
    "hardswish": _plain("HARD_SWISH"),
    "silu": _silu,
    "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "softmax": _softmax("SOFTMAX", beta=1.0),
    "log_softmax": _softmax("LOG_SOFTMAX"),
    "add": _binary,
    "sub": _binary,
    "mul": _binary,
    "div": _binary,
    "max_pool": _pool("MAX_POOL_2D"),
    "avg_pool": _pool("AVERAGE_POOL_2D"),
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
    "interpolate": _interpolate,
}
