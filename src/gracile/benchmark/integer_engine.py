"""A quantized network on PyTorch's own integer kernels: the engines x86 and qnnpack.

Between two quantizers of unsigned 8-bit tensors convolutions, linear layers, additions,
concatenations and what only moves values compute in integers, with our grids. Everything else
computes in floats as the simulation does, with the conversions that takes.
"""

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gracile.graph.fold import fold_batchnorm
from gracile.graph.instrument import SUFFIX
from gracile.nn.quantized import ActivationQuantizer

ENGINES = ("x86", "qnnpack")
BITS = 8
RELUS = (nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_")
ADDS = (operator.add, operator.iadd, torch.add)
CATS = (torch.cat, torch.concat)
MOVES = (
    nn.MaxPool2d, nn.Flatten, nn.Identity, nn.Dropout, F.max_pool2d, torch.max_pool2d,
    torch.flatten, "flatten", "reshape", "view", "permute", "contiguous", operator.getitem,
)  # fmt: skip
INTEGER = "integer"  # of a node's meta: it computes in integers


class QuantizedConv2d(nn.Module):
    """A convolution of integers, ReLU included, that gives integers on its output's grid."""

    def __init__(self, layer: nn.Conv2d, weight: Tensor, relu: bool, out: ActivationQuantizer):
        super().__init__()
        bias = None if layer.bias is None else layer.bias.detach().float()
        padding: Any = layer.padding
        self.packed = torch.ops.quantized.conv2d_prepack(
            weight, bias, layer.stride, padding, layer.dilation, layer.groups
        )
        self.run = torch.ops.quantized.conv2d_relu if relu else torch.ops.quantized.conv2d
        self.out = float(out.scale), int(out.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Integers (N, O, H, W)."""
        result: Tensor = self.run(x, self.packed, *self.out)
        return result


class QuantizedLinear(nn.Module):
    """A linear layer of integers, ReLU included, that gives integers on its output's grid."""

    def __init__(self, layer: nn.Linear, weight: Tensor, relu: bool, out: ActivationQuantizer):
        super().__init__()
        bias = None if layer.bias is None else layer.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack(weight, bias)
        self.run = torch.ops.quantized.linear_relu if relu else torch.ops.quantized.linear
        self.out = float(out.scale), int(out.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Integers (..., O)."""
        result: Tensor = self.run(x, self.packed, *self.out)
        return result


KERNELS: Mapping[type, type] = {nn.Conv2d: QuantizedConv2d, nn.Linear: QuantizedLinear}


@contextmanager
def engine(name: str) -> Iterator[None]:
    """PyTorch's integer kernels are those of this engine; it is a setting of the process."""
    backend: Any = torch.backends.quantized
    before = backend.engine
    backend.engine = name
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")  # deprecated
            yield
    finally:
        backend.engine = before


def in_integers(module: fx.GraphModule, scales: Mapping[str, Tensor]) -> fx.GraphModule:
    """A copy of a captured, quantized network that computes in integers where the engine can.

    Args:
        module: captured with its quantizers, weights on their grids.
        scales: address -> scale of the weight's symmetric integers, one or (O,).

    Returns:
        The network with BatchNorm folded. Nodes keep their ``meta["id"]``, a layer with its
        BatchNorm has that of the norm; those that compute in integers have ``meta["integer"]``.
    """
    fold = fold_batchnorm(module)
    out = fold.module
    by_id = {node.meta.get("id"): node for node in out.graph.nodes}
    for norm, layer in fold.merged.items():
        by_id[layer].meta["id"] = norm
    _Lowering(out, scales, fold.scaled).run()
    out.delete_all_unused_submodules()
    out.graph.lint()
    out.recompile()
    return out


class _Lowering:
    def __init__(
        self, module: fx.GraphModule, scales: Mapping[str, Tensor], factors: Mapping[str, Tensor]
    ):
        self.module, self.scales, self.factors = module, scales, factors
        self.layers = dict(module.named_modules())
        self.whole: dict[fx.Node, fx.Node] = {}  # a quantizer -> the node with its integers

    def run(self) -> None:
        """Lower every quantizer, in order, then give floats to those who read floats."""
        for node in list(self.module.graph.nodes):
            grid = self._grid(node)
            if grid is not None:
                self._lower(node, grid)
        for quantizer in list(self.whole):
            self._give_floats(quantizer)
        self.module.graph.eliminate_dead_code()  # what was computed in floats

    def _lower(self, node: fx.Node, grid: ActivationQuantizer) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        relu = self._key(source) in RELUS and len(source.users) == 1
        core = source.all_input_nodes[0] if relu else source
        made = self._kernel(core, relu, grid) if len(core.users) == 1 else None
        self.whole[node] = node if made is None else made
        if made is not None:
            made.meta |= {"id": node.meta["id"], INTEGER: True}

    def _kernel(self, core: fx.Node, relu: bool, grid: ActivationQuantizer) -> fx.Node | None:
        """The node that computes `core` in integers, behind it; None if there is no such kernel."""
        read = core.all_input_nodes
        if not read or any(n not in self.whole for n in read):
            return None
        key, out = self._key(core), (float(grid.scale), int(grid.zero_point))
        integers = [self._integers(n) for n in read]
        graph, functions = self.module.graph, torch.ops.quantized
        if key in KERNELS and len(read) == 1:
            layer = self.layers[str(core.target)]
            weight = self._weight(str(core.target), layer)
            if weight is None:
                return None
            name = f"{str(core.target).replace('.', '___')}___{key.__name__}"
            self.module.add_submodule(name, KERNELS[key](layer, weight, relu, grid))
            with graph.inserting_after(core):
                return graph.call_module(name, tuple(integers))
        if key in ADDS and len(core.args) == 2 == len(read) and not core.kwargs:
            function = functions.add_relu if relu else functions.add
            with graph.inserting_after(core):
                return graph.call_function(function, (*integers, *out))
        if key in CATS and not relu and self._dim(core) == 1 and core.args:
            parts = [self._integers(n) for n in core.args[0]]  # type: ignore[union-attr, arg-type]
            with graph.inserting_after(core):
                return graph.call_function(functions.cat, (parts, 1, *out))
        if key in MOVES and not relu and len(read) == 1 and self._same(read[0], grid):
            with graph.inserting_after(core):
                return graph.node_copy(core, lambda n: integers[0])
        return None

    def _weight(self, path: str, layer: Any) -> Tensor | None:
        """A layer's weight as integers with a scale for each output; None if it has no such."""
        address = f"{path}.weight"
        scale = self.scales.get(address)
        zeros = isinstance(layer, nn.Linear) or (
            layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        )
        if scale is None or not zeros:
            return None
        weight = layer.weight.detach().double()
        factor = self.factors.get(address, torch.ones(weight.shape[0])).double().abs()
        wide = scale.double().expand(weight.shape[0]) * torch.where(factor == 0, 1.0, factor)
        wide = wide.float().double()
        q = torch.round(weight / wide.reshape(-1, *[1] * (weight.ndim - 1)))
        if float(q.abs().max()) > 127:
            return None  # -128 has no mirror where a BatchNorm's factor is negative
        zero = torch.zeros(len(wide), dtype=torch.int64)
        found: Tensor = torch._make_per_channel_quantized_tensor(q.to(torch.int8), wide, zero, 0)
        return found

    def _integers(self, quantizer: fx.Node) -> fx.Node:
        """The node that holds a quantizer's integers; a float behind it is rounded to them."""
        made = self.whole[quantizer]
        if made is quantizer:
            grid = self.layers[str(quantizer.target)]
            arguments = (quantizer.args[0], float(grid.scale), int(grid.zero_point), torch.quint8)
            with self.module.graph.inserting_after(quantizer):
                made = self.module.graph.call_function(torch.quantize_per_tensor, arguments)
            made.meta |= {"id": quantizer.meta["id"], INTEGER: True}
            self.whole[quantizer] = made
        return made

    def _give_floats(self, quantizer: fx.Node) -> None:
        made = self.whole[quantizer]
        if made is quantizer:
            return
        if any(not user.meta.get(INTEGER) for user in quantizer.users):
            with self.module.graph.inserting_after(made):
                floats = self.module.graph.call_method("dequantize", (made,))
            floats.meta["id"] = f"{quantizer.meta['id'].removesuffix(SUFFIX)}.dequantize"
            quantizer.replace_all_uses_with(floats)

    def _grid(self, node: fx.Node) -> ActivationQuantizer | None:
        """A quantizer whose tensor the engines can hold."""
        called = self.layers.get(str(node.target)) if node.op == "call_module" else None
        fits = (
            type(called) is ActivationQuantizer
            and called.mode == "quantize"
            and (called.bits, called.signed, called.dynamic) == (BITS, False, False)
        )
        return called if fits and isinstance(called, ActivationQuantizer) else None

    def _same(self, quantizer: fx.Node, grid: ActivationQuantizer) -> bool:
        other = self.layers[str(quantizer.target)]
        return (float(other.scale), int(other.zero_point)) == (
            float(grid.scale), int(grid.zero_point),
        )  # fmt: skip

    def _key(self, node: fx.Node) -> Any:
        """A module's class, a function, or the name of a method."""
        if node.op == "call_module":
            return type(self.layers[str(node.target)])
        return node.target if node.op in ("call_function", "call_method") else None

    def _dim(self, node: fx.Node) -> Any:
        return node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)


def steps_of(
    module: fx.GraphModule, ends: Sequence[str], hint: str
) -> list[tuple[str, str, str, str]]:
    """(node's id, unit, kernel, precision) of each step of a network that `in_integers` made."""
    last = {f"{id}{SUFFIX}": id for id in ends} | {id: id for id in ends}
    layers = module.get_submodule
    out: list[tuple[str, str, str, str]] = []
    waiting: list[tuple[str, str, str]] = []
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        kind = _name(layers, node)
        id = str(node.meta["id"])
        waiting.append((id, kind, "int8" if node.meta.get(INTEGER) else hint))
        if id in last:
            out += [(i, last[id], k, p) for i, k, p in waiting]
            waiting = []
    return out + [(i, "", k, p) for i, k, p in waiting]


def _name(layers: Callable[[str], nn.Module], node: fx.Node) -> str:
    if node.op == "call_module":
        return type(layers(str(node.target))).__name__
    return str(getattr(node.target, "__name__", node.target))
