"""How each operator is written as layers of ncnn, whose tensors have no batch.

Sizes of tensors are counted from the last: 0 is the width, 1 the height, 2 the channels. Keys of
parameters are those of https://github.com/Tencent/ncnn/wiki/operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from gracile.benchmark.param import Value, numbers, tagged
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
    slices,
    stored,
)
from gracile.graph.normalize import Call
from gracile.graph.ops.shape import permuted_dims

if TYPE_CHECKING:
    from gracile.export.integers import WeightGrid
    from gracile.export.ncnn import Writer

Emit = Callable[["Writer", fx.Node, Call], Any]
WIDEST = 3.4028235e38
FLOOR = {5: 1}  # windows that do not fit are left out, as in torch
MEAN = 3
OPERATIONS = {"add": 0, "sub": 1, "mul": 2, "div": 3}
REVERSED = {"sub": 7, "div": 8}
# ncnn numbers the orders of axes; axes from the last one, as ncnn lists them.
ORDERS = {
    1: ("w",),
    2: ("wh", "hw"),
    3: ("whc", "hwc", "wch", "cwh", "hcw", "chw"),
    4: (
        "whdc", "hwdc", "wdhc", "dwhc", "hdwc", "dhwc", "whcd", "hwcd", "wchd", "cwhd", "hcwd",
        "chwd", "wdch", "dwch", "wcdh", "cwdh", "dcwh", "cdwh", "hdcw", "dhcw", "hcdw", "chdw",
        "dchw", "cdhw",
    ),
}  # fmt: skip
AXES = {1: "w", 2: "hw", 3: "chw", 4: "cdhw"}  # of a tensor, first one first


def _same(w: Writer, node: fx.Node, call: Call) -> str:
    return w.raw(call.args[0])


def _dropout(w: Writer, node: fx.Node, call: Call) -> str:
    check_dropout_is_off(w.module, node, call)
    return w.raw(call.args[0])


def _plain(type: str, **fixed: float) -> Emit:
    params: dict[int, Value] = {int(k[1:]): v for k, v in fixed.items()}

    def emit(w: Writer, node: fx.Node, call: Call) -> str:
        w.shape(node)
        return w.add(type, [w.float(call.args[0])], params)

    return emit


def _with(type: str, name: str, default: float) -> Emit:
    """Parameter 0 is a torch argument."""

    def emit(w: Writer, node: fx.Node, call: Call) -> str:
        given = call.attrs.get(name)
        return w.add(type, [w.float(call.args[0])], {0: float(default if given is None else given)})

    return emit


def _clip(low: tuple[str, float], high: tuple[str, float]) -> Emit:
    def emit(w: Writer, node: fx.Node, call: Call) -> str:
        given = [call.attrs.get(name, default) for name, default in (low, high)]
        ends = [d if g is None else g for g, d in zip(given, (-WIDEST, WIDEST), strict=True)]
        return w.add("Clip", [w.float(call.args[0])], {0: float(ends[0]), 1: float(ends[1])})

    return emit


def _gelu(w: Writer, node: fx.Node, call: Call) -> str:
    fast = call.attrs.get("approximate") == "tanh"
    return w.add("GELU", [w.float(call.args[0])], {0: int(fast)})


def _softmax(w: Writer, node: fx.Node, call: Call) -> str:
    axis = _axis(call.attrs.get("dim"), len(w.shape(node)))
    return w.add("Softmax", [w.float(call.args[0])], {0: axis, 1: 1})


def _log_softmax(w: Writer, node: fx.Node, call: Call) -> str:
    return w.add("UnaryOp", [_softmax(w, node, call)], {0: 8})


def _binary(w: Writer, node: fx.Node, call: Call) -> str:
    a = call.attrs
    if a.get("alpha") not in (None, 1) or a.get("rounding_mode") or "rsub" in str(node.target):
        raise NotPlain(f"'{call.op}' with options")
    number = next((s for s in ("input", "other") if isinstance(a.get(s), (int, float))), None)
    kind = OPERATIONS[call.op]
    if number is not None:
        kind = REVERSED.get(call.op, kind) if number == "input" else kind
        return w.add("BinaryOp", [w.float(call.args[0])], {0: kind, 1: 1, 2: float(a[number])})
    rank = len(w.shape(node))
    operands = [_operand(w, arg, rank) for arg in call.args]
    if len(operands) != 2:
        raise NotPlain(f"'{call.op}' of something that is no tensor")
    return w.add("BinaryOp", operands, {0: kind})


def _operand(w: Writer, node: fx.Node, rank: int) -> str:
    """An operand of as many axes as the result; a stored one is spread over the batch."""
    if node.op != "get_attr":
        if len(w.shape(node)) != rank:
            raise NotPlain("an addition or product of tensors with different numbers of axes")
        return w.float(node)
    value = stored(w.module, str(node.target)).detach().cpu().float()
    sizes = list(value.shape)
    sizes = sizes[1:] if len(sizes) == rank + 1 else [1] * (rank - len(sizes)) + sizes
    if value.numel() != prod(sizes) or len(sizes) != rank:
        raise NotPlain(f"'{node.target}', a stored tensor with a batch")
    return w.constant(value.reshape(sizes))


def _product_of_tensors(w: Writer, node: fx.Node, call: Call) -> str:
    if any(a.op == "get_attr" or len(w.shape(a)) < 2 for a in call.args):
        raise NotPlain("a product of other things than matrices of each sample")
    return w.add("MatMul", [w.float(a) for a in call.args])


def _convolution(w: Writer, node: fx.Node, call: Call) -> str:
    source, weight, bias, address = layer_operands(w.prepared, node, call)
    a, into = call.attrs, w.shape(source)
    spatial = len(into) - 1
    if a["padding_mode"] != "zeros" or isinstance(a["padding"], str) or spatial not in (1, 2):
        raise NotPlain(
            f"'{call.op}' of {spatial} dims with padding {a['padding']}, {a['padding_mode']}"
        )
    groups, out = int(a["groups"]), weight.shape[0]
    sizes = [*weight.shape[2:]], *(each(a[k], spatial) for k in ("dilation", "stride", "padding"))
    params = _sizes(out, weight, bias, groups, *sizes)
    type = ("Convolution" if groups == 1 else "ConvolutionDepthWise") + "1D" * (spatial == 1)
    grid = w.weight_grid(address, w.raw(source))
    if grid is not None:
        steps = grid.scale.expand(out).reshape(groups, -1) if groups > 1 else grid.scale.expand(out)
        if spatial == 1:
            w.floats[address] = "ncnn has no kernel of integers for 1 spatial dim"
        elif groups > 1 and bool((steps != steps[:, :1]).any()):
            w.floats[address] = "ncnn has one scale for each group of a convolution"
        else:
            steps = steps[:, 0] if groups > 1 else steps
            return _in_integers(w, type, source, params, grid, steps, bias)
    return w.add(type, [w.float(source)], params, _data(weight, bias))


def _data(weight: Tensor, bias: Tensor | None) -> bytes:
    """A layer of floats."""
    return tagged(weight.contiguous().numpy()) + (b"" if bias is None else numbers(bias.numpy()))


def _in_integers(
    w: Writer,
    type: str,
    source: fx.Node,
    params: Mapping[int, Value],
    grid: WeightGrid,
    steps: Tensor,
    bias: Tensor | None,
) -> str:
    """A layer of integers; its data ends with how many levels 1.0 is, for weights and inputs."""
    name = w.raw(source)
    data = tagged(grid.q.to(torch.int8).numpy())
    data += b"" if bias is None else numbers(bias.numpy())
    data += numbers((1 / steps.double()).numpy()) + numbers(1 / w.integers[name].scale)
    return w.add(type, [name], {**params, 8: 1}, data)


def _sizes(
    out: int,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    kernel: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> dict[int, Value]:
    """Parameters of a convolution: width first, height ten keys further."""
    params: dict[int, Value] = {0: out}
    for key, values in ((1, kernel), (2, dilation), (3, stride), (4, padding)):
        params.update({key + 10 * k: v for k, v in enumerate(reversed(values))})
    params |= {5: int(bias is not None), 6: weight.numel()}
    return params if groups == 1 else {**params, 7: groups}


def _transposed(w: Writer, node: fx.Node, call: Call) -> str:
    source, weight, bias, address = layer_operands(w.prepared, node, call)
    a, spatial, groups = call.attrs, len(w.shape(source)) - 1, int(call.attrs["groups"])
    if spatial != 2 or a["padding_mode"] != "zeros":
        raise NotPlain(f"'{call.op}' of {spatial} dims")
    if address in w.prepared.weights:
        w.floats[address] = "ncnn has no kernel of integers for transposed convolutions"
    kernel = [*weight.shape[2:]]
    # (I, O / groups, kH, kW) -> for each group outputs first
    turned = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    out = weight.shape[1] * groups
    sizes = kernel, *(each(a[k], spatial) for k in ("dilation", "stride", "padding"))
    more = each(a["output_padding"], spatial)
    params = _sizes(out, weight, bias, groups, *sizes) | {18: more[1], 19: more[0]}
    type = "Deconvolution" if groups == 1 else "DeconvolutionDepthWise"
    return w.add(type, [w.float(source)], params, _data(turned, bias))


def _linear(w: Writer, node: fx.Node, call: Call) -> str:
    source, weight, bias, address = layer_operands(w.prepared, node, call)
    if len(w.shape(source)) > 2:
        raise NotPlain(f"'{call.op}' of tensors with more than two dims in each sample")
    params: dict[int, Value] = {0: weight.shape[0], 1: int(bias is not None), 2: weight.numel()}
    grid = w.weight_grid(address, w.raw(source))
    if grid is None:
        return w.add("InnerProduct", [w.float(source)], params, _data(weight, bias))
    steps = grid.scale.expand(weight.shape[0])
    return _in_integers(w, "InnerProduct", source, params, grid, steps, bias)


def _batch_norm(w: Writer, node: fx.Node, call: Call) -> str:
    check_running_statistics(w.module, node, call)
    found = {r: stored(w.module, a).detach().cpu().float() for r, a in call.params.items()}
    mean, variance = found["running_mean"], found["running_var"]
    slope, shift = found.get("weight", torch.ones_like(mean)), found.get("bias")
    shift = torch.zeros_like(mean) if shift is None else shift
    data = b"".join(numbers(v.numpy()) for v in (slope, mean, variance, shift))
    params: dict[int, Value] = {0: len(mean), 1: float(call.attrs["eps"])}
    return w.add("BatchNorm", [w.float(call.args[0])], params, data)


def _embedding(w: Writer, node: fx.Node, call: Call) -> str:
    check_rows_of_a_line(w.module, w.dims, node, call)
    _, weight, _, address = layer_operands(w.prepared, node, call)
    if address in w.prepared.weights:
        w.floats[address] = "ncnn looks rows up in floats"
    rows, width = weight.shape
    params: dict[int, Value] = {0: width, 1: rows, 2: 0, 3: weight.numel()}
    return w.add("Embed", [w.raw(call.args[0])], params, tagged(weight.numpy()))


def _pool(kind: int) -> Emit:
    def emit(w: Writer, node: fx.Node, call: Call) -> str:
        kernel, stride, padding = image_window(call, len(w.shape(node)) - 1)
        params: dict[int, Value] = {0: kind, **FLOOR}
        for key, values in ((1, kernel), (2, stride), (3, padding)):
            params.update({key + 10 * k: v for k, v in enumerate(reversed(values))})
        params |= {14: padding[1], 15: padding[0]}
        if kind:
            params[6] = int(bool(call.attrs.get("count_include_pad", True)))
        return w.add("Pooling", [w.float(call.args[0])], params)

    return emit


def _adaptive_pool(w: Writer, node: fx.Node, call: Call) -> str:
    out, x = w.shape(node), w.float(call.args[0])
    if len(out) != 3:
        raise NotPlain(f"'{call.op}' of other things than images")
    if out[1:] == (1, 1):
        return _reshaped(w, w.add("Pooling", [x], {0: 1, 4: 1}), out)
    return w.add("Pooling", [x], {0: 1, 7: 1, 8: out[2], 18: out[1]})


def _mean(w: Writer, node: fx.Node, call: Call) -> str:
    dims, into, out = call.attrs.get("dim"), w.shape(call.args[0]), w.shape(node)
    if dims is None or call.attrs.get("dtype") is not None:
        raise NotPlain("a mean over everything, or of another type")
    given = [dims] if isinstance(dims, int) else list(dims)
    axes = sorted(_axis(d, len(into)) for d in given)
    x, keep = w.float(call.args[0]), int(len(out) == len(into))
    if len(into) == 3 and axes == [1, 2]:
        pooled = w.add("Pooling", [x], {0: 1, 4: 1})
        return _reshaped(w, pooled, out) if keep else pooled
    return w.add("Reduction", [x], {0: MEAN, 1: 0, 3: tuple(axes), 4: keep, 5: 1})


def _reshape(w: Writer, node: fx.Node, call: Call) -> str:
    into, out = w.shape(call.args[0]), w.shape(node)
    if prod(into) != prod(out):
        raise NotPlain("a reshape that mixes the samples of a batch")
    x = w.float(call.args[0])
    return x if into == out else _reshaped(w, x, out)


def _reshaped(w: Writer, x: str, out: Sequence[int]) -> str:
    if not 1 <= len(out) <= 4:
        raise NotPlain(f"a tensor of {len(out)} dims in each sample")
    keys = (0, 1, 2) if len(out) < 4 else (0, 1, 11, 2)
    return w.add("Reshape", [x], dict(zip(keys, reversed(out), strict=False)))


def _permute(w: Writer, node: fx.Node, call: Call) -> str:
    rank = len(w.shape(call.args[0]))
    order = permuted_dims(call.attrs, rank + 1)
    if order is None or order[0] != 0 or rank not in ORDERS:
        raise NotPlain("a permutation that cannot be read, or that moves the batch")
    text = "".join(AXES[rank][d - 1] for d in reversed(order[1:]))
    return w.add("Permute", [w.float(call.args[0])], {0: ORDERS[rank].index(text)})


def _cat(w: Writer, node: fx.Node, call: Call) -> str:
    axis = _axis(call.attrs["dim"], len(w.shape(node)))
    return w.add("Concat", [_operand(w, a, len(w.shape(node))) for a in call.args], {0: axis})


def _parts(w: Writer, node: fx.Node, call: Call) -> list[str]:
    lengths = part_lengths(call, w.dims[call.args[0]])
    axis = _axis(call.attrs["dim"], len(w.shape(call.args[0])))
    params: dict[int, Value] = {0: tuple(lengths), 1: axis}
    return w.several("Slice", [w.float(call.args[0])], len(lengths), params)


def _getitem(w: Writer, node: fx.Node, call: Call) -> Any:
    source, index = node.args[0], node.args[1]
    if not isinstance(source, fx.Node):
        raise NotPlain("an index into something else than a tensor")
    made = w.names[source]
    if isinstance(made, list):
        if not isinstance(index, int):
            raise NotPlain("a slice of a tuple")
        return made[index]
    return None if made is None else _cut(w, w.float(source), w.shape(source), index)


def _cut(w: Writer, x: str, sizes: Sequence[int], index: Any) -> str:
    """Crop, and every n-th row and column by a pooling of single values."""
    parts = slices(index)
    if any(axis == 0 for axis, _ in parts):
        raise NotPlain("a slice of the batch")
    ranges = {axis - 1: part.indices(sizes[axis - 1]) for axis, part in parts}
    cuts = {a: (r[0], r[1]) for a, r in ranges.items() if (r[0], r[1]) != (0, sizes[a])}
    if cuts:
        ends = zip(*cuts.values(), strict=True)
        starts, stops = (tuple(e) for e in ends)
        x = w.add("Crop", [x], {9: starts, 10: stops, 11: tuple(cuts)})
    steps = {a: r[2] for a, r in ranges.items() if r[2] != 1}
    if not steps:
        return x
    if len(sizes) != 3 or not set(steps) <= {1, 2} or min(steps.values()) < 1:
        raise NotPlain("a slice with steps, not over an image,")
    return w.add(
        "Pooling", [x], {0: 0, 1: 1, 11: 1, 2: steps.get(2, 1), 12: steps.get(1, 1), **FLOOR}
    )


def _pad(w: Writer, node: fx.Node, call: Call) -> str:
    around, value = constant_padding(w.module, node, call)
    return _padded(w, w.float(call.args[0]), around, len(w.shape(node)), value)


def _padded(w: Writer, x: str, around: Sequence[int], rank: int, value: float = 0.0) -> str:
    if rank == 4 or len(around) > 2 * rank:
        raise NotPlain("a padding of the batch, or of volumes")
    params: dict[int, Value] = {4: 0, 5: value}
    params.update(zip((2, 3, 0, 1, 7, 8), around, strict=False))
    return w.add("Padding", [x], params)


def _channel_pad(w: Writer, node: fx.Node, call: Call) -> str:
    m: Any = w.module.get_submodule(str(node.target))
    x, sizes = w.float(call.args[0]), w.shape(call.args[0])
    if m.stride > 1:
        every = slice(None, None, m.stride)
        x = _cut(w, x, sizes, (slice(None), slice(None), every, every))
    if m.contiguous:
        return _padded(w, x, (0, 0, 0, 0, m.front, m.back), 3)
    # Channels in any order with zeros between them: a convolution that picks them.
    picked = torch.zeros(len(m.source), sizes[0])
    for k, i in enumerate(m.source):
        if i >= 0:
            picked[k, i] = 1
    params: dict[int, Value] = {0: len(picked), 1: 1, 5: 0, 6: picked.numel()}
    return w.add("Convolution", [x], params, tagged(picked.numpy()))


def _axis(dim: Any, rank: int) -> int:
    """The axis without the batch that a dim of a tensor with it means."""
    if not isinstance(dim, int) or dim % (rank + 1) == 0:
        raise NotPlain("something along the batch, or along axes that cannot be read,")
    return dim % (rank + 1) - 1


EMIT: Mapping[str, Emit] = {
    "identity": _same,
    "dropout": _dropout,
    "conv": _convolution,
    "conv_transpose": _transposed,
    "linear": _linear,
    "embedding": _embedding,
    "matmul": _product_of_tensors,
    "batch_norm": _batch_norm,
    "relu": _plain("ReLU"),
    "relu6": _clip(("", 0.0), ("", 6.0)),
    "hardtanh": _clip(("min_val", -1.0), ("max_val", 1.0)),
    "clamp": _clip(("min", -WIDEST), ("max", WIDEST)),
    "sigmoid": _plain("Sigmoid"),
    "tanh": _plain("TanH"),
    "hardsigmoid": _plain("HardSigmoid", _0=1 / 6, _1=0.5),
    "hardswish": _plain("HardSwish", _0=1 / 6, _1=0.5),
    "silu": _plain("Swish"),
    "gelu": _gelu,
    "leaky_relu": _with("ReLU", "negative_slope", 0.01),
    "elu": _with("ELU", "alpha", 1.0),
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "add": _binary,
    "sub": _binary,
    "mul": _binary,
    "div": _binary,
    "max_pool": _pool(0),
    "avg_pool": _pool(1),
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
}
